"""The table of backends: the implementations behind the interface, in the order in which `auto` tries them."""

from __future__ import annotations

import os

from torch import get_num_threads  # `torch` is a module of this package

from ktmoe.backends import kt, reference, torch
from ktmoe.backends.kt import PackedLayer
from ktmoe.backends.row import Limits, Memory, Plan, Row
from ktmoe.backends.torch import TorchBackend
from ktmoe.cores import in_words, usable_cores
from ktmoe.interface import Backend
from ktmoe.notices import say_once
from ktmoe.types import ExpertWeights, MoEShape


__all__ = ["KERNEL_BACKENDS", "TABLE", "Limits", "Memory", "Plan", "Row", "TorchBackend", "build", "is_kernel", "kt"]

# What needs weights that are stored in its format stands before what takes any. What quantises them stands behind what
# does not: `auto` never does it unasked.
TABLE: dict[str, Row] = {row.name: row for row in (kt.FP8, kt.INT4, kt.BF16, torch.ROW, kt.INT8, reference.ROW)}
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
    usable = usable_cores(nodes=plan.nodes or None)
    if plan.threads and plan.threads > usable:
        where = f" on NUMA {in_words(plan.nodes)}" if plan.nodes else ""
        more = ", or use more nodes with kt_tp_enabled" if usable < usable_cores() else ""
        say_once(
            f"ktmoe: kt_num_threads: {plan.threads} threads on the {usable} cores that this process may use{where} "
            f"(physical cores, affinity mask, container quota): they will wait for each other. Leave it out{more}."
        )
    made = TABLE[plan.backend].build(plan, weights, shape, scaling, packed)
    if not is_kernel(plan):
        made.threads = plan.threads
        if plan.threads is None:
            _say_if_serial()
    return made


def _say_if_serial() -> None:
    """Launchers set OMP_NUM_THREADS to 1 for everybody, so that torch leaves the other cores idle without a word."""
    given, used, usable = os.environ.get("OMP_NUM_THREADS"), get_num_threads(), usable_cores()
    if given and used < usable:
        say_once(
            f"ktmoe: the routed experts run on {used} of {usable} cores: OMP_NUM_THREADS is {given} (accelerate "
            f"launch and torchrun set it to 1). kt_num_threads: {usable} gives them all."
        )
