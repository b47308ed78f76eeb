"""One layer's experts, forward and backward with LoRA: ktmoe's backends, the bare kernel, transformers + peft.

    python bench/layers.py --rows smollm2 v2-lite --out DIR

Every contestant is a process of its own, and they take turns (A B B A). Each repetition draws another routing and
another number of tokens, as training does, and rests before it is timed; a contestant whose output is not that of the
specification within 5 % is an error. The roofline is what must be multiplied at least, without padding and LoRA: three
products of 2 x rows x H x I operations forward and three backward, since the weights are frozen; at the rate of a
large GEMM in bf16 or fp32, whichever is faster on this CPU, measured in the same process. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from report import machine, show, write
from whole_step import Peak

from ktmoe.backends import KERNEL_BACKENDS, TABLE, kt
from ktmoe.cores import usable_cores
from ktmoe.gate import contract
from ktmoe.shapes import SHAPES
from ktmoe.types import MoEShape


ROWS = {  # a layer, and tokens
    "smollm2": (SHAPES["SmolLM2-135M, upcycled"], 512),
    "small": (MoEShape(num_experts=64, hidden_size=1024, intermediate_size=768, top_k=6, rank=8), 512),
    "v2-lite": (SHAPES["DeepSeek-V2-Lite"], 1024),
    "qwen3": (SHAPES["Qwen3-30B-A3B"], 1024),
    "mixtral": (SHAPES["Mixtral-8x7B"], 512),
}
SWEEPS = {  # of one size, the others as in the row
    "tokens": [(f"smollm2, {t} tokens", (ROWS["smollm2"][0], t)) for t in (16, 64, 256, 1024, 4096, 8192)],
    "experts": [
        (f"small, {e} experts", (replace(ROWS["small"][0], num_experts=e), ROWS["small"][1]))
        for e in (8, 16, 32, 64, 128)
    ],
}
ALL = ROWS | dict(SWEEPS["tokens"]) | dict(SWEEPS["experts"])
REST = 0.12  # seconds
WARM_UP = 2  # repetitions
SECONDS = 10.0  # after which a process begins no further repetition, three timed ones at least


def timed(run: Callable[[], object]) -> float:
    """Seconds, after a rest."""
    time.sleep(REST)
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def gemm_rate(dtype: torch.dtype = torch.bfloat16) -> float:
    """Operations per second of a large product, or of a small one where that already takes long."""
    for size in (512, 2048):
        a = torch.randn(size, size).to(dtype)
        seconds = statistics.median(timed(lambda a=a: a @ a) for _ in range(7))
        if seconds > 0.03:
            break
    return 2 * size**3 / seconds


def memory_rate() -> float:
    """Bytes per second that are read and written, of a copy that fits no cache."""
    a, b = torch.ones(2, 2**28, dtype=torch.uint8)
    return 2 * 2**28 / statistics.median(timed(lambda: b.copy_(a)) for _ in range(7))


def run(row: str, name: str, threads: int, result: Path) -> None:
    """One contestant on one row, in this process."""
    from peers import Call, contestant

    shape, usual = ALL[row]
    case = contract.draw_case(shape, 1, 0, TABLE[name].stored if name in TABLE else "")
    g = torch.Generator().manual_seed(os.getpid())

    def draw() -> Call:
        tokens = usual - int(torch.randint(max(1, usual // 8), (), generator=g))
        x, grad = (torch.randn(tokens, shape.hidden_size, generator=g).bfloat16() for _ in "xg")
        index = torch.rand(tokens, shape.num_experts, generator=g).topk(shape.top_k).indices
        return Call(x, index, torch.rand(tokens, shape.top_k, generator=g), grad)

    rates = {"gemm": gemm_rate(), "gemm_fp32": gemm_rate(torch.float32), "memory": memory_rate()}
    peak, before = Peak(), Peak.now()
    start = time.perf_counter()
    one = contestant(name, case, threads)
    load = time.perf_counter() - start
    _check(one, case)
    found: list[dict[str, float]] = []
    began = time.perf_counter()
    while len(found) < WARM_UP + 3 or (time.perf_counter() - began < SECONDS and len(found) < 25):
        call = draw()
        operations = 12 * len(call.index) * shape.top_k * shape.hidden_size * shape.intermediate_size
        least = operations / max(rates["gemm"], rates["gemm_fp32"])
        times = {"roofline": least} | _step(one, call)
        if one.checkpointed:
            times["checkpointed"] = timed(lambda c=call: one.checkpointed(c))
        if one.forward_without_lora:
            times["forward_without_lora"] = timed(lambda c=call: one.forward_without_lora(c))
        if one.bare:
            times |= {f"bare_{key}": seconds for key, seconds in _step(one.bare, call).items()}
        found.append(times)
    result.write_text(json.dumps({"times": found[WARM_UP:], "load": load, "peak": peak.end() - before, **rates}))


def _step(one: Any, call: Any) -> dict[str, float]:
    time.sleep(REST)
    start = time.perf_counter()
    done = one.forward(call)
    middle = time.perf_counter()
    one.backward(done, call)
    return {"forward": middle - start, "both": time.perf_counter() - start}


def _check(one: Any, case: contract.Case) -> None:
    """The output is that of the specification: those of transformers without the LoRA, which starts at zero there."""
    from ktmoe_reference import experts_forward
    from peers import Call

    c = case
    call = Call(c.hidden_states.bfloat16(), c.top_k_index.clamp(min=0), c.top_k_weights, c.grad_output.bfloat16())
    lora = dict(c.lora.tensors) if one.forward_without_lora else None
    stacks = (c.weights.gate_proj, c.weights.up_proj, c.weights.down_proj)
    expected = experts_forward(call.hidden_states.float(), call.index, call.weights, *stacks, lora, c.lora.scaling)
    got = one.output(one.forward(call)).detach().float()
    error = float((got - expected).abs().mean() / expected.abs().mean())
    if not error < 0.05:
        raise SystemExit(f"computes something else: {error:.3f} of the output")


def compare(row: str, names: list[tuple[str, int]], rounds: int, folder: Path) -> list[dict[str, Any]]:
    """All contestants on one row, in turns. Returns what each measured, pooled over its rounds."""
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {name: [] for name in names}
    for turn in range(rounds):
        for name, threads in names if turn % 2 == 0 else names[::-1]:
            result = folder / "result.json"
            result.unlink(missing_ok=True)
            command = [sys.executable, __file__, "--run", row, name, str(threads), str(result)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"{row}, {name}: did not run: {''.join(done.stderr.strip().splitlines()[-1:])}", flush=True)
                continue
            runs[name, threads].append(json.loads(result.read_text()))
    shape, tokens = ALL[row]
    found = []
    for (name, threads), each in runs.items():
        if not each:
            continue
        times = [t for one in each for t in one["times"]]
        medians = {key: statistics.median(t[key] for t in times) for key in times[0]}
        medians["fraction"] = statistics.median(t["roofline"] / t["both"] for t in times)
        rates = {key: statistics.median(one[key] for one in each) for key in ("gemm", "gemm_fp32", "memory", "load")}
        found.append(
            {"row": row, "shape": asdict(shape), "tokens": tokens, "contestant": name, "threads": threads}
            | {"rates": rates, "load": rates.pop("load"), "peak_bytes": max(one["peak"] for one in each)}
            | {"repetitions": len(times), "seconds": medians}
        )
    return found


def contestants(wanted: list[str]) -> list[tuple[str, int]]:
    """Names and kernel threads; the kernel with one thread, on half of the cores, and on all."""
    found = []
    for name in wanted:
        if name not in KERNEL_BACKENDS:
            found.append((name, 0))
        elif kt.available():
            found += [(name, n) for n in sorted({1, max(1, usable_cores() // 2), usable_cores()})]
        else:
            print(f"{name} did not run: {kt.variant()}")
    return found


def main() -> None:
    """Parse the arguments, compare, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ALL))
    parser.add_argument("--sweeps", nargs="*", default=[], choices=list(SWEEPS))
    parser.add_argument("--contestants", nargs="+", default=["torch", "AMXBF16", "grouped_mm"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, help="a folder for layers.json and plots")
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        row, name, threads, result = arguments.run
        run(row, name, int(threads), Path(result))
        return
    names, rows = contestants(arguments.contestants), []
    wanted = {row: arguments.rounds for row in arguments.rows}
    wanted |= {row: 1 for sweep in arguments.sweeps for row, _ in SWEEPS[sweep]}
    with tempfile.TemporaryDirectory() as folder:
        for row, rounds in wanted.items():
            found = compare(row, names, rounds, Path(folder))
            show(found)
            rows += found
    if arguments.out:
        write(arguments.out, {"machine": machine(), "protocol": __doc__.strip(), "rows": rows})


if __name__ == "__main__":
    main()
