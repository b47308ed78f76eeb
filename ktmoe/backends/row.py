"""What a backend declares about itself: one `Row`, from which the choice, the gate and the reports derive the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from ktmoe.backends.kt import PackedLayer
    from ktmoe.interface import Backend
    from ktmoe.types import ExpertWeights, MoEShape


@dataclass(frozen=True)
class Limits:
    """Largest errors that pass.

    Attributes:
        forward: relative error of the output.
        backward: of every gradient.
        projection: distance of the projection from 1.
    """

    forward: float
    backward: float
    projection: float


@dataclass(frozen=True)
class Memory:
    """Bytes of this process's memory; pages of mapped files are none of them.

    Attributes:
        each: of every layer.
        once: of one layer, for all of them.
    """

    each: int
    once: int = 0


@dataclass(frozen=True)
class Plan:
    """What will run, decided from the configuration, the CPU and the shape; nothing is loaded yet.

    Attributes:
        backend: its name in the table.
        threads: CPU threads of the kernel, or of torch while it computes experts (None: as many as it has).
        tp: parts of the intermediate dimension.
        max_len: tokens per kernel call.
        share_backward: whether the layers share one repacked backward buffer.
        torch_packing: copies of the weights that the torch backend may make.
        nodes: ids of the NUMA nodes that the kernel's parts are on, one for each; none where it does not compute.
        reasons: the backends that came first and cannot serve, each with the reason.
    """

    backend: str
    threads: int | None
    tp: int
    max_len: int
    share_backward: bool
    torch_packing: str = "auto"
    nodes: tuple[int, ...] = ()
    reasons: tuple[tuple[str, str], ...] = ()

    @property
    def note(self) -> str:
        """Why it is not what the configuration asks for first, or ""."""
        return self.reasons[0][1] if self.reasons else ""


def _nothing(*about: object) -> str:
    return ""


def _no_memory(plan: Plan, shape: MoEShape) -> Memory:
    return Memory(0)


def _no_activations(plan: Plan, shape: MoEShape, tokens: int) -> Memory:
    return Memory(0)


def _one_part(shape: MoEShape, wanted: int) -> int:
    return 1


@dataclass(frozen=True)
class Row:
    """One backend.

    Attributes:
        name: as in `kt_backend`.
        build: loads frozen weights. Takes the plan, the weights, what to build for, alpha / r of the LoRA that is
            usual, and the same weights packed on disk or None.
        required: what the gate on a user's machine holds it to, by the arithmetic that it has.
        expected: what it reaches, and what this project's own checks hold it to.
        aimed_at: how far from the exact formula its format should be; information, where that is INT8's.
        describe: where it computes, for people.
        refuse_shape: why it cannot take a shape on any host, "" if it can.
        refuse_host: why it cannot run on this host, "" if it can.
        largest_tp: how many parts of the intermediate dimension a shape divides into, up to a number that is wanted.
        is_kernel: whether it is somebody else's code, which has to pass the gate.
        takes_packed: whether it loads the files of `kt_weight_path`.
        memory: what a layer's frozen weights take.
        activations: what a call of so many tokens takes from its forward to its backward; once: while it runs.
        stored: the format in which the source must hold the weights, as `ExpertWeights.stored`; "" for any.
        rank: the only LoRA rank that it is built for, smaller ones being padded; None for any.
        own_backward: whether each layer may have backward weights of its own (`kt_share_backward: off`).
    """

    name: str
    build: Callable[[Plan, ExpertWeights, MoEShape, float, PackedLayer | None], Backend]
    required: Limits
    expected: Limits
    aimed_at: Limits
    describe: Callable[[], str]
    refuse_shape: Callable[[MoEShape], str] = _nothing
    refuse_host: Callable[[], str] = _nothing
    largest_tp: Callable[[MoEShape, int], int] = _one_part
    is_kernel: bool = False
    takes_packed: bool = False
    memory: Callable[[Plan, MoEShape], Memory] = _no_memory
    activations: Callable[[Plan, MoEShape, int], Memory] = _no_activations
    stored: str = ""
    own_backward: bool = True
    rank: int | None = None

    def built_for(self, shape: MoEShape) -> MoEShape:
        """What an object for a layer of this shape is built for."""
        return replace(shape, rank=self.rank or shape.rank)

    def why_not(self, shape: MoEShape) -> str:
        """Why it cannot serve a shape on this host, "" if it can."""
        return self.refuse_shape(shape) or self.refuse_host()
