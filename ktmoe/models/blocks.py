"""MoE blocks of transformers 4 and of remote code: the block around the experts runs here, its router stays its own.

transformers 5 calls an experts module with the routing; there, nothing but that module is replaced. Older blocks loop
over their experts between routing and shared experts, so the block's `forward` is replaced too: by a subclass of its
class, which `isinstance` still takes for the block (that is how transformers finds router logits).
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Routing:
    """What a router decided for T tokens.

    Attributes:
        index: [T, K] int64.
        weights: [T, K], in the dtype that the block multiplies its experts' outputs by.
        logits: [T, E], for the auxiliary loss; None where the block keeps them to itself.
        finish: what the block does with the experts' output before anything is added to it.
    """

    index: Tensor
    weights: Tensor
    logits: Tensor | None = None
    finish: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Row:
    """What distinguishes one class of blocks from the others.

    Attributes:
        route: (block, hidden states [B, S, H]) -> `Routing`.
        router: attribute of the router.
        normalise: whether the weights of a token's experts add up to 1, where the block has no `norm_topk_prob`.
        shared: attribute of the shared experts; they may be absent.
        shared_gate: attribute of a linear layer whose sigmoid scales them.
        jitter: attribute with the noise that multiplies the inputs in training.
        returns_logits: whether the block returns (output, router logits) or the output alone.
        holders: attributes of the modules that hold the experts' weights.
        transposed: whether stacked weights are [E, in, out].
    """

    route: Callable[[Any, Tensor], Routing]
    router: str = "gate"
    normalise: bool = True
    shared: str = ""
    shared_gate: str = ""
    jitter: str = ""
    returns_logits: bool = True
    holders: tuple[str, ...] = ("experts",)
    transposed: bool = False


def softmax_top_k(block: Any, hidden_states: Tensor) -> Routing:
    """fp32 softmax over all experts, the K largest, in the dtype of the hidden states."""
    row: Row = type(block).row
    logits = getattr(block, row.router)(hidden_states)
    logits = logits.reshape(-1, logits.shape[-1])  # [T, E]
    weights, index = torch.topk(nn.functional.softmax(logits, dim=1, dtype=torch.float), block.top_k, dim=-1)
    if getattr(block, "norm_topk_prob", row.normalise):
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return Routing(index, weights.to(hidden_states.dtype), logits)


def gate_decides(block: Any, hidden_states: Tensor) -> Routing:
    """A gate that gives indices and fp32 weights; DeepSeek's remote code adds an auxiliary loss in training."""
    with _without_training_assertion(block):
        index, weights, *rest = getattr(block, type(block).row.router)(hidden_states)
    loss = rest[0] if rest else None
    if loss is None:
        return Routing(index, weights)
    add = _beside(block, "AddAuxiliaryLoss").apply  # gives the loss its gradient
    return Routing(index, weights, finish=lambda out: add(out, loss))


def sparsemixer(block: Any, hidden_states: Tensor) -> Routing:
    """Phi's own function, which samples in training and has a gradient of its own."""
    logits = block.gate(hidden_states.reshape(-1, hidden_states.shape[-1]))
    choose = _beside(block, "sparsemixer")
    weights, index = choose(logits, jitter_eps=block.router_jitter_noise, training=block.training)
    return Routing(index, weights, logits)


def ernie(block: Any, hidden_states: Tensor) -> Routing:
    """fp32 softmax, chosen with a correction bias and weighted without it."""
    with torch.autocast(hidden_states.device.type, enabled=False):
        logits = block.gate(hidden_states.reshape(-1, hidden_states.shape[-1]).float())
        scores = nn.functional.softmax(logits, dim=1, dtype=torch.float)
        index = torch.topk(block.moe_statics(scores), block.top_k, dim=-1)[1]
        weights = torch.gather(scores, dim=-1, index=index)
        weights = weights / torch.clamp(weights.sum(dim=-1, keepdim=True), min=block.norm_min)
    return Routing(index, weights.to(hidden_states.dtype), logits)


