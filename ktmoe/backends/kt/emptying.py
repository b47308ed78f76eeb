"""Memory of packed weights that no layer uses any more, given back: kt_kernel itself never does (K22).

An object is loaded with zeros. A page that held something before, and holds nothing but zeros afterwards, is one of
its buffers', or somebody else has cleared it. Linux may take either, since private memory that it took reads as zeros
until it is written again (MADV_DONTNEED). The object stays what it is, and can be loaded again.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import suppress

import torch
from torch import Tensor

from ktmoe.backends.kt.extension import Host
from ktmoe.notices import say_once


_WORTH_IT = 64 * 2**20  # bytes of packed weights; looking at every page of the process takes 0.2 s a GB
_CHUNK = 4096  # pages looked at together
_LEAST = 16  # pages in a row: what kt_kernel allocates is larger, and most of what others have is smaller
_libc = ctypes.CDLL(None)


def idle_bytes() -> int:
    """Of packed weights that belong to no layer: the next layer has their memory, whatever it is."""
    return sum(made.nbytes for made in Host.all_idle() if not made.empty)


def make_room() -> None:
    """Gives the memory of all objects that belong to no layer back to the system. The caller holds the host's lock."""
    if (stays := sum(made.nbytes for made in Host.all_condemned())) >= _WORTH_IT:
        say_once(
            f"ktmoe: {stays / 1e9:.3g} GB of packed experts of an earlier model stay in memory: what AMXInt8 made "
            "with kt_share_backward: off cannot be given back. Write kt_share_backward: on, or take a process each."
        )
    if idle_bytes() < _WORTH_IT:
        return
    idle = [made for made in Host.all_idle() if not made.empty]
    with suppress(OSError), _Memory() as memory:  # where /proc is closed, it stays
        held = list(_rows(memory))
        for made in idle:
            made.clear()
        for start, count in held:
            _release_zeros(memory, start, count)


class _Memory:
    """This process's memory as files, which report a page that is gone instead of ending the process."""

    def __enter__(self) -> _Memory:
        self.bytes = os.open("/proc/self/mem", os.O_RDONLY)
        self.pages = os.open("/proc/self/pagemap", os.O_RDONLY)
        self._buffer = bytearray(_CHUNK * mmap.PAGESIZE)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.bytes)
        os.close(self.pages)

    def present(self, start: int, count: int) -> Tensor:
        """[count] bool: which pages are in memory."""
        found = os.pread(self.pages, 8 * count, 8 * start)
        return torch.frombuffer(bytearray(found), dtype=torch.int64) < 0  # the highest bit: present

    def written(self, start: int, count: int) -> Tensor:
        """[count] bool: which pages hold anything but zeros."""
        with memoryview(self._buffer)[: count * mmap.PAGESIZE] as into:
            if os.preadv(self.bytes, [into], start * mmap.PAGESIZE) != len(into):
                raise OSError("pages that are gone")
        words = torch.frombuffer(self._buffer, dtype=torch.int64, count=count * mmap.PAGESIZE // 8)
        return words.view(count, -1).any(-1)


def _rows(memory: _Memory) -> Iterator[tuple[int, int]]:
    """Rows of pages of private memory that are there and hold something: the number of the first, and how many."""
    with open("/proc/self/maps") as maps:
        lines = maps.read().splitlines()
    for line in lines:
        addresses, rights, _, _, inode, *name = line.split(maxsplit=5)
        if rights != "rw-p" or inode != "0" or (name and not name[0].startswith(("[heap]", "[anon"))):
            continue
        start, end = (int(address, 16) // mmap.PAGESIZE for address in addresses.split("-"))
        for at in range(start, end, _CHUNK):
            with suppress(OSError):
                for first, count in _runs(memory.present(at, min(_CHUNK, end - at)), at):
                    yield from _runs(memory.written(first, count), first)


def _release_zeros(memory: _Memory, start: int, count: int) -> None:
    for at in range(start, start + count, _CHUNK):
        with suppress(OSError):
            for first, some in _runs(~memory.written(at, min(_CHUNK, start + count - at)), at):
                address = ctypes.c_void_p(first * mmap.PAGESIZE)
                _libc.madvise(address, ctypes.c_size_t(some * mmap.PAGESIZE), mmap.MADV_DONTNEED)


def _runs(flags: Tensor, offset: int) -> Iterator[tuple[int, int]]:
    """Where flags are set for `_LEAST` and more in a row: first, counted from `offset`, and how many."""
    padded = torch.nn.functional.pad(flags.to(torch.int8), (1, 1))
    change = padded.diff()
    firsts, ends = (change == 1).nonzero().squeeze(-1), (change == -1).nonzero().squeeze(-1)
    for first, end in zip(firsts.tolist(), ends.tolist(), strict=True):
        if end - first >= _LEAST:
            yield offset + first, end - first
