"""The one autograd Function that drives every backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from ktmoe_reference import LORA_NAMES
from torch import Tensor
from torch.autograd.function import once_differentiable

from ktmoe.interface import Backend
from ktmoe.types import Inputs, Lora, MoEShape
from ktmoe.validation import check_unchanged, make_inputs


@torch.compiler.disable
def run_experts(
    backend: Backend,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    lora: Lora | None,
    training: bool = False,
) -> Tensor:
    """Computes one layer of experts, differentiable in the hidden states, the routing weights and the LoRA.

    Args:
        backend: loaded.
        hidden_states: [T, H], any floating dtype, any device.
        top_k_index: [T, K].
        top_k_weights: [T, K].
        lora: the LoRA to apply, or None.
        training: the module's flag. Without grad, it tells a first pass of reentrant checkpointing from evaluation.

    Returns:
        [T, H] in the dtype and on the device of `hidden_states`.
    """
    tensors = tuple(lora) if lora else ()
    # Read here: inside forward() grad mode is always off, and under reentrant checkpointing needs_input_grad is true
    # for the LoRA even in the first pass, which runs without grad.
    wanted = any(t.requires_grad for t in (hidden_states, top_k_weights, *tensors))
    recorded = torch.is_grad_enabled() and wanted
    # A bet on the recompute to come. Lost (a KL pass, generating while training), it costs copies of input and output.
    bet = backend.bets and training and not torch.is_inference_mode_enabled() and any(t.requires_grad for t in tensors)
    scaling = lora.scaling if lora else 1.0
    flags = recorded, recorded or bet
    return _RunExperts.apply(backend, *flags, scaling, hidden_states, top_k_index, top_k_weights, *tensors)


class _RunExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        backend: Backend,
        recorded: bool,
        save: bool,
        scaling: float,
        hidden_states: Tensor,
        index: Tensor,
        weights: Tensor,
        *lora: Tensor,
    ) -> Tensor:
        with backend.working():
            inputs = _inputs(backend, hidden_states, index, weights, lora, scaling)
            out, ticket = backend.forward(inputs, save=save)
        if recorded:
            ctx.backend, ctx.scaling = backend, scaling
            # The ticket is a tensor and saved like one, so that checkpointing's recompute replaces it with its own.
            # The user's own tensors are saved, not the backend's casts: autograd then notices a change in place.
            ctx.save_for_backward(hidden_states, index, weights, torch.tensor(ticket, device="cpu"), *lora)
        return out.to(hidden_states.device, hidden_states.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        hidden_states, index, weights, ticket, *lora = ctx.saved_tensors
        check_unchanged(grad_output, hidden_states, index, weights, _by_name(lora, ctx.scaling), ctx.backend.shape)
        with ctx.backend.working():
            inputs = _inputs(ctx.backend, hidden_states, index, weights, tuple(lora), ctx.scaling)
            grad = grad_output.to("cpu", inputs.hidden_states.dtype).resolve_neg().contiguous()
            grads = ctx.backend.backward(int(ticket), inputs, grad)
        found = [g.to(t.dtype) for g, t in zip(grads.lora or [], lora, strict=True)]
        grad_x = grads.hidden_states.to(hidden_states.device, hidden_states.dtype)
        grad_w = grads.top_k_weights.to(weights.device, weights.dtype)
        return None, None, None, None, grad_x, None, grad_w, *found


def _inputs(
    backend: Backend, hidden_states: Tensor, index: Tensor, weights: Tensor, lora: tuple[Tensor, ...], scaling: float
) -> Inputs:
    shape: MoEShape = backend.shape
    return make_inputs(hidden_states, index, weights, _by_name(lora, scaling), shape, backend.compute_dtype)


def _by_name(lora: Sequence[Tensor], scaling: float) -> Lora | None:
    return Lora(dict(zip(LORA_NAMES, lora, strict=True)), scaling) if lora else None
