"""What INT8 weights mean: symmetric, one scale per output row, activations quantised per token on the way in."""

import torch
from torch import Tensor


def quantize_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric 8-bit quantisation of every row: `scale = max|row| / 127`, `q = round(row / scale)`.

    Args:
        x: [..., n] floating point.

    Returns:
        q: int8, the shape of `x`; scale: [..., 1] in the dtype of `x` (zero for a row of zeros, whose q is zero too).
    """
    scale = x.abs().amax(dim=-1, keepdim=True) / 127
    q = torch.where(scale > 0, x / scale, torch.zeros_like(x)).round().clamp(-127, 127)
    return q.to(torch.int8), scale


def dequantize_int8(q: Tensor, scale: Tensor) -> Tensor:
    """`q * scale`, in the dtype of `scale`."""
    return q.to(scale.dtype) * scale


def int8_round_trip(weight: Tensor) -> Tensor:
    """The weight that an INT8 backend really multiplies with. Off by at most half a scale per element."""
    return dequantize_int8(*quantize_int8(weight))


def int8_linear(x: Tensor, weight: Tensor) -> Tensor:
    """`W x` with both sides in 8 bits: integer products, summed exactly, scaled once per row and column.

    Args:
        x: [n, in].
        weight: [out, in].

    Returns:
        [n, out], in the dtype of `x`.
    """
    xq, x_scale = quantize_int8(x)
    wq, w_scale = quantize_int8(weight)
    exact = xq.to(torch.int32) @ wq.to(torch.int32).T
    return exact.to(x.dtype) * x_scale * w_scale.T
