"""Objects of the extension: how each one is set up, and the tensors that it points to."""

from __future__ import annotations

import itertools
import math
import mmap
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ktmoe.backends.kt.extension import CLASSES, Host
from ktmoe.types import MoEShape


_LAYER_IDS = itertools.count(1)  # K10: the extension's owner check is global to the process
# The same for every object. The expert map (K20) and the experts on a GPU (K19) are never set.
_SETTINGS = {
    "lora_dropout": 0.0,  # K21: its masks differ between forward and recompute, and apply in evaluation
    "max_cache_depth": 1,  # K8
    "share_cache_pool": False,  # K9
    "authoritative_optimizer_grads": True,  # K12: every gradient is overwritten, inactive experts with zero
}
_LORA_FIELDS = ("gate_lora_a", "gate_lora_b", "up_lora_a", "up_lora_b", "down_lora_a", "down_lora_b")


@dataclass(eq=False)
class KernelObject:
    """A kernel object with weights in its own buffers, and the LoRA tensors that it points to.

    K11: gate_A and up_A are read live at every call, so the tensors live as long as the object.
    """

    moe: Any
    lora: list[Tensor]
    shape: MoEShape
    scaling: float
    max_len: int
    nbytes: int  # of its packed weights

    def serves(self, shape: MoEShape, max_len: int) -> bool:
        """Whether another layer of these sizes can have it: a smaller rank is padded, fewer tokens fit."""
        return (
            replace(self.shape, rank=shape.rank) == shape and self.shape.rank >= shape.rank and self.max_len >= max_len
        )


def create(
    kind: str,
    host: Host,
    shape: MoEShape,
    max_len: int,
    scaling: float,
    share_backward: bool,
    sources: dict[str, Any],
) -> KernelObject:
    """A kernel object with nothing loaded. The caller holds the host's lock.

    Args:
        kind: AMXBF16 or AMXInt8.
        host: whose threads it computes with.
        shape: what to build for.
        max_len: tokens per call, a multiple of 32.
        scaling: alpha / r.
        share_backward: one repacked weight buffer for all layers instead of one each.
        sources: settings that say where its weights come from, or go to.
    """
    if shape.num_experts > 1:  # the layer of one expert that takes the backward buffer over is none of a model's
        _say_what_stays()
    lora = [torch.zeros(size, dtype=torch.bfloat16) for size in shape.lora_shapes().values()]
    moe = host.extension.moe
    c = moe.MOESFTConfig(shape.num_experts, shape.top_k, shape.hidden_size, shape.intermediate_size)
    c.layer_idx = next(_LAYER_IDS)
    c.pool = host.infer.backend_
    c.max_len = max_len
    c.lora_rank = shape.rank
    c.lora_alpha = float(scaling * shape.rank)
    c.share_backward_bb = share_backward
    fields = dict(zip(_LORA_FIELDS, (t.data_ptr() for t in lora), strict=True))
    for name, value in (_SETTINGS | sources | fields).items():
        setattr(c, name, value)
    weights = 3 * shape.num_experts * shape.hidden_size * shape.intermediate_size
    nbytes = weights * (1 if kind == "AMXInt8" else 2) * (1 if share_backward else 2)
    return KernelObject(getattr(moe, CLASSES[kind])(c), lora, shape, scaling, max_len, nbytes)


def _say_what_stays() -> None:
    """K22: a new object while others are idle, none of which could be taken, adds to what the process keeps."""
    if held := sum(made.nbytes for made in Host.all_idle()):
        warnings.warn(
            f"ktmoe: about {held / 1e9:.3g} GB of packed experts of an earlier model stay in memory, which kt_kernel "
            "does not give back. They are used again for the same sizes, kt_num_threads and kt_share_backward, and a "
            "rank and kt_max_len that are not larger: begin with the largest, or give each run a process.",
            stacklevel=2,
        )


def contiguous(stack: Any) -> Tensor:
    """[E, ...] bf16, contiguous (K3, K25): the held tensor itself where it is that already.

    A copy is a mapping of its own. In malloc's heap the holes that the copies leave between the packed layers add up:
    a third of the experts' size in BF16, more in INT8.
    """
    if isinstance(stack, Tensor):
        held = stack.detach()
        if held.dtype == torch.bfloat16 and held.device.type == "cpu" and held.is_contiguous() and not held.is_neg():
            return held
    shape = (len(stack), *stack[0].shape)
    copy = torch.frombuffer(mmap.mmap(-1, 2 * math.prod(shape)), dtype=torch.bfloat16).view(shape)
    for e, matrix in enumerate(stack):
        copy[e].copy_(matrix.detach())
    return copy
