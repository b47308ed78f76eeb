"""The one interface that every implementation of the experts fulfils, and nothing else."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch

from ktmoe.types import KTError
from ktmoe.validation import own_settings


if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ktmoe.types import Gradients, Inputs, MoEShape


STATELESS = 0  # the ticket of a backend that keeps nothing between forward and backward
_MADE_HERE: WeakSet[Backend] = WeakSet()  # not the copies that a forked child has of its parent's
os.register_at_fork(after_in_child=_MADE_HERE.clear)


@dataclass(frozen=True)
class Int8:
    """How an INT8 backend is built, as far as its numbers depend on it (`ktmoe_reference.int8_experts_forward`).

    Attributes:
        requantised: whether the backward copies of the weights are quantised from the forward's 8 bits.
        tp: parts of I, each quantised by itself.
    """

    requantised: bool
    tp: int


class Backend(ABC):
    """Frozen experts of one layer, loaded and ready to compute.

    A backend is a plain object: it knows neither autograd nor transformers nor peft, and is driven by
    `ktmoe.autograd`. Inputs come validated (`ktmoe.validation`), so a backend checks nothing twice.

    Attributes:
        name: as in `kt_backend`.
        shape: what it was built for.
        compute_dtype: the dtype that `Inputs.hidden_states` must have.
        reloaded: whether the weights are in an object that held another layer's before.
        int8: for backends that compute in 8 bits, which are judged by that arithmetic; None for the others.
        distance: how far an 8-bit format is from the exact formula on this layer, as the load probe found it: of the
            output, [E], and perhaps of the input gradient. Empty if nobody looked.
        bets: whether a training forward without grad should save all the same: the first pass of reentrant
            checkpointing is one, and its recompute can then be answered without computing.
        threads: torch's threads while it computes; None: as many as torch has.
    """

    name: str
    shape: MoEShape
    compute_dtype: torch.dtype
    reloaded: bool = False
    int8: Int8 | None = None
    distance: Sequence[Tensor] = ()
    bets: bool = False
    threads: int | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Notes the process; unpickling and copying come by here too."""
        made = super().__new__(cls)
        _MADE_HERE.add(made)
        return made

    @property
    def built_for(self) -> MoEShape:
        """What computes: of `shape`, or what an earlier layer left behind, of a larger rank."""
        return self.shape

    @contextmanager
    def working(self) -> Iterator[None]:
        """Around every forward and backward: the caller's settings kept away, and torch on `threads` threads.

        Raises:
            KTError: several threads in a forked child, which would wait for ever for those of its parent.
        """
        before = torch.get_num_threads()
        threads = self.threads or before
        if threads > 1 and self not in _MADE_HERE:
            raise KTError(
                "The routed experts were called in a forked process; threads live in the parent only. Use dataloader "
                "workers for data alone, or start processes with the 'spawn' method."
            )
        with own_settings():
            if threads == before:
                yield
                return
            torch.set_num_threads(threads)
            try:
                yield
            finally:
                torch.set_num_threads(before)

    @abstractmethod
    def forward(self, inputs: Inputs, *, save: bool) -> tuple[Tensor, int]:
        """Computes the layer's output.

        Args:
            inputs: the call.
            save: whether a backward may follow.

        Returns:
            The output [T, H] in `compute_dtype`, and a ticket. The ticket numbers what the backend holds for the
            backward, `STATELESS` if nothing.
        """

    @abstractmethod
    def backward(self, ticket: int, inputs: Inputs, grad_output: Tensor) -> Gradients:
        """Computes the gradients of one earlier forward.

        Args:
            ticket: from that forward. If what it numbers is gone, the forward is run again from `inputs`.
            inputs: the same call.
            grad_output: [T, H] in `compute_dtype`, contiguous.

        Returns:
            Fresh tensors that belong to the caller.
        """

    def holds(self, ticket: int) -> bool:
        """Whether a backward with this ticket needs no forward run again, or would need it with any ticket.

        A backend that keeps activations says whether those of `ticket` are still there, unspoiled.
        """
        return ticket == STATELESS

    def rows(self, inputs: Inputs) -> int:
        """How many rows of experts the CPU computes in such a call."""
        return inputs.top_k_index.numel()

    def condemn(self) -> None:
        """Closes a backend that computed something wrong; nothing of it is used again."""
        self.close()

    def close(self) -> None:  # noqa: B027  (stateless backends have nothing to release)
        """Releases what the backend holds. It cannot be used afterwards."""
