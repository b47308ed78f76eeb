"""Granite's MoE block before transformers 5.7, brought into the form that it has from 5.7 on.

Until then its experts are two modules of one stacked weight each, which the block calls with tokens sorted by expert.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn


# Where transformers 5.7 reads the checkpoint's names to.
RENAMINGS = (
    (r"block_sparse_moe\.input_linear\.weight", "block_sparse_moe.experts.gate_up_proj"),
    (r"block_sparse_moe\.output_linear\.weight", "block_sparse_moe.experts.down_proj"),
)


class GraniteExperts(nn.Module):
    """The two stacked weights of a block as one module of routed experts, by the names of transformers 5.

    Attributes:
        gate_up_proj: [E, 2I, H].
        down_proj: [E, H, I].
        act_fn: the activation.
    """

    def __init__(self, block: Any) -> None:
        """Takes the block's own parameters over; no copy."""
        super().__init__()
        self.gate_up_proj, self.down_proj = block.input_linear.weight, block.output_linear.weight
        self.act_fn = block.activation
        self.stock = (block.input_linear, block.output_linear)  # no submodules

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Never called: another module takes this one's place."""
        raise NotImplementedError


class _Unified:
    """What a unified block does differently; mixed into the block's class."""

    router: Any
    experts: Any

    def forward(self, layer_input: Tensor) -> Tensor:
        """[B, L, H] to [B, L, H]."""
        x = layer_input.reshape(-1, layer_input.shape[-1])  # [T, H]
        *_, router_logits = self.router(x)  # called as before: hooks record its output
        top_k_logits, top_k_index = router_logits.topk(self.router.top_k, dim=1)  # [T, K]
        weights = torch.softmax(top_k_logits, dim=1).type_as(x)
        return self.experts(x, top_k_index, weights).view(layer_input.shape)


def unify(model: nn.Module) -> list[nn.Module]:
    """Gives every such block of a model an `experts` module, in place. Returns the blocks, for `restore`."""
    blocks: list[Any] = [m for m in model.modules() if _is_granite(m)]
    for block in blocks:
        block.experts = GraniteExperts(block)
        del block.input_linear, block.output_linear
        kind: Any = type(block)
        block.__class__ = _unified_class(kind)
    return blocks


def restore(blocks: list[nn.Module]) -> None:
    """Undoes `unify`, where the blocks have their own experts again."""
    block: Any
    for block in blocks:
        block.input_linear, block.output_linear = block.experts.stock
        del block.experts
        block.__class__ = type(block).__mro__[2]


def unified(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model that `unify` changed."""
    return [m for m in model.modules() if isinstance(m, _Unified)]


def _is_granite(module: Any) -> bool:
    """Transformers 5 only: the block of transformers 4 returns the router's logits too."""
    import transformers

    names = {"GraniteMoeMoE", "GraniteMoeSharedMoE", "GraniteMoeHybridMoE"}
    return (
        type(module).__name__ in names
        and hasattr(module, "input_linear")
        and not transformers.__version__.startswith("4.")
    )


@functools.cache
def _unified_class(cls: Any) -> Any:
    """A subclass, so that hooks by class still find the block."""
    return type(cls.__name__, (_Unified, cls), {"__doc__": cls.__doc__, "__module__": cls.__module__})
