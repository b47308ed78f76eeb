"""What tensor parallelism means for a layer of experts: slice the intermediate dimension, sum the parts."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ktmoe_reference.experts import experts_forward


# The dimension of each stacked tensor that runs along I; the others are held whole by every part.
_INTERMEDIATE_DIM = {
    "gate_proj": 1,
    "up_proj": 1,
    "down_proj": 2,
    "gate_proj.lora_B": 1,
    "up_proj.lora_B": 1,
    "down_proj.lora_A": 2,
}


def shard_intermediate(tensors: Mapping[str, Tensor], tp: int) -> list[dict[str, Tensor]]:
    """Cuts stacked weights and LoRA into `tp` equal parts along the intermediate dimension.

    silu and the product with up act element by element on I, and down sums over I: so the parts' outputs add up to the
    whole layer's, LoRA included (its A of down and its B of gate and up are cut with their projections).

    Args:
        tensors: by name, as `experts_forward` takes them: [E, I, H], [E, H, I] and the six of `LORA_NAMES`.
        tp: number of parts; must divide I.

    Returns:
        `tp` dicts with the same names.
    """
    parts: list[dict[str, Tensor]] = [{} for _ in range(tp)]
    for name, tensor in tensors.items():
        dim = _INTERMEDIATE_DIM.get(name)
        pieces = [tensor] * tp if dim is None else torch.tensor_split(tensor, tp, dim=dim)
        for part, piece in zip(parts, pieces, strict=True):
            part[name] = piece
    return parts


def tensor_parallel_experts_forward(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    lora: Mapping[str, Tensor] | None = None,
    scaling: float = 1.0,
    *,
    tp: int,
) -> Tensor:
    """`experts_forward` as the sum over `tp` parts, each holding I / tp of the intermediate dimension. [T, H]."""
    whole = {"gate_proj": gate_proj, "up_proj": up_proj, "down_proj": down_proj, **(lora or {})}
    out = torch.zeros_like(hidden_states)
    for part in shard_intermediate(whole, tp):
        weights = (part.pop("gate_proj"), part.pop("up_proj"), part.pop("down_proj"))
        out = out + experts_forward(hidden_states, top_k_index, top_k_weights, *weights, part or None, scaling)
    return out
