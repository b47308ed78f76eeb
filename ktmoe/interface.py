"""The one interface that every implementation of the experts fulfils, and nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ktmoe.types import Gradients, Inputs, MoEShape


STATELESS = 0  # the ticket of a backend that keeps nothing between forward and backward


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
    """

    name: str
    shape: MoEShape
    compute_dtype: torch.dtype
    reloaded: bool = False
    int8: Int8 | None = None
    distance: Sequence[Tensor] = ()

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

    def condemn(self) -> None:
        """Closes a backend that computed something wrong; nothing of it is used again."""
        self.close()

    def close(self) -> None:  # noqa: B027  (stateless backends have nothing to release)
        """Releases what the backend holds. It cannot be used afterwards."""
