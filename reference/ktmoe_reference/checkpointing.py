"""What activation checkpointing means: nothing is kept but the inputs, and backward runs the forward again."""

from typing import Any

import torch
from torch import Tensor

from ktmoe_reference.experts import experts_forward


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fn: Any, *inputs: Tensor) -> Tensor:
        ctx.fn = fn
        ctx.save_for_backward(*inputs)
        return fn(*inputs)  # runs without recording: no activation survives this line

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        inputs = [t.detach().requires_grad_(t.is_floating_point()) for t in ctx.saved_tensors]
        with torch.enable_grad():
            out = ctx.fn(*inputs)
        wanted = [t for t in inputs if t.requires_grad]
        grads = iter(torch.autograd.grad(out, wanted, grad_out, allow_unused=True))
        return None, *(next(grads) if t.requires_grad else None for t in inputs)


def checkpointed_experts_forward(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    lora: dict[str, Tensor] | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """`experts_forward`, bit for bit, forward and backward, keeping only its inputs in between. [T, H]."""
    names = tuple(lora or ())

    def forward(x: Tensor, index: Tensor, weights: Tensor, *lora_tensors: Tensor) -> Tensor:
        lora_now = dict(zip(names, lora_tensors, strict=True)) or None
        return experts_forward(x, index, weights, gate_proj, up_proj, down_proj, lora_now, scaling)

    return _Recompute.apply(forward, hidden_states, top_k_index, top_k_weights, *(lora or {}).values())
