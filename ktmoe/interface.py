"""The one interface that every implementation of the experts fulfils, and nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    from torch import Tensor

    from ktmoe.types import Gradients, Inputs, MoEShape


STATELESS = 0  # the ticket of a backend that keeps nothing between forward and backward


class Backend(ABC):
    """Frozen experts of one layer, loaded and ready to compute.

    A backend is a plain object: it knows neither autograd nor transformers nor peft, and is driven by
    `ktmoe.autograd`. Inputs come validated (`ktmoe.validation`), so a backend checks nothing twice.

    Attributes:
        name: as in `kt_backend`.
        shape: what it was built for.
        compute_dtype: the dtype that `Inputs.hidden_states` must have.
        reloaded: whether the weights are in an object that held another layer's before.
        bets: whether a training forward without grad should save all the same: the first pass of reentrant
            checkpointing is one, and its recompute can then be answered without computing.
    """

    name: str
    shape: MoEShape
    compute_dtype: torch.dtype
    reloaded: bool = False
    bets: bool = False

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

    def condemn(self) -> None:
        """Closes a backend that computed something wrong; nothing of it is used again."""
        self.close()

    def close(self) -> None:  # noqa: B027  (stateless backends have nothing to release)
        """Releases what the backend holds. It cannot be used afterwards."""
