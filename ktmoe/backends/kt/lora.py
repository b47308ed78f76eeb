"""LoRA on its way into the kernel's bf16 form, and its gradients on their way out."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from ktmoe_reference import LORA_NAMES
from torch import Tensor

from ktmoe.types import Lora, MoEShape


def fill(mine: Sequence[Tensor], lora: Lora | None, scaling: float) -> None:
    """Copies LoRA into the tensors that a kernel object points to.

    Args:
        mine: six bf16 tensors of the rank that the object was built for; a smaller rank leaves the rest zero.
        lora: None for no LoRA at all.
        scaling: that the object was built for; another one is carried by B.
    """
    for name, into in zip(LORA_NAMES, mine, strict=True):
        if lora is None:
            into.zero_()
            continue
        tensor = lora.tensors[name].detach()
        if name.endswith("lora_B") and lora.scaling != scaling:
            tensor = tensor * (lora.scaling / scaling)
        part = _of_rank(name, into, lora.rank)
        if part.shape != into.shape:
            into.zero_()
        part.copy_(tensor)


@functools.cache
def gradient_buffers(shape: MoEShape) -> list[Tensor]:
    """Where a backward leaves its six LoRA gradients, bf16: the same memory for all layers, of one call at a time."""
    return [torch.empty(size, dtype=torch.bfloat16) for size in shape.lora_shapes().values()]


def clear(buffers: Sequence[Tensor]) -> None:
    """Before every backward. K28: the kernel takes rows at an address that it was given before for its own."""
    for buffer in buffers:
        buffer.zero_()


def take(buffers: Sequence[Tensor], lora: Lora, scaling: float) -> list[Tensor]:
    """LoRA gradients out of the kernel's buffers, in fp32 and in one pass each.

    Args:
        buffers: as the backward left them.
        lora: whose gradients they are; the rank's padding is taken off.
        scaling: that the object was built for; the chain rule through a rescaled B.
    """
    found = []
    for name, buffer in zip(LORA_NAMES, buffers, strict=True):
        part = _of_rank(name, buffer, lora.rank)
        grad = torch.empty(part.shape, dtype=torch.float32).copy_(part)
        if name.endswith("lora_B") and lora.scaling != scaling:
            grad *= lora.scaling / scaling
        found.append(grad)
    return found


def _of_rank(name: str, tensor: Tensor, rank: int) -> Tensor:
    return tensor[..., :rank] if name.endswith("lora_B") else tensor[:, :rank]
