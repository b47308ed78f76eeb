"""The CPU's backend and torch's on the device, each with its own experts, behind the interface of one backend."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count

import torch
from torch import Tensor

from ktmoe.backends import TorchBackend
from ktmoe.interface import STATELESS, Backend
from ktmoe.types import PROJECTIONS, ExpertWeights, Gradients, Inputs, Lora, MoEShape, Stack


_TICKETS = count(STATELESS + 1)
_TURN = threading.RLock()  # of whose LoRA is in `_copies`


@functools.lru_cache(maxsize=24)  # both parts' six, of layers of two sizes
def _copies(part: str, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory for one part's LoRA, the same for all layers: fresh memory costs a page fault for every 4 KB."""
    return torch.empty(shape, dtype=dtype)


class _Part:
    """A backend, and which experts of the layer it has."""

    def __init__(self, name: str, backend: Backend, experts: Sequence[int], of: int, device: torch.device) -> None:
        self._name, self.backend, self.device = name, backend, device
        self.experts = torch.tensor(experts)
        self._own_ids = torch.full((of + 1,), -1)  # at -1: what is skipped anyway
        self._own_ids[self.experts] = torch.arange(len(experts))

    def inputs(self, whole: Inputs) -> Inputs:
        """The same call for these experts alone: the slots of others are skipped."""
        dtype = self.backend.compute_dtype
        lora = None
        if whole.lora is not None:
            lora = Lora({n: self._here(self._mine(n, t)) for n, t in whole.lora.tensors.items()}, whole.lora.scaling)
        index = self._own_ids[whole.top_k_index]
        x = self._here(whole.hidden_states).to(dtype)
        return Inputs(x, self._here(index), self._here(whole.top_k_weights), lora)

    def rows(self, whole: Inputs) -> int:
        """How many of a call's rows are of these experts."""
        return int((self._own_ids[whole.top_k_index] >= 0).sum())

    def grad(self, grad_output: Tensor) -> Tensor:
        """The output gradient where this part computes."""
        return self._here(grad_output).to(self.backend.compute_dtype)

    def _mine(self, name: str, tensor: Tensor) -> Tensor:
        """These experts' rows, valid until the next call of any layer."""
        into = _copies(self._name, name, (len(self.experts), *tensor.shape[1:]), tensor.dtype)
        return torch.index_select(tensor.detach(), 0, self.experts, out=into)

    def _here(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)


