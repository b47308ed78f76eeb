"""The table of backends: the implementations behind the interface, in the order in which `auto` tries them."""

from __future__ import annotations

from ktmoe.backends import kt, reference, torch
from ktmoe.backends.kt import PackedLayer
from ktmoe.backends.row import Limits, Plan, Row
from ktmoe.backends.torch import TorchBackend
from ktmoe.interface import Backend
from ktmoe.notices import say_once
from ktmoe.types import ExpertWeights, MoEShape


__all__ = ["KERNEL_BACKENDS", "TABLE", "Limits", "Plan", "Row", "TorchBackend", "build", "is_kernel", "kt"]

# What quantises weights stands behind what does not: `auto` never does it unasked.
TABLE: dict[str, Row] = {row.name: row for row in (kt.BF16, torch.ROW, kt.INT8, reference.ROW)}
KERNEL_BACKENDS = tuple(name for name, row in TABLE.items() if row.is_kernel)


def is_kernel(plan: Plan) -> bool:
    """Whether somebody else's code computes, and the gate must be passed."""
    return TABLE[plan.backend].is_kernel


def build(
    plan: Plan, weights: ExpertWeights, shape: MoEShape, scaling: float, packed: PackedLayer | None = None
) -> Backend:
    """Loads frozen weights into the planned backend. Says once why it is another one than configured.

    Args:
        plan: from `ktmoe.planning`.
        weights: of the layer.
        shape: what to build for.
        scaling: alpha / r of the LoRA that is usual.
        packed: the same weights on disk, where the backend takes them.

    Raises:
        KTError: what is on disk is damaged.
    """
    if plan.note:
        say_once(f"ktmoe: the routed experts run on the {plan.backend} backend ({plan.note}).")
    return TABLE[plan.backend].build(plan, weights, shape, scaling, packed)
