"""What the process uses, measured so that a leak of a few bytes per step shows within a minute."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from ktmoe import memory
from ktmoe.cores import running_threads


_THP_DISABLE = 41  # PR_SET_THP_DISABLE


def measure(process: psutil.Process) -> tuple[int, int, int, int, int]:
    """RSS, USS and private memory in bytes, threads, file descriptors.

    Private memory is anonymous pages, swapped out or not. It is what can be judged beside RSS: USS also counts a
    library's pages for as long as no other process uses the library, and so moved by 70 MiB when another Python ended.

    Args:
        process: this one.
    """
    gc.collect()
    memory.give_back()  # else a leak fills up freed memory first, 15 MiB in this run, and does not show for minutes
    threads, descriptors = process.num_threads(), process.num_fds() if hasattr(process, "num_fds") else 0
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    except OSError:  # no Linux
        full = process.memory_full_info()
        return full.rss, full.uss, full.uss, threads, descriptors
    kib = {name: int(value.split()[0]) for name, value in (line.split(":") for line in lines)}
    parts = (("Rss",), ("Private_Clean", "Private_Dirty", "Private_Hugetlb"), ("Anonymous", "Swap"))
    rss, uss, private = (1024 * sum(kib[name] for name in names) for names in parts)
    return rss, uss, private, threads, descriptors


def outside_of_the_mask() -> list[str]:
    """Threads that may run where the main one may not, as sentences."""
    there = running_threads()
    _, mask = there.get(os.getpid(), ("", set[int]()))  # none where the system does not say
    return [
        f"{name} may run on CPU {', '.join(map(str, sorted(cpus - mask)))}, outside of the process's mask"
        for name, cpus in there.values()
        if cpus - mask
    ]


@contextmanager
def steady() -> Iterator[None]:
    """Takes away what would move memory by itself or make measuring slow."""
    gc.collect()
    gc.freeze()  # a million objects of the imports need not be looked at before every sample
    prctl = getattr(ctypes.CDLL(None), "prctl", lambda *_: 0)
    prctl(_THP_DISABLE, 1, 0, 0, 0)  # the system would merge pages to huge ones whenever it finds the time
    try:
        yield
    finally:
        prctl(_THP_DISABLE, 0, 0, 0, 0)
        gc.unfreeze()