class SplitBackend(Backend):
    """What is given to the device is queued there first; the CPU computes its part meanwhile.

    Each part sees the whole call, with the other's slots skipped, and their outputs are added.
    """

    def __init__(
        self, cpu: Backend, device: Backend, experts: Sequence[int], shape: MoEShape, where: torch.device
    ) -> None:
        """Takes both over.

        Args:
            cpu: loaded with the other experts, in the order of their ids.
            device: loaded with these experts, in the order of their ids.
            experts: ascending ids of those on the device.
            shape: of the whole layer.
            where: the device.
        """
        self.name, self.shape, self.compute_dtype = cpu.name, replace(shape, rank=cpu.shape.rank), cpu.compute_dtype
        self.reloaded, self.distance, self.threads = cpu.reloaded, cpu.distance, cpu.threads
        self.bets, self.scaling = cpu.bets, getattr(cpu, "scaling", 1.0)
        here = set(experts)
        others = [e for e in range(shape.num_experts) if e not in here]
        self._device = _Part("device", device, experts, shape.num_experts, where)
        self._cpu = _Part("cpu", cpu, others, shape.num_experts, torch.device("cpu"))
        self._last = STATELESS, STATELESS, STATELESS  # its number, and the parts' own tickets

    @property
    def there(self) -> Backend:
        """The device's."""
        return self._device.backend

    @property
    def built_for(self) -> MoEShape:
        """See `Backend.built_for`."""
        return replace(self.shape, rank=self._cpu.backend.built_for.rank)

    def forward(self, inputs: Inputs, *, save: bool) -> tuple[Tensor, int]:
        """See `Backend.forward`."""
        with _TURN:
            with _plain(self._device.device):
                theirs, queued = self._device.backend.forward(self._device.inputs(inputs), save=save)
            out, ticket = self._cpu.backend.forward(self._cpu.inputs(inputs), save=save)
        if save:
            number = STATELESS if ticket == queued == STATELESS else next(_TICKETS)
            self._last = number, ticket, queued
        return _sum(out, theirs), self._last[0] if save else STATELESS

    def backward(self, ticket: int, inputs: Inputs, grad_output: Tensor) -> Gradients:
        """See `Backend.backward`."""
        last = ticket == self._last[0]
        mine, queued = self._last[1:] if last else (STATELESS, STATELESS)
        with _TURN:
            with _plain(self._device.device):
                grad = self._device.grad(grad_output)
                theirs = self._device.backend.backward(queued, self._device.inputs(inputs), grad)
            grads = self._cpu.backend.backward(mine, self._cpu.inputs(inputs), grad_output)
        return Gradients(
            _sum(grads.hidden_states, theirs.hidden_states),
            _sum(grads.top_k_weights, theirs.top_k_weights),
            self._whole(grads.lora, theirs.lora),
        )

    def holds(self, ticket: int) -> bool:
        """See `Backend.holds`."""
        number, mine, queued = self._last
        if ticket != number:
            return ticket == STATELESS
        return self._cpu.backend.holds(mine) and self._device.backend.holds(queued)

    def rows(self, inputs: Inputs) -> int:
        """See `Backend.rows`."""
        return self._cpu.rows(inputs)

    def close(self) -> None:
        """See `Backend.close`."""
        self._last = STATELESS, STATELESS, STATELESS
        self._device.backend.close()
        self._cpu.backend.close()

    def condemn(self) -> None:
        """See `Backend.condemn`."""
        self._device.backend.close()
        self._cpu.backend.condemn()

    def _whole(self, mine: list[Tensor] | None, theirs: list[Tensor] | None) -> list[Tensor] | None:
        """LoRA gradients of all experts, [E, ...] each."""
        if mine is None or theirs is None:
            return None
        found = []
        for here, there in zip(mine, theirs, strict=True):
            whole = here.new_empty(self.shape.num_experts, *here.shape[1:])
            found.append(whole.index_copy_(0, self._cpu.experts, here))
            whole.index_copy_(0, self._device.experts, there.to(here.device))
        return found


def split(
    cpu: Backend, weights: ExpertWeights, experts: Sequence[int], shape: MoEShape, where: torch.device
) -> SplitBackend:
    """Copies experts to the device and puts their backend beside the CPU's.

    Args:
        cpu: loaded with the other experts.
        weights: of the whole layer; quantised ones are dequantised.
        experts: ascending ids of those to copy.
        shape: of the whole layer.
        where: the device.
    """
    # fp32 on a CPU that has no bf16 instructions is no reason for it on the device; the reference is exact everywhere.
    dtype = torch.float32 if cpu.name == "reference" else torch.bfloat16
    copies = [_copied(getattr(weights, p), experts, where, dtype) for p in PROJECTIONS]
    part = replace(shape, num_experts=len(experts))
    return SplitBackend(cpu, TorchBackend(ExpertWeights(*copies), part, dtype), experts, shape, where)


def _copied(stack: Stack, experts: Sequence[int], where: torch.device, dtype: torch.dtype) -> Tensor:
    """[n, ...] on the device, one matrix after the other: nothing is there twice."""
    first = stack[experts[0]]
    found = torch.empty(len(experts), *first.shape, dtype=dtype, device=where)
    for into, e in zip(found, experts, strict=True):
        into.copy_(stack[e])
    return found


@contextmanager
def _plain(device: torch.device) -> Iterator[None]:
    """Without the caller's autocast, which would round the LoRA's fp32."""
    with torch.autocast(device.type, enabled=False):
        yield


def _sum(mine: Tensor, theirs: Tensor) -> Tensor:
    """Waits for the device. Rounded once: torch adds bf16 in fp32."""
    return mine + theirs.to(mine.device, mine.dtype)
