"""peft's format for LoRA of stacked parameters (`ParamWrapper`): gate and up share one A, experts share one matrix.

On disk, for E experts: lora_A [E * r, in], expert by expert, and lora_B [out, r * E], rank by rank. Separate LoRAs of
gate and up are exact in it at rank 2r: their A one above the other, their B block-diagonal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ktmoe.types import MoEShape


@dataclass(frozen=True)
class ExpertLora:
    """The expert LoRA of one layer.

    Attributes:
        tensors: by the names of `LORA_NAMES`: A [E, r, in], B [E, out, r].
        rank: r.
        scaling: what B A is multiplied by.
    """

    tensors: Mapping[str, Tensor]
    rank: int
    scaling: float


@dataclass(frozen=True)
class Fused:
    """LoRA of one stacked parameter, unpacked.

    Attributes:
        lora_A: [E, r, in].
        lora_B: [E, out, r].
        scaling: what B A is multiplied by.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float


def pack(lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
    """[E, r, in] and [E, out, r] as peft keeps them: [E * r, in] and [out, r * E]."""
    return lora_a.flatten(0, 1).contiguous(), lora_b.permute(1, 2, 0).flatten(1, 2).contiguous()


def unpack(a: Tensor, b: Tensor, num_experts: int, swapped: bool) -> tuple[Tensor, Tensor]:
    """What `pack` packed. `swapped`: by peft before 0.19, which took [E, out, in] for [E, in, out]: A is B there."""
    lora_a = a.reshape(num_experts, -1, a.shape[1])  # [E, r, in]
    lora_b = b.reshape(b.shape[0], -1, num_experts).permute(2, 0, 1)  # [E, out, r]
    return (lora_b.mT, lora_a.mT) if swapped else (lora_a, lora_b)


def fuse(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """The six tensors of one layer as gate_up_proj (rank 2r) and down_proj (rank r), packed."""
    gate_b, up_b = tensors["gate_proj.lora_B"], tensors["up_proj.lora_B"]  # [E, I, r]
    lora_a = torch.cat([tensors["gate_proj.lora_A"], tensors["up_proj.lora_A"]], dim=1)  # [E, 2r, H]
    upper = torch.cat([gate_b, torch.zeros_like(up_b)], dim=2)  # [E, I, 2r]
    lower = torch.cat([torch.zeros_like(gate_b), up_b], dim=2)
    return {
        "gate_up_proj": pack(lora_a, torch.cat([upper, lower], dim=1)),
        "down_proj": pack(tensors["down_proj.lora_A"], tensors["down_proj.lora_B"]),
    }


def split(gate_up: Fused | None, down: Fused | None, shape: MoEShape) -> dict[str, Fused]:
    """gate_proj, up_proj and down_proj of fused LoRA; a parameter without LoRA gives no entry.

    gate and up of rank r again if their B is block-diagonal and down has half their rank, as `fuse` makes it. Else
    each keeps the A that they share, at its full rank.
    """
    found = {} if down is None else {"down_proj": down}
    if gate_up is None:
        return found
    a, b, scaling, i = gate_up.lora_A, gate_up.lora_B, gate_up.scaling, shape.intermediate_size
    r = a.shape[1] // 2
    if down is not None and a.shape[1] == 2 * down.lora_A.shape[1] and not (b[:, :i, r:].any() or b[:, i:, :r].any()):
        gate, up = Fused(a[:, :r], b[:, :i, :r], scaling), Fused(a[:, r:], b[:, i:, r:], scaling)
    else:
        gate, up = Fused(a, b[:, :i], scaling), Fused(a, b[:, i:], scaling)
    return {"gate_proj": gate, "up_proj": up} | found


def unite(layers: Mapping[str, tuple[dict[str, Fused], MoEShape]]) -> dict[str, ExpertLora]:
    """Projections of any ranks and scales, as layers of which each has one rank and one scale, exactly.

    Within a layer, smaller ranks are filled up with zeros, and another scale goes into B.
    """
    united = {}
    for name, (projections, shape) in layers.items():
        every = list(projections.values())
        rank = max((p.lora_A.shape[1] for p in every), default=0)
        scaling = next((p.scaling for p in every if p.lora_A.shape[1] == rank), 1.0)
        tensors = {}
        for key, size in shape.lora_shapes(rank).items():
            projection, side = key.split(".")
            whole = torch.zeros(size)
            if projection in projections:
                part = projections[projection]
                tensor = getattr(part, side)
                if side == "lora_B" and part.scaling != scaling:
                    tensor = tensor.float() * (part.scaling / scaling)
                whole = whole.to(tensor.dtype)
                whole[:, : tensor.shape[1], : tensor.shape[2]] = tensor
            tensors[key] = whole
        united[name] = ExpertLora(tensors, rank, scaling)
    return united
