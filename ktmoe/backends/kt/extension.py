"""kt_kernel's compiled extension: finding it, its threads, its printing. The only module that imports kt_kernel."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

from ktmoe.backends.kt import resting
from ktmoe.backends.kt.formats import FORMATS
from ktmoe.cores import cores, numa_nodes, running_threads, shares
from ktmoe.types import KTError


def version() -> str:
    """The installed kt-kernel's, "" without one."""
    try:
        return importlib.metadata.version("kt-kernel")
    except importlib.metadata.PackageNotFoundError:
        return ""


# K29: a task's arguments are a C++ object of some 100 bytes that the extension makes for every task and never frees.
# Only the version that this was measured on: were they freed in another one, freeing them twice would crash.
_TASKS_LEAK = version() == "0.7.2"
_free = ctypes.CDLL(None).free
_free.argtypes, _free.restype = [ctypes.c_void_p], None
_CLASSES = tuple(f.extension_class for f in FORMATS.values())
_FORCED = "KT_KERNEL_CPU_VARIANT"  # kt_kernel's own variable; without it, it looks at the CPU


@functools.cache
def _extension() -> tuple[Any, str]:
    """The extension module and its CPU variant, or None and the reason why there is none."""
    forced = os.environ.get(_FORCED)
    if forced and _crashes():
        return None, f"{_FORCED} is {forced}, and this CPU cannot run that variant of kt_kernel (unset {_FORCED})"
    try:
        with quiet():
            import kt_kernel
        extension = kt_kernel.kt_kernel_ext
        variant = str(kt_kernel.__cpu_variant__)
    except Exception as error:  # a wheel for another CPU or libc fails in many ways: all mean "not here"
        return None, f"kt_kernel cannot be imported ({type(error).__name__}: {error})"
    if not any(hasattr(extension.moe, name) for name in _CLASSES):
        return None, _lacks(variant, "SFT operators")
    return extension, variant


def _lacks(variant: str, what: str) -> str:
    return f"kt_kernel's {variant} variant, the one for this CPU, has no {what}"


def _crashes() -> bool:
    """Whether importing kt_kernel ends the process: a variant for another CPU stops at its first instruction."""
    return subprocess.run([sys.executable, "-c", "import kt_kernel"], capture_output=True).returncode < 0


def available() -> bool:
    """Whether this CPU and this installation have SFT classes."""
    return _extension()[0] is not None


def why_not(kind: str) -> str:
    """Why this CPU or this installation cannot compute with a format, "" if it can."""
    extension, variant = _extension()
    if extension is None:
        return f"no SFT kernel on this host: {variant}"
    name = FORMATS[kind].extension_class
    return "" if hasattr(extension.moe, name) else _lacks(variant, name)


def variant() -> str:
    """The CPU variant of the extension (`amx`, `avx512_bf16`), or why there is none."""
    return _extension()[1]


def extension_path() -> Path | None:
    """The extension's file, whose hash a gate certificate names."""
    extension = _extension()[0]
    return Path(extension.__file__) if extension else None


