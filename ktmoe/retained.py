"""Retained forwards: what a backend still holds the activations of is not computed a second time.

Gradient checkpointing runs every layer's forward once more in the backward pass. The backend's object still holds the
activations of the first one, unless another call of the same layer came between. If the recompute brings the same
bits, the first forward's output and ticket answer it.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from ktmoe_reference import LORA_NAMES
from torch import Tensor

from ktmoe import recording
from ktmoe.drift import WATCH
from ktmoe.interface import Backend
from ktmoe.memory import available, total
from ktmoe.notices import say_once
from ktmoe.types import Gradients, Inputs, Lora, MoEShape


_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes, _memcmp.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t], ctypes.c_int
_LOOK = 0.25  # seconds
_looked = -1.0, 0  # when, and what was free then
_RESERVE = 0.1  # of the memory: what `auto` leaves free for everything else


@dataclass
class _Forward:
    """One saving forward whose activations the backend may still hold."""

    hidden_states: Tensor  # [T, H]
    top_k_index: Tensor  # [T, K]
    top_k_weights: Tensor  # [T, K]
    rank: int  # 0 without LoRA; the LoRA's values are in `RetainedForwards._lora`
    scaling: float
    output: Tensor  # [T, H]
    ticket: int
    alone: bool  # no other forward is waiting for its backward


class RetainedForwards(Backend):
    """A backend that answers a repeated saving forward from the one before.

    The rule, the same for every backend: hidden states, index, routing weights, LoRA and its scale are bit for bit
    those of the last forward, which saved, and the backend still holds what it saved. Values are compared, since
    fused optimizers and writes to `.data` leave no other trace. Any other call ends what was kept.
    """

    def __init__(self, backend: Backend, mode: str) -> None:
        """Wraps a loaded backend.

        Args:
            backend: computes.
            mode: `kt_cpu_activation`: auto (keep while memory is there), retain, or recompute (keep nothing).
        """
        self.backend, self.mode = backend, mode
        self.name, self.shape, self.compute_dtype = backend.name, backend.shape, backend.compute_dtype
        self.threads = backend.threads
        self.int8, self.distance = backend.int8, backend.distance
        self.reloaded, self.scaling = backend.reloaded, getattr(backend, "scaling", 1.0)
        self.bets = mode != "recompute"
        self._kept: _Forward | None = None
        self._lora: list[Tensor] = []
        self._waiting = 0  # forwards since the last backward
        self._reserve = _RESERVE * total()
        self._lock = threading.RLock()  # a record and the call that it is of belong together

    def forward(self, inputs: Inputs, *, save: bool) -> tuple[Tensor, int]:
        """See `Backend.forward`."""
        start = time.perf_counter()
        with self._lock:
            kept, self._kept = self._kept, None
            if save and kept is not None and self.backend.holds(kept.ticket):
                if self._same(kept, inputs):
                    self._kept = kept
                    recording.forwarded(start, self.backend.rows(inputs), self.shape, computed=False)
                    return kept.output.clone(), kept.ticket  # the caller may write into its own
                _announce_other_routing(kept, inputs)
            self._waiting += save
            out, ticket = self.backend.forward(inputs, save=save)
            if save and self._room(inputs):
                self._keep(inputs, out, ticket)
            recording.forwarded(start, self.backend.rows(inputs), self.shape, computed=True)
            return out, ticket

    def backward(self, ticket: int, inputs: Inputs, grad_output: Tensor) -> Gradients:
        """See `Backend.backward`."""
        start = time.perf_counter()
        with self._lock:
            self._kept, self._waiting = None, 0
            WATCH.look()
            grads = self.backend.backward(ticket, inputs, grad_output)
            recording.trained(start, id(self), inputs, self.backend.rows(inputs), self.shape)
            return grads

    def holds(self, ticket: int) -> bool:
        """See `Backend.holds`."""
        return self.backend.holds(ticket)

    def close(self) -> None:
        """See `Backend.close`."""
        with self._lock:
            self._kept, self._lora = None, []
            self.backend.close()

    def condemn(self) -> None:
        """See `Backend.condemn`."""
        self.backend.condemn()

    def _same(self, kept: _Forward, inputs: Inputs) -> bool:
        mine = (kept.hidden_states, kept.top_k_index, kept.top_k_weights)
        theirs = (inputs.hidden_states, inputs.top_k_index, inputs.top_k_weights)
        return all(map(same_bits, mine, theirs)) and self._same_lora(kept, inputs.lora)

    def _same_lora(self, kept: _Forward, lora: Lora | None) -> bool:
        if lora is None:
            return kept.rank == 0
        same = (kept.rank, kept.scaling) == (lora.rank, lora.scaling)
        return same and all(map(same_bits, self._lora, lora))

    def _keep(self, inputs: Inputs, out: Tensor, ticket: int) -> None:
        lora = inputs.lora
        old: Sequence[Tensor | None] = self._lora or [None] * len(LORA_NAMES)
        self._lora = [_copy(t, into) for t, into in zip(lora, old, strict=True)] if lora else []
        self._kept = _Forward(
            # The index was made for this call; the others may be the caller's own, to be written to.
            hidden_states=inputs.hidden_states.clone(),
            top_k_index=inputs.top_k_index,
            top_k_weights=inputs.top_k_weights.clone(),
            rank=lora.rank if lora else 0,
            scaling=lora.scaling if lora else 1.0,
            output=out.clone(),
            ticket=ticket,
            alone=self._waiting == 1,
        )

    def _room(self, inputs: Inputs) -> bool:
        if self.mode == "recompute":
            return False
        needed = bytes_per_token(self.shape, self.compute_dtype) * inputs.hidden_states.shape[0]
        return self.mode == "retain" or needed < _free() - self._reserve


def _free() -> int:
    """Memory, looked at a few times a second: reading the limits of all control groups takes half a millisecond."""
    global _looked
    when, size = _looked
    if time.monotonic() - when > _LOOK:
        size = available()
        _looked = time.monotonic(), size
    return size


def bytes_per_token(shape: MoEShape, dtype: torch.dtype) -> int:
    """Bytes that one layer keeps of one token, from its forward to its backward."""
    return 2 * shape.hidden_size * dtype.itemsize + shape.top_k * (8 + 4)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same to the bit: NaN is itself, and zero is not minus zero."""
    if a.shape != b.shape or a.dtype != b.dtype or b.device.type != "cpu":
        return False
    if not (a.is_contiguous() and b.is_contiguous() and a.is_neg() == b.is_neg()):
        a, b = a.resolve_neg().contiguous(), b.resolve_neg().contiguous()
    return _memcmp(a.data_ptr(), b.data_ptr(), a.nbytes) == 0


def _copy(tensor: Tensor, into: Tensor | None) -> Tensor:
    tensor = tensor.detach()
    if into is None or into.shape != tensor.shape or into.dtype != tensor.dtype:
        return tensor.to("cpu", copy=True, memory_format=torch.contiguous_format).resolve_neg()
    return into.copy_(tensor)


def _announce_other_routing(kept: _Forward, inputs: Inputs) -> None:
    """Says once that a recompute chose other experts than its first pass.

    A forward in the backward pass, as long as the only one that waits for its backward: it is that one's recompute.
    """
    if not kept.alone or torch._C._current_graph_task_id() == -1:
        return
    before, now = kept.top_k_index, inputs.top_k_index
    if before.shape == now.shape and not same_bits(before, now):
        say_once(
            "ktmoe: gradient checkpointing's recompute sent tokens to other experts than the first pass did, so the "
            "gradient is not that of the loss. Dropout and router noise must be the same in both passes: keep "
            "preserve_rng_state, or switch gradient checkpointing off."
        )
