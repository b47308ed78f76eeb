"""Memory that is kept from call to call: fresh memory costs a page fault for every 4 KB, at every call."""

from __future__ import annotations

import math
import threading
from weakref import WeakSet

import torch
from torch import Tensor

from ktmoe import devices


_SHARE = 0.5  # of a device's memory that is free at first: what the activations of all layers may take together


class Space:
    """Bytes that hold one tensor at a time."""

    def __init__(self, size: int, device: torch.device) -> None:
        """Room for `size` bytes and up to an eighth more, so that calls of almost the same size share it."""
        step = max(4096, 1 << max(0, size.bit_length() - 4))
        self.bytes = torch.empty(-(-size // step) * step, dtype=torch.uint8, device=device)
        self.size = len(self.bytes)

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The bytes as a tensor, uninitialised."""
        return self.bytes[: nbytes(shape, dtype)].view(dtype).view(shape)


class Buffers:
    """Workspaces that all layers share, since one computes at a time, and activations that wait for a backward.

    A workspace grows to the largest that was asked for; calls come in chunks of bounded size. Everything is released
    when the last backend that uses it is closed or gone.
    """

    def __init__(self) -> None:
        """Empty."""
        self.lock = threading.RLock()  # held by who computes
        self._users: WeakSet[object] = WeakSet()
        self._workspaces: dict[tuple[str, torch.device], Space] = {}
        self._spare: list[Space] = []
        self._lent: WeakSet[Space] = WeakSet()
        self._limits: dict[torch.device, int] = {}

    def join(self, user: object) -> None:
        """`user` computes here until it leaves or is gone."""
        self._users.add(user)

    def leave(self, user: object) -> None:
        """The last one takes the memory with it."""
        with self.lock:
            self._users.discard(user)
            if not self._users:
                self._workspaces.clear()
                self._spare.clear()
                self._limits.clear()

    def workspace(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Uninitialised; valid until the same name is asked for again. Dtype and device as `like`."""
        size = nbytes(shape, like.dtype)
        space = self._workspaces.get((name, like.device))
        if space is None or space.size < size:
            self._workspaces[name, like.device] = space = Space(size, like.device)
        return space.tensor(shape, like.dtype)

    def borrow(self, size: int, device: torch.device) -> Space | None:
        """Room for activations of `size` bytes until `give_back`, or None where the memory does not allow it."""
        if device not in self._limits:
            self._limits[device] = int(_SHARE * devices.free(device))
        spare = sorted((s for s in self._spare if s.bytes.device == device), key=lambda s: s.size)
        space = next((s for s in spare if s.size >= size), None)
        if space is not None:
            self._spare.remove(space)
        else:
            if spare:  # replaced by the larger one, so that sizes that come and go do not add up
                self._spare.remove(spare[0])
            there = [s.size for s in (*self._spare, *self._lent) if s.bytes.device == device]
            if size + sum(there) > self._limits[device]:
                return None
            space = Space(size, device)
        self._lent.add(space)
        return space

    def give_back(self, space: Space) -> None:
        """What was borrowed. Nobody may use its tensors any more."""
        self._lent.discard(space)
        self._spare.append(space)


def nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of a contiguous tensor."""
    return math.prod(shape) * dtype.itemsize


BUFFERS = Buffers()
