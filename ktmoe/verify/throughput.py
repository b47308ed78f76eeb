"""`python -m ktmoe.verify.throughput`: tokens per second of one layer's experts, forward and backward, by backend.

The backends take turns, so that whatever else the machine does meets them alike. Speed is reported, never judged.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from ktmoe.backends import TABLE, build, kt
from ktmoe.config import KTConfig
from ktmoe.gate import contract
from ktmoe.interface import Backend
from ktmoe.planning import plan
from ktmoe.shapes import SHAPES
from ktmoe.types import MoEShape
from ktmoe.validation import make_inputs
from ktmoe.verify import results


_SHAPE = "DeepSeek-V2-Lite"


def measure(
    names: list[str], shape: MoEShape, tokens: int, rounds: int, show: Any = iter
) -> dict[str, dict[str, list[float]]]:
    """Times backends on the same call, each with the weights as it takes them.

    Args:
        names: of the backends.
        shape: of the layer.
        tokens: of the call.
        rounds: timed calls of each backend, after one that is not.
        show: wraps the rounds, for a progress bar.

    Returns:
        By backend: seconds of every `forward` (saving) and `backward`.
    """
    cases = {s: contract.draw_case(shape, tokens, 0, s) for s in {TABLE[name].stored for name in names}}
    backends: dict[str, Backend] = {}
    for name in names:
        case = cases[TABLE[name].stored]
        decided = plan(KTConfig(kt_backend=name), shape, case.weights.stored)
        backends[name] = build(decided, case.weights, shape, case.lora.scaling)
    call = contract.first_rows(next(iter(cases.values())), tokens)
    times: dict[str, dict[str, list[float]]] = {name: {"forward": [], "backward": []} for name in backends}
    for i in show(range(rounds + 1)):
        for name, backend in backends.items():
            forward, backward = once(backend, call)
            if i:
                times[name]["forward"].append(forward)
                times[name]["backward"].append(backward)
    for backend in backends.values():
        backend.close()
    return times


def once(backend: Backend, case: contract.Case) -> tuple[float, float]:
    """Seconds of a saving forward, and of its backward."""
    dtype = backend.compute_dtype
    inputs = make_inputs(case.hidden_states, case.top_k_index, case.top_k_weights, case.lora, case.shape, dtype)
    grad_output = case.grad_output.to(dtype)
    start = time.perf_counter()
    _, ticket = backend.forward(inputs, save=True)
    middle = time.perf_counter()
    backend.backward(ticket, inputs, grad_output)
    return middle - start, time.perf_counter() - middle


def table(shape_name: str, shape: MoEShape, tokens: int, times: dict[str, dict[str, list[float]]]) -> Table:
    """Medians, and their ratios."""
    threads = torch.get_num_threads()
    title = f"{escape(shape_name)} ({results.sizes(shape)}), {tokens} tokens"
    out = Table(title=f"{title}\n{threads} torch threads, kernel {escape(kt.variant())}")
    for column in ("backend", "forward, ms", "backward, ms", "backward / forward", "tokens/s, both"):
        out.add_column(column, justify="left" if column == "backend" else "right")
    for name, t in times.items():
        f, b = statistics.median(t["forward"]), statistics.median(t["backward"])
        out.add_row(name, f"{1e3 * f:.1f}", f"{1e3 * b:.1f}", f"{b / f:.2f}", f"{tokens / (f + b):,.0f}")
    return out


def main(argv: list[str] | None = None) -> int:
    """Runs all, prints a table per shape, and returns 0 only if the kernel was there."""
    parser = argparse.ArgumentParser(prog="ktmoe.verify.throughput", description=__doc__)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    results.add_arguments(parser)
    results.add_model_arguments(parser)
    args = parser.parse_args(argv)
    for option in ("tokens", "rounds"):
        if getattr(args, option) < 1:
            parser.error(f"--{option}: got {getattr(args, option)}; expected at least 1")
    console = results.console()
    shapes = results.model_shapes(args) or {_SHAPE: contract.reduced(SHAPES[_SHAPE])}
    runs: list[dict[str, Any]] = []
    for name, shape in shapes.items():

        def show(rounds: Any, name: str = name) -> Any:
            return track(rounds, f"Throughput, {name}", console=console, disable=not console.is_terminal)

        times = measure(results.backends_for(shape, console), shape, args.tokens, args.rounds, show)
        console.print(table(name, shape, args.tokens, times))
        runs.append({"shape_name": name, "shape": vars(shape), "seconds": times})
    measured = {name for run in runs for name in run["seconds"]}
    data = {"variant": kt.variant(), "tokens": args.tokens, "rounds": args.rounds, "runs": runs}
    summary = f"throughput measured: {', '.join(f'{n} ({results.sizes(s)})' for n, s in shapes.items())}"
    return results.end(console, args, "throughput", measured, [], data, summary)


if __name__ == "__main__":
    raise SystemExit(main())