def sorted_by_expert(block: Any, hidden_states: Tensor) -> Routing:
    """Granite's router: softmax over the K largest logits, given sorted by expert; put back in the tokens' order."""
    order, _, gates, sizes, logits = block.router(hidden_states.reshape(-1, hidden_states.shape[-1]))
    back = order.argsort()  # [T * K]: where each (token, choice) went
    experts = torch.arange(len(sizes), device=order.device).repeat_interleave(torch.tensor(sizes, device=order.device))
    k = block.router.top_k
    return Routing(experts[back].view(-1, k), gates[back].view(-1, k), logits)


def _beside(block: Any, name: str) -> Any:
    """A name of the module that the block's class comes from."""
    return type(block).stock.forward.__globals__[name]


@contextmanager
def _without_training_assertion(block: Any) -> Iterator[None]:
    """DeepSeek-V3's remote gate, written for inference, asserts that it is not in training; it computes the same."""
    gate = getattr(block, type(block).row.router)
    training = gate.training
    if getattr(gate, "topk_method", None) == "noaux_tc":
        gate.training = False
    try:
        yield
    finally:
        gate.training = training


def _forward(self: Any, hidden_states: Tensor) -> Any:
    """The block, its experts called once for all tokens.

    Args:
        self: the block.
        hidden_states: [B, S, H].

    Returns:
        [B, S, H]; with the router's logits [B * S, E] where the block returns them.
    """
    row: Row = type(self).row
    noise = getattr(self, row.jitter) if row.jitter and self.training else 0
    if noise > 0:
        hidden_states = hidden_states * torch.empty_like(hidden_states).uniform_(1.0 - noise, 1.0 + noise)
    routing = row.route(self, hidden_states)
    out = self.experts(hidden_states.reshape(-1, hidden_states.shape[-1]), routing.index, routing.weights)
    out = out.view(hidden_states.shape)
    if routing.finish is not None:
        out = routing.finish(out)
    shared = getattr(self, row.shared, None) if row.shared else None
    if shared is not None:
        added = shared(hidden_states)
        if row.shared_gate:
            added = torch.sigmoid(getattr(self, row.shared_gate)(hidden_states)) * added
        out = out + added
    return (out, routing.logits) if row.returns_logits else out


@functools.cache
def _subclass(cls: Any, row: Row) -> Any:
    """The block's class with `_forward`. The name stays: transformers and peft go by it."""
    own = {"forward": _forward, "__reduce_ex__": _reduced, "row": row, "stock": cls}
    return type(cls.__name__, (cls,), {**own, "__module__": cls.__module__, "__doc__": cls.__doc__})


def _reduced(block: Any, protocol: Any) -> Any:
    """For pickle, torch.save and copy, which do not find the class by its name."""
    return _remade, (type(block).stock, type(block).row), dict(vars(block))


def _remade(stock: Any, row: Row) -> Any:
    cls = _subclass(stock, row)
    return cls.__new__(cls)


def take_over(block: Any, row: Row, experts: nn.Module) -> None:
    """Puts `experts` into a block, in place: as `block.experts`, and its class with a forward that calls them."""
    for name in row.holders:
        if name != "experts":
            delattr(block, name)
    block.experts = experts
    stock: Any = type(block)
    _set_class(block, _subclass(stock, row))


def give_back(block: Any, original: tuple[nn.Module, ...]) -> None:
    """Undoes `take_over`.

    Args:
        block: from `take_over`.
        original: the modules that held the weights, in the order of `Row.holders`.
    """
    cls: Any = type(block)
    if "experts" not in cls.row.holders:
        del block.experts
    for name, module in zip(cls.row.holders, original, strict=True):
        setattr(block, name, module)
    _set_class(block, cls.stock)


def is_taken_over(block: nn.Module) -> bool:
    """Whether `take_over` was here."""
    return hasattr(type(block), "stock")


def _set_class(block: Any, cls: Any) -> None:
    """Sets the class, also where the forward of the former one is kept as an attribute of the object.

    transformers 4.57 leaves it there after recording router logits, and accelerate's hooks call it.
    """
    former = type(block).forward
    block.__class__ = cls
    for name in ("forward", "_old_forward"):
        kept = vars(block).get(name)
        if isinstance(kept, types.MethodType) and kept.__func__ is former:
            setattr(block, name, types.MethodType(cls.forward, block))
