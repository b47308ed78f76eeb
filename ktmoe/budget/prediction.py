"""How long a step would take: from what this machine was measured to do, and said to be a prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ktmoe.backends import Plan
from ktmoe.budget.budget import Budget
from ktmoe.config import KTConfig
from ktmoe.gate import speed
from ktmoe.types import KTError


_RECOMPUTED = 1.5  # forward and backward multiply as much: the weights are frozen


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step.

    Attributes:
        experts: in routed experts on the CPU, forward and backward; of those on a device, as if each had as many
            tokens as any other.
        rest: in the products of everything else, at the rate of dense products here; None where a GPU computes them.
        plan: under which the experts run.
    """

    experts: float
    rest: float | None
    plan: Plan


def predict(budget: Budget) -> Prediction:
    """Measures a part of the experts of each shape, for some seconds, with as many rows each as the batch gives them.

    Left out: the optimizer, the data, and what is no product (norms, softmax, the loss).

    Raises:
        KTError: no backend computes them here, or it could not be measured.
    """
    way = budget.planned
    if way is None:
        raise KTError("--time: no backend of this machine computes these experts.")
    keys: dict[str, Any] = dict(way.keys)
    config = KTConfig(**keys)
    experts, found = 0.0, None
    for shape, count in budget.layers.items():
        found = speed(config, shape, budget.stored, budget.processes * budget.batch.tokens)
        if found is None:
            raise KTError("--time: the experts could not be measured here.")
        experts += count * found.experts * (1 - budget.on_device / shape.num_experts)
    assert found is not None
    if budget.batch.checkpointing and not budget.retained:
        experts *= _RECOMPUTED
    # Processes of a host share its cores, for their own parts too.
    rest = budget.processes * budget.operations() / found.dense if budget.free_device is None else None
    return Prediction(experts, rest, found.plan)
