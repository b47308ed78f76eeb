"""The owner's side: one layer's backend, called by all processes of the host."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ktmoe.interface import STATELESS, Backend
from ktmoe.processes.meeting import Call, Meeting
from ktmoe.types import Gradients, Inputs, Lora


_SOON = 0.05  # seconds in which the owner's own call should bring the LoRA of the step: that copy costs no message
_KEPT = 2  # LoRAs of a layer: that of the step, and one that is compared with (DPO's reference)
_LATER = 1 << 20  # of a step: its backwards, from the last layer to the first


@dataclass(frozen=True)
class Request:
    """What a process wants of a layer.

    Attributes:
        rank: whose it is.
        inputs: without the LoRA.
        lora_id: names the LoRA's numbers; () without one.
        lora: the LoRA itself, where the owner asked for it.
        save: whether a backward may follow; of a forward.
        ticket: of a backward: of its forward.
        grad_output: [T, H], of a backward; None of a forward.
        apart: whether the LoRA's gradients are this process's alone: nobody averages them.
    """

    rank: int
    inputs: Inputs
    lora_id: tuple[Any, ...] = ()
    lora: Lora | None = None
    save: bool = False
    ticket: int = STATELESS
    grad_output: Tensor | None = None
    apart: bool = False


@dataclass(frozen=True)
class _Together:
    """The forward whose activations the backend may still hold: its ticket here and there, and the rows by rank."""

    number: int
    ticket: int
    rows: tuple[tuple[int, int], ...]


class Served:
    """A loaded backend, one call of which computes the rows of all processes."""

    def __init__(self, backend: Backend, position: int, ranks: Sequence[int], meeting: Meeting) -> None:
        """Nothing is computed yet.

        Args:
            backend: loaded.
            position: of the layer among all.
            ranks: the processes of the host.
            meeting: where their calls meet.
        """
        self.backend = backend
        self._position, self._ranks, self._meeting = position, frozenset(ranks), meeting
        self._numbers = itertools.count(STATELESS + 1)
        self._last = _Together(STATELESS, STATELESS, ())
        self._loras: OrderedDict[tuple[Any, ...], Lora] = OrderedDict()
        self._owner = min(ranks)
        self._learned = threading.Condition()

    def answer(self, request: Request) -> Any:
        """Output and ticket, or gradients, of which somebody else may have got the LoRA's; None: send the LoRA too."""
        lora = None
        if request.lora_id:
            with self._learned:
                if request.lora is not None:
                    copy = {name: t.detach().clone() for name, t in request.lora.tensors.items()}
                    self._loras[request.lora_id] = Lora(copy, request.lora.scaling)
                    self._learned.notify_all()
                elif request.rank != self._owner:
                    self._learned.wait_for(lambda: request.lora_id in self._loras, _SOON)
                if request.lora_id not in self._loras:
                    return None
                self._loras.move_to_end(request.lora_id)
                while len(self._loras) > _KEPT:
                    self._loras.popitem(last=False)
                lora = self._loras[request.lora_id]
        given = replace(request, inputs=replace(request.inputs, lora=lora), lora=None)
        alone = request.rank if request.apart else None
        if request.grad_output is None:
            about: tuple[Any, ...] = (id(self), request.lora_id, alone, request.save)
            return self._meet(given, about, self._position, self._forward)
        about = (id(self), request.lora_id, alone, "backward", request.ticket)
        return self._meet(given, about, _LATER - self._position, self._backward)

    def holds(self, ticket: int) -> bool:
        """Whether a backward with this ticket needs no forward run again."""
        last = self._last
        return ticket == STATELESS or (ticket == last.number and self.backend.holds(last.ticket))

    def _meet(
        self, given: Request, about: Any, position: float, compute: Callable[[Sequence[Request]], Sequence[Any]]
    ) -> Any:
        expected = self._ranks
        if given.apart:
            expected = frozenset([given.rank])
        elif given.ticket != STATELESS and given.ticket == self._last.number:
            expected = frozenset(rank for rank, _ in self._last.rows)
        return self._meeting.call(Call(given.rank, about, position, expected, compute, given))

    def _forward(self, requests: Sequence[Request]) -> list[tuple[Tensor, int]]:
        save = requests[0].save
        with self.backend.working():
            out, ticket = self.backend.forward(_joined(requests), save=save)
        number = STATELESS if ticket == STATELESS else next(self._numbers)
        if save:  # others may leave what the backend holds as it is, and it knows
            self._last = _Together(number, ticket, _rows(requests))
        return [(part, number) for part in _parted(out, requests)]

    def _backward(self, requests: Sequence[Request]) -> list[Gradients]:
        # Without the rows of all that were in the forward, what the backend holds does not fit: it computes it again.
        whole = requests[0].ticket == self._last.number and _rows(requests) == self._last.rows
        grads_output = [r.grad_output for r in requests if r.grad_output is not None]
        with self.backend.working():
            grad_output = grads_output[0] if len(grads_output) == 1 else torch.cat(grads_output)
            ticket = self._last.ticket if whole else STATELESS
            grads = self.backend.backward(ticket, _joined(requests), grad_output)
        parts = zip(_parted(grads.hidden_states, requests), _parted(grads.top_k_weights, requests), strict=True)
        # The sum of all is the first one's: whoever averages over the processes gets the same.
        return [Gradients(x, w, None if i else grads.lora) for i, (x, w) in enumerate(parts)]


def _rows(requests: Sequence[Request]) -> tuple[tuple[int, int], ...]:
    return tuple((r.rank, len(r.inputs.hidden_states)) for r in requests)


def _joined(requests: Sequence[Request]) -> Inputs:
    """One call with the rows of all."""
    calls = [r.inputs for r in requests]
    if len(calls) == 1:
        return calls[0]
    return Inputs(
        torch.cat([c.hidden_states for c in calls]),
        torch.cat([c.top_k_index for c in calls]),
        torch.cat([c.top_k_weights for c in calls]),
        calls[0].lora,
    )


def _parted(rows: Tensor, requests: Sequence[Request]) -> list[Tensor]:
    """Everybody's own rows, which are theirs to write to."""
    if len(requests) == 1:
        return [rows]
    return [part.clone() for part in rows.split([len(r.inputs.hidden_states) for r in requests])]
