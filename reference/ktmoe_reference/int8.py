"""What INT8 experts compute: weights in 8 bits per output row, and everything that meets them in 8 bits per token.

An expert's steps, each result rounded to bf16, in the forward and in the backward alike:

    gate, up = G x, U x          integer products of quantised x and quantised rows, scaled once; then + LoRA
    mid      = silu(gate) * up
    y        = D mid             mid is quantised anew, per token; then + LoRA
    out      = sum of routing weight * y over experts, in fp32, rounded once

LoRA is never quantised: it takes x and mid as they are before quantisation. In the backward, the gradient that reaches
a product is quantised per token and multiplied with a backward copy of the weight, in 8 bits per input column:
quantised from what the forward's 8 bits say (`requantised`, a buffer that layers share), or from the weight itself.
Sums over tokens (LoRA gradients) and over experts are not rounded in between.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from ktmoe_reference.tensor_parallel import shard_intermediate


def quantize_int8(x: Tensor, dim: int = -1) -> tuple[Tensor, Tensor]:
    """Symmetric 8-bit quantisation along one dimension, in fp32: `scale = max|x| / 127`, `q = round(x * (1 / scale))`.

    Halves go to the even neighbour.

    Args:
        x: floating point.
        dim: along which a scale is shared: -1 for a scale per row.

    Returns:
        q: int8, the shape of `x`; scale: fp32, 1 along `dim` (zero where all of `x` is zero, and so is q).
    """
    x = x.float()
    scale = x.abs().amax(dim, keepdim=True) / 127
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    return (x * inverse).round().to(torch.int8), scale


def dequantize_int8(q: Tensor, scale: Tensor) -> Tensor:
    """`q * scale`, in the dtype of `scale`."""
    return q.to(scale.dtype) * scale


def int8_matmul(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """`x @ (q * scale)`, `x` quantised per row: products of integers, summed, scaled once.

    Args:
        x: [n, in]. The sums are computed in its dtype: exactly in fp64, almost so in fp32.
        q: [in, out] int8.
        scale: [1, out].

    Returns:
        [n, out] in the dtype of `x`.
    """
    xq, x_scale = quantize_int8(x)
    return (xq.to(x.dtype) @ q.to(x.dtype)) * (x_scale * scale).to(x.dtype)


class _Bf16(torch.autograd.Function):
    """Rounds to bf16 and keeps the dtype: the number in the forward, its gradient in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.to(torch.bfloat16).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.to(torch.bfloat16).to(grad.dtype)


class _Int8Linear(torch.autograd.Function):
    """`x W^T` in 8 bits, and the gradient of `x` in 8 bits; W [out, in] is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, requantised: bool) -> Tensor:
        q, scale = quantize_int8(weight)
        ctx.weight, ctx.quantised, ctx.requantised = weight, (q, scale), requantised
        return int8_matmul(x, q.T, scale.T)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        source = dequantize_int8(*ctx.quantised) if ctx.requantised else ctx.weight
        return _round_bf16(int8_matmul(grad, *quantize_int8(source, dim=0))), None, None


def _round_bf16(x: Tensor) -> Tensor:
    rounded: Tensor = _Bf16.apply(x)
    return rounded


def int8_expert_forward(
    x: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    lora: Mapping[str, Tensor] | None = None,
    scaling: float = 1.0,
    requantised: bool = True,
) -> Tensor:
    """`expert_forward` in INT8. Gradients by autograd are INT8's own, not those of the exact formula.

    Args:
        x: [n, H], numbers of bf16 in fp32 or fp64.
        gate_proj: [I, H].
        up_proj: [I, H].
        down_proj: [H, I].
        lora: this expert's six matrices under the names of `LORA_NAMES`, without the leading E; or None.
        scaling: alpha / r.
        requantised: whether the backward copies are quantised from the forward's 8 bits.

    Returns:
        [n, H].
    """

    def linear(name: str, x: Tensor, weight: Tensor) -> Tensor:
        y = _round_bf16(_Int8Linear.apply(x, weight, requantised))
        if lora is None:
            return y
        return _round_bf16(y + scaling * (x @ lora[f"{name}.lora_A"].T @ lora[f"{name}.lora_B"].T))

    mid = _round_bf16(silu(linear("gate_proj", x, gate_proj)) * linear("up_proj", x, up_proj))  # [n, I]
    return linear("down_proj", mid, down_proj)


def int8_experts_forward(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    lora: Mapping[str, Tensor] | None = None,
    scaling: float = 1.0,
    *,
    requantised: bool = True,
    tp: int = 1,
) -> Tensor:
    """`experts_forward` in INT8: what an INT8 kernel is judged by. Two arguments more say how the kernel is built.

    Args:
        hidden_states: [T, H], numbers of bf16 in fp32 or fp64.
        top_k_index: [T, K] integers.
        top_k_weights: [T, K].
        gate_proj: [E, I, H].
        up_proj: [E, I, H].
        down_proj: [E, H, I].
        lora: six stacked tensors under the names of `LORA_NAMES`, or None.
        scaling: alpha / r.
        requantised: whether the backward copies are quantised from the forward's 8 bits.
        tp: parts of I, each quantised by itself: rows of down, and mid, have a scale per part.

    Returns:
        [T, H], in the dtype of `hidden_states`.
    """
    whole = {"gate_proj": gate_proj, "up_proj": up_proj, "down_proj": down_proj, **(lora or {})}
    x = _round_bf16(hidden_states)  # its gradient leaves in bf16
    out = torch.zeros_like(x)
    for part in shard_intermediate(whole, tp):
        weights = [part.pop(name) for name in ("gate_proj", "up_proj", "down_proj")]
        for e in range(len(gate_proj)):
            token, slot = torch.where(top_k_index == e)
            if token.numel() == 0:
                continue
            lora_e = {name: tensor[e].to(x.dtype) for name, tensor in part.items()} if lora else None
            gate, up, down = (w[e].to(x.dtype) for w in weights)
            y = int8_expert_forward(x[token], gate, up, down, lora_e, scaling, requantised)
            out = out.index_add(0, token, y * top_k_weights[token, slot, None].to(x.dtype))
    return _round_bf16(out)
