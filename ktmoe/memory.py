"""Memory of this machine, or of the container that this process is in."""

from __future__ import annotations

from pathlib import Path

import psutil


_CGROUP = Path("/sys/fs/cgroup")
_FILES = (  # of control groups, version 2 and 1
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)


def available() -> int:
    """Bytes that this process can still have without swapping."""
    limit = _limit()
    free = psutil.virtual_memory().available
    return free if limit is None else max(0, min(free, limit[1]))


def total() -> int:
    """Bytes that there are, used or not."""
    limit = _limit()
    most = psutil.virtual_memory().total
    return most if limit is None else min(most, limit[0])


def _limit() -> tuple[int, int] | None:
    """The container's limit and what is left of it, if it has one."""
    for limit, usage, stat in _FILES:
        try:
            most, used = int((_CGROUP / limit).read_text()), int((_CGROUP / usage).read_text())
            cached = dict(line.split() for line in (_CGROUP / stat).read_text().splitlines())
        except (OSError, ValueError):  # no such hierarchy, or "max"
            continue
        return most, most - used + int(cached.get("inactive_file", 0))  # files' pages are given back when asked for
    return None
