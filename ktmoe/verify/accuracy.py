"""`python -m ktmoe.verify.accuracy`: every output and gradient of the kernel against the specification, in fp64
(fp32 for layers above 1 GiB): INT8 against INT8's arithmetic, and beside it how far that is from the exact formula.

Layer shapes are those of released models, with fewer experts (E changes how often the same code runs, not the code),
or those of the model that is asked for.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from ktmoe_reference import LORA_NAMES
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from ktmoe.backends import KERNEL_BACKENDS, TABLE, build, kt
from ktmoe.config import KTConfig
from ktmoe.gate import contract
from ktmoe.planning import plan
from ktmoe.shapes import SHAPES
from ktmoe.types import MoEShape
from ktmoe.verify import results


_NAMES_OF_SHAPES = ("Qwen3-30B-A3B", "DeepSeek-V2-Lite", "small, r=64")
TOKENS = 192
_LARGE = 2**30  # bytes of bf16 weights, from which the specification computes in fp32 to fit the memory
_NAMES = ("output", "hidden_states", "top_k_weights", *LORA_NAMES)


@dataclass(frozen=True)
class Run:
    """One backend on one shape."""

    backend: str
    shape_name: str
    shape: MoEShape
    precision: str  # of the specification
    rows: list[contract.Measurement]
    exact: list[contract.Measurement]  # for INT8: from the exact formula, the format's own distance
    problems: list[str]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Everything, with the limits."""
        limits = asdict(TABLE[self.backend].expected)
        rows = {
            key: [
                {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(m).items()}
                for m in getattr(self, key)
            ]
            for key in ("rows", "exact")
        }
        return {**vars(self), "shape": asdict(self.shape), **rows, "limits": limits}


def run(backend_name: str, shape_name: str, shape: MoEShape, seed: int) -> Run:
    """Measures one backend on one shape, against this project's own tight limits."""
    start = time.perf_counter()
    case = contract.draw_case(shape, TOKENS, seed, TABLE[backend_name].stored)
    decided = plan(KTConfig(kt_backend=backend_name), shape, case.weights.stored)
    assert decided.backend == backend_name, decided.note
    backend = build(decided, case.weights, shape, case.lora.scaling)
    dtype = torch.float32 if case.weights.nbytes() > _LARGE else torch.float64
    answer = contract.answer(backend, case)
    rows = contract.measure(case, answer, contract.specification(case, dtype, backend.int8))
    exact = contract.measure(case, answer, contract.specification(case, dtype)) if backend.int8 else []
    backend.close()
    problems = contract.violations(rows, TABLE[backend_name].expected)
    precision = str(dtype).removeprefix("torch.")
    return Run(backend_name, shape_name, shape, precision, rows, exact, problems, time.perf_counter() - start)


def table(runs: list[Run], variant: str) -> Table:
    """Errors in per cent: of the whole tensor, and of the worst expert."""
    s = runs[0].shape
    title = f"{escape(runs[0].shape_name)} ({results.sizes(s)}), kernel {escape(variant)}"
    out = Table(title=f"{title}\nerror relative to {runs[0].precision}, % (whole / worst expert)")
    out.add_column("tensor")
    columns = [(r.backend, r.rows) for r in runs]
    columns += [(f"{r.backend}, format from bf16", r.exact) for r in runs if r.exact]
    for title, _ in columns:
        out.add_column(title, justify="right")
    for name in _NAMES:
        cells = []
        for _, rows in columns:
            whole = next(m.error for m in rows if m.name == name and m.expert is None and m.token is None)
            experts = [m.error for m in rows if m.name == name and m.expert is not None]
            cells.append(f"{100 * whole:.2f} / {100 * max(experts):.2f}" if experts else f"{100 * whole:.2f}")
        out.add_row(("" if name == "output" else "grad ") + name, *cells)
    out.add_section()
    for label, key in (("limit forward", "forward"), ("limit backward", "backward")):
        held = [f"{100 * getattr(TABLE[r.backend].expected, key):.2f}" for r in runs]
        aimed = [f"aimed at: {100 * getattr(TABLE[r.backend].aimed_at, key):.0f}" for r in runs if r.exact]
        out.add_row(label, *held, *aimed)
    out.add_row("verdict", *("[red]FAIL[/]" if r.problems else "[green]pass[/]" for r in runs))
    return out


def main(argv: list[str] | None = None) -> int:
    """Runs all, prints the tables, and returns 0 only if the kernel was measured and is within its limits."""
    parser = argparse.ArgumentParser(prog="ktmoe.verify.accuracy", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--label", default="", help="what to call the kernel in tables, besides its variant")
    results.add_arguments(parser)
    results.add_model_arguments(parser)
    args = parser.parse_args(argv)
    console = results.console()
    variant = f"{kt.variant()} {args.label}".strip()
    shapes = results.model_shapes(args) or {name: contract.reduced(SHAPES[name]) for name in _NAMES_OF_SHAPES}
    todo = [(b, name, shape) for name, shape in shapes.items() for b in results.backends_for(shape, console)]
    steps = track(todo, "Accuracy", console=console, disable=not console.is_terminal)
    runs = [run(*one, args.seed) for one in steps]
    for shape_name in shapes:
        console.print(table([r for r in runs if r.shape_name == shape_name], variant))
    seconds = sum(r.seconds for r in runs)
    console.print(f"seed {args.seed}, {TOKENS} mixed tokens and 2 per expert alone, {seconds:.0f} s")
    problems = [f"{r.backend}, {r.shape_name}: {p}" for r in runs for p in r.problems]
    data = {"variant": variant, "seed": args.seed, "tokens": TOKENS, "runs": [r.as_json() for r in runs]}
    measured = {r.backend for r in runs}
    summary = f"accuracy: kernel verified: {variant} ({', '.join(n for n in KERNEL_BACKENDS if n in measured)})"
    return results.end(console, args, "accuracy", measured, problems, data, summary)


if __name__ == "__main__":
    raise SystemExit(main())
