"""The implementations behind the interface, and which of them runs on this host."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass

import psutil

from ktmoe.backends.kt import kernel
from ktmoe.backends.reference import ReferenceBackend
from ktmoe.backends.torch import build as build_torch
from ktmoe.checkpoints.packed import PackedLayer, PackedModel
from ktmoe.config import KTConfig
from ktmoe.interface import Backend
from ktmoe.types import ExpertWeights, KTError, MoEShape
from ktmoe.validation import check_shape


KERNEL_BACKENDS = ("AMXBF16", "AMXInt8")
_said: set[str] = set()


@dataclass(frozen=True)
class Plan:
    """What will run, decided from the configuration, the CPU and the shape; nothing is loaded yet.

    Attributes:
        backend: AMXBF16, AMXInt8, torch or reference.
        threads: CPU threads of the kernel.
        tp: parts of the intermediate dimension.
        max_len: tokens per kernel call.
        share_backward: whether the layers share one repacked backward buffer.
        note: why it is not what the configuration names, or "".
        torch_packing: copies of the weights that the torch backend may make.
    """

    backend: str
    threads: int
    tp: int
    max_len: int
    share_backward: bool
    note: str = ""
    torch_packing: str = "auto"

    @property
    def is_kernel(self) -> bool:
        """Whether kt_kernel computes, and the gate must be passed."""
        return self.backend in KERNEL_BACKENDS


def plan(config: KTConfig, shape: MoEShape) -> Plan:
    """Decides what runs.

    Without SFT classes for this CPU the torch backend takes over; `auto` also leaves the kernel for shapes that it
    cannot take.

    Raises:
        KTError: a shape or rank that the named backend cannot take, or packed weights of another shape or making.
    """
    check_shape(shape)
    wanted, note = config.kt_backend, ""
    if wanted == "auto":
        wanted = "AMXBF16"
        try:
            kernel.check_shape(wanted, shape)
        except KTError as error:
            wanted, note = "torch", str(error)
    if wanted in KERNEL_BACKENDS:
        kernel.check_shape(wanted, shape)
        if not kernel.available():
            unused = ", and kt_weight_path is of no use" if config.kt_weight_path else ""
            wanted, note = "torch", f"no SFT kernel on this host{unused}: {kernel.variant()}"
    threads = config.kt_num_threads or usable_cores()
    tp = 1
    if config.kt_tp_enabled and wanted in KERNEL_BACKENDS:
        tp = kernel.valid_tp(wanted, shape, len(kernel.numa_nodes()))
    if config.kt_weight_path and wanted in KERNEL_BACKENDS:
        PackedModel(config.kt_weight_path).check(shape, tp, kernel.version())
    packing = config.kt_torch_packing if wanted == "torch" else "auto"
    return Plan(wanted, threads, tp, config.kt_max_len or 4096, config.kt_share_backward != "off", note, packing)


def usable_cores() -> int:
    """Physical cores, but no more than this process may use: the kernel's threads wait by spinning."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(psutil.cpu_count(logical=False) or allowed, allowed)


def find_packed(plan: Plan, weights: ExpertWeights, config: KTConfig) -> PackedLayer | None:
    """These weights in `kt_weight_path`, if it is given and the plan can load them from there.

    Raises:
        KTError: other weights were packed there.
    """
    if config.kt_weight_path is None or plan.backend != "AMXInt8":
        return None
    return PackedModel(config.kt_weight_path).find(weights)


def build(
    plan: Plan, weights: ExpertWeights, shape: MoEShape, scaling: float, packed: PackedLayer | None = None
) -> Backend:
    """Loads frozen weights into the planned backend. Says once why it is another one than configured.

    Args:
        plan: from `plan`.
        weights: of the layer.
        shape: what to build for.
        scaling: alpha / r of the LoRA that is usual.
        packed: the same weights on disk, for AMXInt8.

    Raises:
        KTError: what is on disk is damaged.
    """
    if plan.note:
        say_once(f"ktmoe: the routed experts run on the {plan.backend} backend ({plan.note}).")
    if plan.backend == "reference":
        return ReferenceBackend(weights, shape)
    if plan.backend == "torch":
        return build_torch(weights, shape, plan.torch_packing)
    return kernel.KernelBackend(
        plan.backend,
        weights,
        shape,
        scaling=scaling,
        threads=plan.threads,
        tp=plan.tp,
        max_len=plan.max_len,
        share_backward=plan.share_backward,
        packed=packed,
    )


def say_once(message: str) -> None:
    """Warns, once per process and message."""
    if message not in _said:
        _said.add(message)
        warnings.warn(message, stacklevel=3)
