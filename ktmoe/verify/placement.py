"""`python -m ktmoe.verify.placement`: on which cores, NUMA nodes and huge pages the kernel really is.

One layer runs with 1, 2, 4 ... all usable threads in turn. What the system says of the process is shown beside it; a
thread outside of the affinity mask fails, memory of packed weights away from its node does too.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from ktmoe.backends import build, kt
from ktmoe.cgroups import text
from ktmoe.config import KTConfig
from ktmoe.cores import cores, in_words, numa_nodes, quota, running_threads, usable_cores
from ktmoe.gate import bf16_bytes, contract
from ktmoe.planning import plan
from ktmoe.shapes import SHAPES
from ktmoe.types import MoEShape
from ktmoe.verify import results, throughput, usage


_BACKEND, _SHAPE = "AMXBF16", "DeepSeek-V2-Lite"
_ELSEWHERE = 0.1  # of the layer: what torch allocates meanwhile may be on any node


def memory_by_node(maps: str) -> dict[int, int]:
    """Bytes of anonymous memory on each NUMA node.

    Args:
        maps: what Linux says in /proc/PID/numa_maps.
    """
    found: Counter[int] = Counter()
    for line in maps.splitlines():
        words = dict(word.partition("=")[::2] for word in line.split())
        if "anon" in words:
            size = 1024 * int(words.get("kernelpagesize_kB", "4"))
            found.update(
                {int(n[1:]): size * int(pages) for n, pages in words.items() if n[0] == "N" and n[1:].isdigit()}
            )
    return dict(found)


def huge_pages() -> int | None:
    """Bytes of this process's anonymous memory in huge pages; None where the system does not say."""
    lines = text(Path("/proc/self/smaps_rollup")).splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("AnonHugePages:")), None)


def counts(most: int, least: int) -> list[int]:
    """The least, twice as many ... and the most."""
    return sorted({min(least * 2**n, max(most, least)) for n in range(most.bit_length() + 1)})


def look(shape: MoEShape, tp: bool, tokens: int, rounds: int) -> dict[str, Any]:
    """Runs a layer with each number of threads, and looks at where it is.

    Args:
        shape: of the layer.
        tp: whether there is a pool for every NUMA node.
        tokens: of a call.
        rounds: timed calls for each number of threads.

    Returns:
        Plain JSON: seconds by number of threads, the last one's threads with their CPUs, what was added by node and
        in huge pages, problems.
    """
    case = contract.draw_case(shape, tokens, 0)
    decided = plan(KTConfig(kt_backend=_BACKEND, kt_tp_enabled=tp), shape)
    seconds: dict[int, float] = {}
    mine: list[tuple[str, set[int]]] = []
    before = _nodes()
    for threads in counts(usable_cores(nodes=decided.nodes), decided.tp):
        others = running_threads().keys()  # of pools of other sizes, which stay
        backend = build(replace(decided, threads=threads), case.weights, shape, case.lora.scaling)
        found = [sum(throughput.once(backend, case)) for _ in range(rounds + 1)][1:]
        seconds[threads] = statistics.median(found)
        new = {tid: named for tid, named in running_threads().items() if tid not in others}
        mine = [named for named in new.values() if named[0].startswith("numa_")] or mine
        backend.close()
    problems = usage.outside_of_the_mask()
    # The source's weights and libraries were there before, on whatever node.
    by_node = {node: max(0, size - before.get(node, 0)) for node, size in _nodes().items()}
    away = sum(size for node, size in by_node.items() if node not in decided.nodes)
    if away > _ELSEWHERE * bf16_bytes(shape):
        problems.append(
            f"{away / 1e9:.2f} GB of the layer are not on {in_words(decided.nodes)}, where its threads are"
        )
    return {
        "backend": _BACKEND,
        "nodes": list(decided.nodes),
        "seconds": seconds,
        "threads": [{"name": name, "cpus": sorted(cpus)} for name, cpus in mine],
        "by_node": by_node,
        "huge_pages": huge_pages(),
        "problems": problems,
    }


def _nodes() -> dict[int, int]:
    return memory_by_node(text(Path("/proc/self/numa_maps")))


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
        f"cores of this process: {len(cores())} physical, NUMA {in_words(numa_nodes())}, quota "
        f"{'none' if limit is None else f'{limit:g} CPUs'}; usable: {usable_cores()}",
        highlight=False,
    )
    torch.set_num_threads(1)  # what is timed is the kernel
    shape = contract.reduced(SHAPES[_SHAPE])
    pools = (False, True) if len(numa_nodes()) > 1 else (False,)
    found = [look(shape, tp, args.tokens, args.rounds) for tp in pools if kt.available()]
    if found:
        console.print(table(found, args.tokens))
    problems = [problem for run in found for problem in run["problems"]]
    data = {"variant": kt.variant(), "tokens": args.tokens, "runs": found}
    summary = "placement: every thread of the kernel is on cores of this process"
    return results.end(console, args, "placement", {run["backend"] for run in found}, problems, data, summary)


if __name__ == "__main__":
    raise SystemExit(main())
