"""What a layer of routed experts computes.

E experts, H hidden size, I intermediate size, T tokens, K experts per token, r LoRA rank.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import silu


LORA_NAMES = (
    "gate_proj.lora_A",  # [E, r, H]
    "gate_proj.lora_B",  # [E, I, r]
    "up_proj.lora_A",  # [E, r, H]
    "up_proj.lora_B",  # [E, I, r]
    "down_proj.lora_A",  # [E, r, I]
    "down_proj.lora_B",  # [E, H, r]
)


def lora_linear(
    x: Tensor, weight: Tensor, lora_A: Tensor | None = None, lora_B: Tensor | None = None, scaling: float = 1.0
) -> Tensor:
    """`W x + scaling * B (A x)` for one projection of one expert (LoRA: Hu et al. 2021, equation 3).

    Args:
        x: inputs, [n, in].
        weight: frozen weight, [out, in].
        lora_A: [r, in], or None for no LoRA.
        lora_B: [out, r].
        scaling: alpha / r.

    Returns:
        [n, out].
    """
    y = x @ weight.T
    if lora_A is not None and lora_B is not None:
        y = y + scaling * (x @ lora_A.T @ lora_B.T)
    return y


def expert_forward(
    x: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    lora: Mapping[str, Tensor] | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """One expert, a SwiGLU MLP: `D (silu(G x) * (U x))`, every projection with its LoRA.

    Args:
        x: [n, H].
        gate_proj: [I, H].
        up_proj: [I, H].
        down_proj: [H, I].
        lora: this expert's six matrices under the names of `LORA_NAMES`, without the leading E; or None.
        scaling: alpha / r.

    Returns:
        [n, H].
    """

    def linear(name: str, x: Tensor, weight: Tensor) -> Tensor:
        if lora is None:
            return lora_linear(x, weight)
        return lora_linear(x, weight, lora[f"{name}.lora_A"], lora[f"{name}.lora_B"], scaling)

    gate = linear("gate_proj", x, gate_proj)  # [n, I]
    up = linear("up_proj", x, up_proj)  # [n, I]
    return linear("down_proj", silu(gate) * up, down_proj)


def experts_forward(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_proj: Tensor | Sequence[Tensor],
    up_proj: Tensor | Sequence[Tensor],
    down_proj: Tensor | Sequence[Tensor],
    lora: Mapping[str, Tensor] | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """The routed experts: `out[t] = sum_k top_k_weights[t, k] * expert[top_k_index[t, k]](hidden_states[t])`.

    An index outside [0, E) contributes nothing: transformers 5 writes `num_experts` for "skip", others -1. An expert
    named twice by one token counts twice.

    Args:
        hidden_states: [T, H], fp32 or fp64.
        top_k_index: [T, K] integers.
        top_k_weights: [T, K].
        gate_proj: [E, I, H], a tensor or a sequence of E matrices.
        up_proj: [E, I, H].
        down_proj: [E, H, I].
        lora: six stacked tensors under the names of `LORA_NAMES`, or None.
        scaling: alpha / r.

    Returns:
        [T, H], in the dtype of `hidden_states`.
    """
    out = torch.zeros_like(hidden_states)
    dtype = hidden_states.dtype
    for e in range(len(gate_proj)):
        token, slot = torch.where(top_k_index == e)
        if token.numel() == 0:
            continue
        lora_e = {name: tensor[e].to(dtype) for name, tensor in lora.items()} if lora else None
        weights = (gate_proj[e].to(dtype), up_proj[e].to(dtype), down_proj[e].to(dtype))
        y = expert_forward(hidden_states[token], *weights, lora_e, scaling)  # [n, H]
        out = out.index_add(0, token, y * top_k_weights[token, slot, None].to(dtype))
    return out
