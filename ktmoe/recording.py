"""What routed experts do while somebody listens: their calls, rows, seconds, and which experts had tokens."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ktmoe.types import Inputs, MoEShape


@dataclass(eq=False)
class Record:
    """Sums over calls.

    Attributes:
        forward: seconds of first passes.
        retained: forwards that were answered from what was kept.
        recomputed: seconds of forwards within a backward pass, which gradient checkpointing runs.
        backward: seconds.
        operations: of the CPU's products with frozen weights, without LoRA: 6 x rows x H x I for each forward that was
            computed and each backward.
        tokens: of each layer, by its number: [E], how many rows each expert has had a backward for.
        trained: of each layer: how many tokens it has had a backward for.
    """

    forward: float = 0.0
    retained: int = 0
    recomputed: float = 0.0
    backward: float = 0.0
    operations: float = 0.0
    tokens: dict[int, Tensor] = field(default_factory=dict)
    trained: dict[int, int] = field(default_factory=dict)


_listening: list[Record] = []


@contextmanager
def into(record: Record) -> Iterator[None]:
    """What is called within it is added to the record."""
    _listening.append(record)
    try:
        yield
    finally:
        _listening.remove(record)


def forwarded(start: float, rows: int, shape: MoEShape, *, computed: bool) -> None:
    """A forward has ended.

    Args:
        start: when it began, by `time.perf_counter`.
        rows: that the CPU computed.
        shape: of the layer.
        computed: not answered from what was kept.
    """
    if not _listening:
        return
    seconds = time.perf_counter() - start
    again = torch._C._current_graph_task_id() != -1  # within a backward pass
    for record in _listening:
        if again:
            record.recomputed += seconds
        else:
            record.forward += seconds
        if computed:
            record.operations += _operations(rows, shape)
        else:
            record.retained += 1


def trained(start: float, layer: int, inputs: Inputs, rows: int, shape: MoEShape) -> None:
    """A backward has ended.

    Args:
        start: when it began, by `time.perf_counter`.
        layer: whose; any number of its own.
        inputs: of the call.
        rows: that the CPU computed.
        shape: of the layer.
    """
    if not _listening:
        return
    seconds = time.perf_counter() - start
    index = inputs.top_k_index  # [T, K]
    tokens = index[index >= 0].bincount(minlength=shape.num_experts)  # [E]
    for record in _listening:
        record.backward += seconds
        record.operations += _operations(rows, shape)
        record.tokens[layer] = record.tokens[layer] + tokens if layer in record.tokens else tokens
        record.trained[layer] = record.trained.get(layer, 0) + len(index)


def _operations(rows: int, shape: MoEShape) -> float:
    return 6.0 * rows * shape.hidden_size * shape.intermediate_size
