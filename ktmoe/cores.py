"""The CPU cores that are this process's own: affinity mask, cgroup quota, and one of each pair of hyper-threads.

A kernel thread waits by spinning, so one too many costs whole scheduler ticks, and one outside of the mask takes a
core that was given to somebody else.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from ktmoe.cgroups import ROOT, folders, text


def usable_cores(root: Path = ROOT, nodes: Iterable[int] | None = None) -> int:
    """Physical cores that the process may keep busy: those in its mask, no more than its quota, at least one.

    Args:
        root: where `/proc` and `/sys` are.
        nodes: count only those of these NUMA nodes.
    """
    limit = quota(root)
    near = None if nodes is None else sum(len(cores(root, node)) for node in set(nodes))
    found = near or len(cores(root))  # none near: the system does not say where its cores are
    return max(1, found if limit is None else min(found, int(limit)))


def cores(root: Path = ROOT, node: int | None = None, allowed: set[int] | None = None) -> list[list[int]]:
    """The physical cores in the process's mask, each with its hyper-threads in the mask.

    Args:
        root: where `/proc` and `/sys` are.
        node: only those of this NUMA node.
        allowed: the mask, where it is not to be that of the calling thread.
    """
    system = root / "sys/devices/system"
    near = None if node is None else _ids(system / f"node/node{node}/cpulist")
    found: dict[str, list[int]] = {}
    for cpu in sorted(mask() if allowed is None else allowed):
        if near is None or cpu in near:
            siblings = text(system / f"cpu/cpu{cpu}/topology/thread_siblings_list") or str(cpu)
            found.setdefault(siblings, []).append(cpu)
    return list(found.values())


def numa_nodes(root: Path = ROOT) -> list[int]:
    """Ids of the NUMA nodes that have cores in the process's mask, [0] where the system does not say.

    Those with most of its cores come first.
    """
    names = (root / "sys/devices/system/node").glob("node[0-9]*")
    found = sorted(int(n.name.removeprefix("node")) for n in names)
    own = {n: len(cores(root, n)) for n in found}
    return sorted((n for n in found if own[n]), key=lambda n: (-own[n], n)) or found[:1] or [0]


def shares(threads: int, own: Sequence[Sequence[int]]) -> list[set[int]]:
    """CPUs for each of some threads: cores of its own, all of them used; threads beyond the cores go round again.

    A thread that may choose among several cores finds a free one where another process is at work.

    Args:
        threads: how many.
        own: the cores, as `cores` gives them.
    """
    n = len(own)
    ends = [(t * n // threads, (t + 1) * n // threads) for t in range(threads)] if threads < n else []
    groups = [own[a:b] for a, b in ends] or [[own[t % n]] for t in range(threads)]
    return [{cpu for core in group for cpu in core} for group in groups]


def quota(root: Path = ROOT) -> float | None:
    """CPUs that the process's control groups (v1, v2) grant it over time, the least of all levels; None: no limit."""
    limits = [limit for folder in folders("cpu", root) if (limit := _limit(folder)) is not None]
    return min(limits, default=None)


def periods(root: Path = ROOT) -> list[tuple[int, int]]:
    """Time slices of each quota so far, and those in which it stopped the process."""
    found = []
    for folder in folders("cpu", root):
        stat = dict(line.split() for line in text(folder / "cpu.stat").splitlines() if len(line.split()) == 2)
        if "nr_periods" in stat:
            found.append((int(stat["nr_periods"]), int(stat["nr_throttled"])))
    return found


def _limit(folder: Path) -> float | None:
    allowed, _, period = text(folder / "cpu.max").partition(" ")
    if not allowed:
        allowed, period = text(folder / "cpu.cfs_quota_us"), text(folder / "cpu.cfs_period_us")
    try:
        return int(allowed) / int(period) if int(allowed) > 0 else None
    except (ValueError, ZeroDivisionError):  # "max", or no such file
        return None


def mask() -> set[int]:
    """CPUs that the calling thread may run on: those of the process, unless somebody has bound the thread."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def running_threads() -> dict[int, tuple[str, set[int]]]:
    """By system id, the name of every thread of this process and the CPUs that it may run on; none without /proc."""
    found = {}
    for task in Path("/proc/self/task").glob("*"):
        with suppress(OSError):  # it has ended
            name = (task / "comm").read_text().strip()
            found[int(task.name)] = name, os.sched_getaffinity(int(task.name))
    return found


def in_words(nodes: Sequence[int]) -> str:
    """Ids of NUMA nodes, as `nodes 0, 2`."""
    return f"node{'s' if len(nodes) > 1 else ''} {', '.join(map(str, nodes))}"


def _ids(path: Path) -> set[int]:
    """`0-3,8` as numbers."""
    spans = [span.partition("-") for span in text(path).split(",") if span]
    return {cpu for first, _, last in spans for cpu in range(int(first), int(last or first) + 1)}
