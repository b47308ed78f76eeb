"""`python -m ktmoe.verify.accuracy`: every output and gradient of the kernel against the fp64 specification.

Layer shapes are those of released models, with fewer experts (E changes how often the same code runs, not the code).
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass

from ktmoe_reference import LORA_NAMES
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ktmoe import contract
from ktmoe.backends import KERNEL_BACKENDS, build, kernel, plan
from ktmoe.config import KTConfig
from ktmoe.types import MoEShape


SHAPES = {
    "Qwen3-30B-A3B": MoEShape(num_experts=16, hidden_size=2048, intermediate_size=768, top_k=8, rank=8),
    "DeepSeek-V2-Lite": MoEShape(num_experts=12, hidden_size=2048, intermediate_size=1408, top_k=6, rank=8),
    "small, r=64": MoEShape(num_experts=8, hidden_size=256, intermediate_size=128, top_k=2, rank=64),
}
TOKENS = 192
_NAMES = ("output", "hidden_states", "top_k_weights", *LORA_NAMES)


@dataclass(frozen=True)
class Run:
    """One backend on one shape."""

    backend: str
    shape_name: str
    rows: list[contract.Measurement]
    problems: list[str]
    seconds: float


def run(backend_name: str, shape_name: str, seed: int) -> Run:
    """Measures one backend on one shape, against this project's own tight limits."""
    start = time.perf_counter()
    shape = SHAPES[shape_name]
    case = contract.draw_case(shape, TOKENS, seed)
    decided = plan(KTConfig(kt_backend=backend_name), shape)
    assert decided.backend == backend_name, decided.note
    backend = build(decided, case.weights, shape, case.lora.scaling)
    rows = contract.measure(case, contract.answer(backend, case), contract.specification(case))
    problems = contract.violations(rows, contract.EXPECTED[backend_name])
    return Run(backend_name, shape_name, rows, problems, time.perf_counter() - start)


def table(runs: list[Run]) -> Table:
    """Errors in per cent: of the whole tensor, and of the worst expert."""
    out = Table(title=f"Relative error against fp64, % (whole / worst expert); kernel: {kernel.variant()}")
    out.add_column("tensor")
    for r in runs:
        out.add_column(f"{r.backend}\n{r.shape_name}", justify="right")
    for name in _NAMES:
        cells = []
        for r in runs:
            whole = next(m.error for m in r.rows if m.name == name and m.expert is None and m.token is None)
            experts = [m.error for m in r.rows if m.name == name and m.expert is not None]
            cells.append(f"{100 * whole:.2f} / {100 * max(experts):.2f}" if experts else f"{100 * whole:.2f}")
        out.add_row(("" if name == "output" else "grad ") + name, *cells)
    out.add_section()
    for label, key in (("limit forward", "forward"), ("limit backward", "backward")):
        out.add_row(label, *(f"{100 * getattr(contract.EXPECTED[r.backend], key):.2f}" for r in runs))
    out.add_row("verdict", *("[red]FAIL[/]" if r.problems else "[green]pass[/]" for r in runs))
    return out


def main(argv: list[str] | None = None) -> int:
    """Runs all, prints the table, and returns 0 only if the kernel was measured and is within its limits."""
    parser = argparse.ArgumentParser(prog="ktmoe.verify.accuracy", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--allow-unverified", action="store_true", help="succeed where no kernel can be measured")
    args = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 160)
    names = ("torch", *KERNEL_BACKENDS) if kernel.available() else ("torch",)
    todo = [(b, s) for s in SHAPES for b in names]
    runs = [
        run(b, s, args.seed)
        for b, s in track(todo, description="Measuring", console=console, disable=not console.is_terminal)
    ]
    for shape_name in SHAPES:
        console.print(table([r for r in runs if r.shape_name == shape_name]))
    for r in runs:
        for problem in r.problems:
            console.print(f"[red]{r.backend}, {r.shape_name}: {problem}[/]")
    console.print(
        f"seed {args.seed}, {TOKENS} mixed tokens and 2 per expert alone, {sum(r.seconds for r in runs):.0f} s"
    )
    if any(r.problems for r in runs):
        console.print("[red]accuracy FAILED[/]")
        return 1
    if not kernel.available():
        console.print(f"kernel NOT verified on this host: {kernel.variant()}")
        return 0 if args.allow_unverified else 1
    console.print(f"kernel verified: {kernel.variant()} ({', '.join(KERNEL_BACKENDS)})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
