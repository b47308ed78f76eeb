"""The classes of the extension that train, one for each format of the weights, and what each of them asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ktmoe.stored import BlockFP8, GroupInt4
from ktmoe.types import ExpertWeights


@dataclass(frozen=True)
class Format:
    """How a class of the extension holds weights.

    Attributes:
        extension_class: its name.
        granule: H and I / TP must be multiples (K2).
        bytes_per_weight: of its packed weights.
        stored: the format of the source that it needs, as `ExpertWeights.stored`; "" for any, cast to bf16.
        own_backward: whether a layer may have backward weights of its own.
        reloads_own_backward: and be loaded again then (K22).
        quantisation: its settings for `quant_config`.
        dtype: of a number in the source.
        scale_block: rows and columns of the source that share a scale; None without scales.
        scale_dtype: of those.
        all_experts: E x H and E x I / TP must be multiples of it (K33).
        cache_depth: saving forwards that wait for their backwards; one more than 1 ends the process (K32).
        rank: the only LoRA rank that it can be built for (K31); smaller ones are padded. None for any.
    """

    extension_class: str
    granule: int
    bytes_per_weight: float
    stored: str = ""
    own_backward: bool = True
    reloads_own_backward: bool = True
    quantisation: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16
    scale_block: tuple[int, int] | None = None
    scale_dtype: torch.dtype = torch.float32
    rank: int | None = None
    cache_depth: int = 1
    all_experts: int = 1


FORMATS = {
    "AMXBF16": Format("AMXBF16_SFT_MOE", 32, 2),
    "AMXInt8": Format("AMXInt8_SFT_MOE", 64, 1, reloads_own_backward=False),
    "AMXFP8": Format(
        "AMXFP8_SFT_MOE",
        128,
        1,
        stored="fp8",
        own_backward=False,  # K30
        quantisation={"quant_method": "fp8", "bits": 8, "group_size": 128},
        dtype=torch.float8_e4m3fn,
        scale_block=(128, 128),
    ),
    "AMXInt4": Format(
        "AMXInt4_KGroup_SFT_MOE",
        128,
        0.625,  # measured: each group of 32 has its scale in fp32
        stored="int4",
        own_backward=False,  # it would hold the same
        quantisation={"quant_method": "rawint4", "bits": 4, "group_size": 32, "zero_point": False},
        dtype=torch.uint8,
        scale_block=(1, 32),
        scale_dtype=torch.bfloat16,
        rank=8,
        cache_depth=256,  # each takes half a kilobyte of every layer
        all_experts=512,
    ),
}


def ones(kind: str, parts: int) -> ExpertWeights:
    """A layer of the smallest sizes that a class takes, all weights 1.

    Args:
        kind: as in `kt_backend`.
        parts: of tensor parallelism.
    """
    kept = FORMATS[kind]
    h, i, e = max(64, kept.granule), kept.granule * parts, -(-kept.all_experts // kept.granule)
    if kept.stored:
        return ExpertWeights(*(_ONES[kept.stored](e, *size) for size in ((i, h), (i, h), (h, i))))
    gate_up = torch.ones(e, i, h, dtype=torch.bfloat16)
    return ExpertWeights(gate_up, gate_up, gate_up.mT.contiguous())


_ONES = {
    "fp8": lambda e, out, width: BlockFP8(
        torch.ones(e, out, width).to(torch.float8_e4m3fn), torch.ones(e, out // 128, width // 128)
    ),
    "int4": lambda e, out, width: GroupInt4(
        torch.full((e, out, width // 2), 0x99, dtype=torch.uint8),
        torch.ones(e, out, width // 32, dtype=torch.bfloat16),
    ),
}
