"""`python -m ktmoe.verify.placement`: on which cores, NUMA nodes and huge pages the kernel really is.

One layer runs with 1, 2, 4 ... all usable threads in turn. What the system says of the process is shown beside it; a
thread outside of the affinity mask fails, memory of packed weights away from its node does too.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from ktmoe.backends import KERNEL_BACKENDS, build, kt
from ktmoe.config import KTConfig
from ktmoe.cores import cores, numa_nodes, quota, usable_cores
from ktmoe.gate import contract
from ktmoe.planning import plan
from ktmoe.shapes import SHAPES
from ktmoe.types import MoEShape
from ktmoe.verify import results, throughput, usage


_SHAPE = "DeepSeek-V2-Lite"
_ELSEWHERE = 0.1  # of the packed weights: libraries and Python's own memory are on any node


def memory_by_node(text: str) -> dict[int, int]:
    """Bytes of anonymous memory on each NUMA node.

    Args:
        text: what Linux says in /proc/PID/numa_maps.
    """
    found: Counter[int] = Counter()
    for line in text.splitlines():
        words = dict(word.partition("=")[::2] for word in line.split())
        if "anon" in words:
            size = 1024 * int(words.get("kernelpagesize_kB", "4"))
            found.update(
                {int(n[1:]): size * int(pages) for n, pages in words.items() if n[0] == "N" and n[1:].isdigit()}
            )
    return dict(found)


def huge_pages() -> int | None:
    """Bytes of this process's anonymous memory in huge pages; None where the system does not say."""
    with suppress(OSError):
        for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
            if line.startswith("AnonHugePages:"):
                return 1024 * int(line.split()[1])
    return None


def counts(most: int) -> list[int]:
    """1, 2, 4 ... and the most."""
    return sorted({min(2**n, most) for n in range(most.bit_length() + 1)})


def look(name: str, shape: MoEShape, tp: bool, tokens: int, rounds: int) -> dict[str, Any]:
    """Runs a layer with each number of threads, and looks at where it is.

    Args:
        name: of the backend.
        shape: of the layer.
        tp: whether there is a pool for every NUMA node.
        tokens: of a call.
        rounds: timed calls for each number of threads.

    Returns:
        Plain JSON: seconds by number of threads, threads with their CPUs, bytes by node and in huge pages, problems.
    """
    torch.set_num_threads(1)
    case = contract.draw_case(shape, tokens, 0)
    decided = plan(KTConfig(kt_backend=name, kt_tp_enabled=tp), shape)
    most = usable_cores(nodes=decided.nodes)
    seconds: dict[int, float] = {}
    for threads in counts(most):
        if threads < decided.tp:
            continue
        backend = build(replace(decided, threads=threads), case.weights, shape, case.lora.scaling)
        found = [sum(throughput.once(backend, case)) for _ in range(rounds + 1)][1:]
        seconds[threads] = statistics.median(found)
        mine = [(thread, cpus) for thread, cpus in usage.threads() if thread.startswith("numa_")]
        backend.close()
    problems = [f"{name}: {problem}" for problem in usage.outside_of_the_mask()]
    by_node: dict[int, int] = {}
    with suppress(OSError):
        by_node = memory_by_node(Path("/proc/self/numa_maps").read_text())
    away = sum(size for node, size in by_node.items() if node not in decided.nodes)
    packed = 6 * shape.num_experts * shape.hidden_size * shape.intermediate_size
    if len(by_node) > 1 and away > _ELSEWHERE * packed:
        problems.append(f"{name}: {away / 1e9:.2f} GB are on other NUMA nodes than {list(decided.nodes)}")
    return {
        "backend": name,
        "nodes": list(decided.nodes),
        "seconds": seconds,
        "threads": [{"name": thread, "cpus": sorted(cpus)} for thread, cpus in mine],
        "by_node": by_node,
        "huge_pages": huge_pages(),
        "problems": problems,
    }


def table(found: list[dict[str, Any]], tokens: int) -> Table:
    """Times by number of threads, and what was used."""
    out = Table(title=f"{_SHAPE}, {tokens} tokens, forward and backward; threads of the kernel: ms")
    for column in ("backend", "threads: ms", "nodes", "CPUs of the kernel's threads", "huge pages"):
        out.add_column(column)
    for run in found:
        times = ", ".join(f"{n}: {1e3 * s:.0f}" for n, s in run["seconds"].items())
        cpus = ", ".join(dict.fromkeys("+".join(map(str, t["cpus"])) for t in run["threads"]))
        huge = "not known" if run["huge_pages"] is None else f"{run['huge_pages'] / 1e9:.2f} GB"
        out.add_row(run["backend"], times, ", ".join(map(str, run["nodes"])), cpus, huge)
    return out


def main(argv: list[str] | None = None) -> int:
    """Runs all, prints a table, and returns 0 only if every thread was where it belongs."""
    parser = argparse.ArgumentParser(prog="ktmoe.verify.placement", description=__doc__)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    results.add_arguments(parser)
    args = parser.parse_args(argv)
    console = results.console()
    limit = quota()
    console.print(
        f"cores of this process: {len(cores())} physical, NUMA nodes {', '.join(map(str, numa_nodes()))}, quota "
        f"{'none' if limit is None else f'{limit:g} CPUs'}; usable: {usable_cores()}",
        highlight=False,
    )
    shape = contract.reduced(SHAPES[_SHAPE])
    names = [n for n in KERNEL_BACKENDS if kt.available() and n in ("AMXBF16",)]
    several = len(numa_nodes()) > 1
    found = [
        look(name, shape, tp, args.tokens, args.rounds)
        for name in names
        for tp in ((False, True) if several else (False,))
    ]
    if found:
        console.print(table(found, args.tokens))
    problems = [problem for run in found for problem in run["problems"]]
    data = {"variant": kt.variant(), "tokens": args.tokens, "runs": found}
    summary = "placement: every thread of the kernel is on cores of this process"
    return results.end(console, args, "placement", {run["backend"] for run in found}, problems, data, summary)


if __name__ == "__main__":
    raise SystemExit(main())
