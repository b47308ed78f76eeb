"""Host memory that packed weights are read into on their way from disk into the kernel's own buffers."""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from ktmoe.backends.kt.packed import PackedLayer
from ktmoe.types import PROJECTIONS


_READERS = 8  # threads that read and hash


class Staging:
    """One layer's packed bytes at addresses that never change.

    A kernel object keeps the addresses that it was built with and reads them again when it is reloaded, so all objects
    for layers of one size share this memory. Its pages exist only while a layer is loaded.
    """

    def __init__(self, num_experts: int, parts: int, size: int) -> None:
        """Reserves addresses.

        Args:
            num_experts: E.
            parts: of tensor parallelism.
            size: bytes of a layer.
        """
        self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._shape = num_experts, parts

    def pointers(self, layer: PackedLayer) -> dict[str, list[list[int]]]:
        """Addresses by the names of the kernel's settings, for each part and expert."""
        experts, parts = self._shape
        names = [f"{p.removesuffix('_proj')}_{kind}" for p in PROJECTIONS for kind in ("projs", "scales")]
        found = {name: [[0] * experts for _ in range(parts)] for name in names}
        at = self._base
        for file in layer.files():
            found[f"{file.projection}_{'projs' if file.kind == 'quant' else 'scales'}"][file.part][file.expert] = at
            at += file.size
        return found

    @contextmanager
    def holding(self, layer: PackedLayer) -> Iterator[None]:
        """Has the layer's files in memory, each checked against its hash. The caller holds the host's lock.

        Raises:
            KTError: a file that is not what was packed.
        """
        hashes, at, jobs = layer.hashes(), 0, []
        try:
            with memoryview(self._memory) as memory, ThreadPoolExecutor(_READERS) as readers:
                for file in layer.files():
                    into = memory[at : at + file.size]
                    jobs.append(readers.submit(layer.read, file, into, hashes[file.name]))
                    at += file.size
                for job in jobs:
                    job.result()
            yield
        finally:
            self._memory.madvise(mmap.MADV_DONTNEED)


@functools.cache
def staging(num_experts: int, hidden_size: int, intermediate_size: int, parts: int, size: int) -> Staging:
    """The staging memory of all layers of these sizes."""
    return Staging(num_experts, parts, size)
