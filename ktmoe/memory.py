"""Memory of this machine, or of the container or batch job that this process is in."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import psutil

from ktmoe.cgroups import ROOT, folders, text


_FILES = (  # of control groups, version 2 and 1
    ("memory.max", "memory.current"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
)


def available(root: Path = ROOT) -> int:
    """Bytes that this process can still have without swapping.

    Args:
        root: where `/proc` and `/sys` are.
    """
    return max(0, min([psutil.virtual_memory().available, *(most - used for most, used in _limits(root))]))


def total(root: Path = ROOT) -> int:
    """Bytes that there are, used or not.

    Args:
        root: where `/proc` and `/sys` are.
    """
    return min([psutil.virtual_memory().total, *(most for most, _ in _limits(root))])


def give_back() -> None:
    """Returns to the system what this process has freed, as far as its C library can (glibc's `malloc_trim`)."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """The limit of each control group that has one, and what counts against it."""
    for folder in folders("memory", root):
        for limit, usage in _FILES:
            try:
                most, used = int(text(folder / limit)), int(text(folder / usage))
            except ValueError:  # "max", or no such file
                continue
            stat = dict(line.split() for line in text(folder / "memory.stat").splitlines())
            # Pages of files are given back when asked for. v1 sums them up with the groups below under another name.
            inactive = stat.get("total_inactive_file", stat.get("inactive_file", 0))
            yield most, used - int(inactive)
