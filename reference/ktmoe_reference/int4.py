"""What INT4 weights in groups mean: each number from -8 to 7 times the scale of its group of 32 along the input.

Source: compressed-tensors' `pack-quantized` format, symmetric, strategy `group`, group_size 32, in which Kimi K2 is
released.
"""

import torch
from torch import Tensor


def quantize_int4(weight: Tensor, group: int = 32) -> tuple[Tensor, Tensor]:
    """`scale = max|w| / 7.5` over each group, rounded to bf16; `q = w / scale` rounded to the nearest of -8 to 7.

    Args:
        weight: [out, in], floating point; in is a multiple of `group`.
        group: columns that share a scale.

    Returns:
        int8 [out, in], and bf16 [out, in / group].
    """
    parts = weight.float().unflatten(1, (-1, group))  # [out, in / group, group]
    scale = (parts.abs().amax(-1) / 7.5).to(torch.bfloat16)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (parts / scale.float().unsqueeze(-1)).round().clamp(-8, 7).flatten(1).to(torch.int8), scale


def dequantize_int4(q: Tensor, scale: Tensor, group: int = 32) -> Tensor:
    """`q * scale`, group by group, in fp32.

    Args:
        q: [out, in] integers.
        scale: [out, in / group].
        group: columns that share a scale.

    Returns:
        [out, in] fp32.
    """
    return q.float() * scale.float().repeat_interleave(group, 1)


def pack_int4(q: Tensor) -> Tensor:
    """Two numbers to a byte, each plus 8; the first one in the lower half.

    Eight of them in the int32 of `weight_packed` are the same bytes on a little-endian machine.

    Args:
        q: [out, in] integers from -8 to 7.

    Returns:
        uint8 [out, in / 2].
    """
    shifted = (q + 8).to(torch.uint8)
    return shifted[:, ::2] | (shifted[:, 1::2] << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """The numbers that `pack_int4` was given, int8 [out, in]."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(1).to(torch.int8) - 8
