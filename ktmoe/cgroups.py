"""Control groups that this process is in, v1 and v2: the folders in which a container's or a job's limits stand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


ROOT = Path("/")


def folders(controller: str, root: Path = ROOT) -> Iterator[Path]:
    """Folders that may hold a limit, of all levels: a pod's or a batch job's stands above the process's own.

    A container sees its own group as the mount's top, whatever its path says.

    Args:
        controller: cpu or memory.
        root: where `/proc` and `/sys` are.
    """
    for line in text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        tops = (controllers, controller) if controllers else (".", "unified")
        for top in dict.fromkeys(root / "sys/fs/cgroup" / name for name in tops):
            inner = Path(path.strip("/"))
            levels = [] if ".." in inner.parts else [inner, *inner.parents]
            yield from dict.fromkeys([top, *(top / level for level in levels)])


def text(path: Path) -> str:
    """A small file of the system's, "" where there is none."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