class Host:
    """Pools of kernel threads, made once for each number of threads and parts, and their nodes. One task at a time.

    Attributes:
        lock: held while a task runs, whatever the pool: scratch memory and the shared backward buffer belong to the
            process, so the extension takes one caller at a time (K26).
        idle: kernel objects whose layer is gone, by what they were built for. Destroying one would leak its packed
            weights (K22), so the next layer that is built alike takes it.
        condemned: kernel objects that failed a check, or cannot be loaded again. They are never used again.
    """

    lock: ClassVar[Any] = threading.RLock()
    _hosts: ClassVar[dict[tuple[int, int, tuple[int, ...]], Host]] = {}

    def __init__(self, threads: int, tp: int, nodes: Sequence[int]) -> None:
        """Starts the threads.

        Args:
            threads: of all pools together.
            tp: pools, one per part of the intermediate dimension.
            nodes: ids of the NUMA nodes that the pools are on, in turn.

        Raises:
            KTError: this host has no SFT classes.
        """
        self.extension, why = _extension()
        if self.extension is None:
            raise KTError(f"kt_backend: {why}. Use kt_backend: torch or auto.")
        pool = self.extension.WorkerPoolConfig()
        pool.subpool_count = tp
        pool.subpool_numa_map = [nodes[t % len(nodes)] for t in range(tp)]
        pool.subpool_thread_count = [max(1, threads // tp + (t < threads % tp)) for t in range(tp)]
        self.tp, self.threads, self.nodes = tp, threads, nodes
        self.pid = os.getpid()
        self.idle: defaultdict[Hashable, list[Any]] = defaultdict(list)
        self.condemned: list[Any] = []
        others = running_threads().keys()
        with quiet():
            self.infer = self.extension.CPUInfer(pool)
        self._tids = running_threads().keys() - others
        self._settled = False
        self._workers: list[int] = []  # of `_tids`, which may hold a thread that somebody else started at that time
        self._cpus: dict[int, set[int]] = {}  # of each worker
        self._bind()
        # Never destroyed: its destructor prints to stdout at interpreter exit, when nobody can redirect it any more.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.infer))

    @classmethod
    def get(cls, threads: int, tp: int, nodes: Sequence[int] = ()) -> Host:
        """This process's pools; a forked child does not have its parent's threads and gets its own.

        Args:
            threads: of all pools together.
            tp: pools.
            nodes: ids of the NUMA nodes that they are on, in turn; by default those of the process's mask.
        """
        with cls.lock:
            about = threads, tp, tuple(nodes or numa_nodes())
            host = cls._hosts.get(about)
            if host is None or host.pid != os.getpid():
                host = cls._hosts[about] = cls(*about)
            return host

    @classmethod
    def all_idle(cls) -> list[Any]:
        """The idle objects of every pool of this process."""
        return [made for host in cls._own() for idle in host.idle.values() for made in idle]

    @classmethod
    def all_condemned(cls) -> list[Any]:
        """The condemned objects of every pool of this process."""
        return [made for host in cls._own() for made in host.condemned]

    @classmethod
    def _own(cls) -> list[Host]:
        return [host for host in cls._hosts.values() if host.pid == os.getpid()]

    @classmethod
    def _forked(cls) -> None:
        cls.lock = threading.RLock()  # another thread of the parent may have held it

    def run(self, task: tuple[int, int]) -> None:
        """Runs one task to its end. The caller holds `lock`."""
        with self.awake():
            try:
                self.infer.submit(task)
            finally:  # also after Ctrl-C in between: the task's tensors must outlive it
                self.infer.sync()
                if _TASKS_LEAK:
                    _free(task[1])
        if not self._settled:  # a thread binds itself when it first runs: after a task each of them has
            self._settled = True
            self._bind()

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Around every call of the extension: some of them, constructors too, have the threads work. Holds `lock`."""
        resting.wake()
        try:
            yield
        finally:
            resting.rest(self._workers)

    def _bind(self, allowed: set[int] | None = None) -> None:
        """Gives each thread cores of its own in the process's mask: the extension counts from core 0, whatever it is.

        Its threads are called `numa_{node}_{m|t}_{number}`, and its queue's thread has the mask already.
        """
        by_node: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
        there = running_threads().items()
        named = {tid: name for tid, (name, _) in there if tid in self._tids and name.startswith("numa_")}
        self._workers = list(named)
        for tid, name in named.items():
            node, number = name.split("_")[1::2]
            by_node[int(node)].append((int(number), tid))
        for at, numbered in by_node.items():
            own = cores(node=at, allowed=allowed) or cores(allowed=allowed)
            for (_, tid), cpus in zip(sorted(numbered), shares(len(numbered), own), strict=True):
                self._cpus[tid] = cpus
                _bind_thread(tid, cpus)


def bind_again(allowed: set[int] | None = None) -> int:
    """Puts the threads of all pools back on their cores. Returns how many were elsewhere.

    Args:
        allowed: the CPUs that there are now, where they have changed: they get others then.
    """
    with Host.lock:
        settled = [host for host in Host._own() if host._settled]
        for host in settled if allowed is not None else ():
            host._bind(allowed)
        return sum(_bind_thread(tid, cpus) for host in settled for tid, cpus in host._cpus.items())


def _bind_thread(tid: int, cpus: set[int]) -> bool:
    """Whether the thread was elsewhere."""
    with suppress(OSError):  # it is gone, or the mask was narrowed in between
        if (before := os.sched_getaffinity(tid)) != cpus:
            os.sched_setaffinity(tid, cpus)
            return os.sched_getaffinity(tid) != before  # a cpuset may leave it fewer than were asked for
    return False


os.register_at_fork(after_in_child=Host._forked)


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps the extension's own printing off the user's stdout: it writes to file descriptor 1 from C++."""
    libc = ctypes.CDLL(None)
    with Host.lock:  # two at once would leave /dev/null behind
        with suppress(AttributeError, ValueError):  # started without stdout, or closed since
            sys.stdout.flush()
        libc.fflush(None)
        try:
            saved = os.dup(1)
        except OSError:  # no stdout at all: nothing to keep clean
            yield
            return
        devnull = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(devnull, 1)
            yield
        finally:
            libc.fflush(None)
            os.dup2(saved, 1)
            os.close(saved)
            os.close(devnull)
