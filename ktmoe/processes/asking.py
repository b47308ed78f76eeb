"""Every process's side: a backend that asks the owner's."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ktmoe.backends import Plan
from ktmoe.interface import STATELESS, Backend, Int8
from ktmoe.processes.serving import Request
from ktmoe.types import Gradients, Inputs, Lora, MoEShape


@dataclass(frozen=True)
class About:
    """What there is to know of the owner's backend. See `Backend`."""

    plan: Plan
    name: str
    shape: MoEShape
    built_for: MoEShape
    compute_dtype: torch.dtype
    int8: Int8 | None
    distance: tuple[Tensor, ...]
    scaling: float


def about(backend: Backend, plan: Plan) -> About:
    """Of a loaded backend."""
    return About(
        plan,
        backend.name,
        backend.shape,
        backend.built_for,
        backend.compute_dtype,
        backend.int8,
        tuple(backend.distance),
        getattr(backend, "scaling", 1.0),
    )


class Asking(Backend):
    """Sends calls to the process that owns the experts.

    Attributes:
        averaged: whether somebody averages the LoRA's gradients over the processes: their sum may then be with any.
    """

    threads = None

    def __init__(
        self, what: About, rank: int, ask: Callable[[Request], Any], holds: Callable[[int], bool], close: Any
    ) -> None:
        """Nothing is asked yet.

        Args:
            what: of the owner's backend.
            rank: of this process.
            ask: gives a request to the owner and waits for the answer.
            holds: asks the owner about a ticket.
            close: to be called at the end.
        """
        self.name, self.shape, self.compute_dtype = what.name, what.shape, what.compute_dtype
        self.int8, self.distance, self.scaling = what.int8, what.distance, what.scaling
        self._built_for = what.built_for
        self._rank, self._ask, self._holds, self._close = rank, ask, holds, close
        self._named: tuple[int, tuple[Any, ...]] = STATELESS, ()  # the last ticket, and the LoRA of its forward
        self.averaged = False

    @property
    def built_for(self) -> MoEShape:
        """See `Backend.built_for`."""
        return self._built_for

    def forward(self, inputs: Inputs, *, save: bool) -> tuple[Tensor, int]:
        """See `Backend.forward`."""
        name = _name(inputs.lora)
        out, ticket = self._answer(inputs, name, save=save)
        self._named = ticket, name
        return out, ticket

    def backward(self, ticket: int, inputs: Inputs, grad_output: Tensor) -> Gradients:
        """See `Backend.backward`. LoRA gradients that another process got are zero here: the average has them."""
        # Autograd refuses a LoRA that was changed since its forward; the sums take as long as a copy.
        before, name = self._named
        if ticket == STATELESS or ticket != before:
            name = _name(inputs.lora)
        grads: Gradients = self._answer(inputs, name, ticket=ticket, grad_output=grad_output)
        if grads.lora is None and inputs.lora is not None:
            grads = replace(grads, lora=[torch.zeros(t.shape, dtype=torch.float32) for t in inputs.lora])
        return grads

    def holds(self, ticket: int) -> bool:
        """See `Backend.holds`."""
        return self._holds(ticket)

    def close(self) -> None:
        """See `Backend.close`; the owner's decides for all."""
        self._close()

    def _answer(self, inputs: Inputs, name: tuple[Any, ...], save: bool = True, **about: Any) -> Any:
        lora = inputs.lora
        apart = save and lora is not None and not self.averaged
        request = Request(self._rank, replace(inputs, lora=None), name, save=save, apart=apart, **about)
        answer = self._ask(request)
        if answer is None and lora is not None:
            plain = {name: t.detach() for name, t in lora.tensors.items()}
            answer = self._ask(replace(request, lora=Lora(plain, lora.scaling)))
        return answer


def _name(lora: Lora | None) -> tuple[Any, ...]:
    """Names a LoRA by its numbers, () for none: the same on every process, and another one after each step."""
    if lora is None:
        return ()
    sums = (zlib.crc32(t.detach().resolve_neg().contiguous().view(torch.uint8).numpy().data) for t in lora)
    return (lora.rank, lora.scaling, *sums)
