"""Finding the routed experts of a transformers model, of any release from 4.40 on.

transformers 5 stacks the experts of a layer in one module that takes the routing: whatever the class is called, a
plain one fits. transformers 4 has one class of MoE block per family, and each that fits has a row here.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn

from ktmoe.checkpoints import CheckpointNames, ExpertKey
from ktmoe.experts import MoEExperts
from ktmoe.models.blocks import (
    Row,
    ernie,
    gate_decides,
    give_back,
    is_taken_over,
    softmax_top_k,
    sorted_by_expert,
    sparsemixer,
    take_over,
)
from ktmoe.types import PROJECTIONS, ExpertWeights, KTError, MoEShape


_V4 = transformers.__version__.startswith("4.")
_SOFTMAX = Row(softmax_top_k)
_SHARED_GATED = Row(softmax_top_k, shared="shared_expert", shared_gate="shared_expert_gate")
_TOP2 = Row(softmax_top_k, jitter="jitter_noise")
_GATE = Row(gate_decides, shared="shared_experts", returns_logits=False)
# transformers 5 records the router's logits at the router; the block keeps its old experts until 5.6.
_PARALLEL = Row(sorted_by_expert, router="router", returns_logits=_V4, holders=("input_linear", "output_linear"))

ROWS = {
    "DeepseekV2MoE": _GATE,
    "DeepseekV3MoE": _GATE,
    "Dots1MoE": _GATE,
    "Ernie4_5_MoeSparseMoeBlock": Row(ernie, shared="shared_experts"),
    "FlexOlmoSparseMoeBlock": _SOFTMAX,
    "Glm4MoeMoE": _GATE,
    "Glm4vMoeTextMoE": _GATE,
    "GraniteMoeHybridMoE": _PARALLEL,
    "GraniteMoeMoE": _PARALLEL,
    "GraniteMoeSharedMoE": _PARALLEL,
    "HunYuanMoEV1Moe": Row(softmax_top_k, shared="shared_mlp", returns_logits=False),
    "JambaSparseMoeBlock": Row(softmax_top_k, router="router", normalise=False),
    "MiniMaxSparseMoeBlock": _TOP2,
    "MixtralSparseMoeBlock": _TOP2,
    "OlmoeSparseMoeBlock": _SOFTMAX,
    "PhimoeSparseMoeBlock": Row(sparsemixer, jitter="input_jitter_noise"),
    "Qwen2MoeSparseMoeBlock": _SHARED_GATED,
    "Qwen3MoeSparseMoeBlock": _SOFTMAX,
    "Qwen3NextSparseMoeBlock": _SHARED_GATED,
    "Qwen3OmniMoeTalkerTextSparseMoeBlock": _SHARED_GATED,
    "Qwen3OmniMoeThinkerTextSparseMoeBlock": _SOFTMAX,
    "Qwen3VLMoeTextSparseMoeBlock": Row(softmax_top_k, transposed=True),
}
# Classes of remote code. Those of the same name in transformers do the same, except for DeepSeek-V2's auxiliary loss.
REMOTE_ROWS = {"DeepseekV2MoE": _GATE, "DeepseekV3MoE": _GATE}

# Blocks that the generic search would not see, or would give a less plain reason for.
_MISFITS = {
    "AriaTextMoELayer": "it computes all experts in grouped matrices of its own",
    "DbrxFFN": "its experts share one matrix [E * I, H] per projection",
    "DogeCDMoE": "its experts are rows of an embedding",
    "JetMoeMoE": "a bias is added to its experts' output, and JetMoE's attention is a mixture of experts too",
    "Llama4TextMoe": "the routing weights scale the experts' inputs, not their outputs",
    "LongcatFlashMoE": "some of its experts are the identity",
}
_NAMES = (PROJECTIONS, ("w1", "w3", "w2"))  # of gate, up and down in an expert module


@dataclass(frozen=True)
class Layer:
    """The routed experts of one layer of a model, as transformers holds them.

    Attributes:
        name: module name that `MoEExperts` gets.
        block: the module that `MoEExperts` becomes an attribute of.
        modules: what holds the weights now: one module, or two for a `Row` with two holders.
        row: what the block does; None if it is transformers 5's and needs nothing.
        top_k: experts per token.
    """

    name: str
    block: nn.Module
    modules: tuple[Any, ...]
    row: Row | None
    top_k: int

    def host_tensors(self) -> dict[nn.Parameter, Tensor]:
        """The parameters' values in host memory (or on meta): themselves where they are there."""
        values = ((p, p.detach()) for m in self.modules for p in m.parameters())
        return {p: t if t.is_meta else t.cpu() for p, t in values}

    def weights(self, host: Mapping[nn.Parameter, Tensor]) -> ExpertWeights:
        """The experts' weights: views of `host_tensors`, nothing is copied."""
        if isinstance(self.modules[0], nn.ModuleList):
            experts = list(self.modules[0])
            return ExpertWeights(*([host[getattr(e, name).weight] for e in experts] for name in _names(experts[0])))
        gate_up, down = (host[p] for p in _stacked(self.modules))
        if self.row is not None and self.row.transposed:
            gate_up, down = gate_up.mT, down.mT
        i = gate_up.shape[1] // 2
        return ExpertWeights(gate_up[:, :i], gate_up[:, i:], down)  # gate above up

    @property
    def num_experts(self) -> int:
        """E; no tensor is moved to know it."""
        first = self.modules[0]
        return len(first) if isinstance(first, nn.ModuleList) else int(_stacked(self.modules)[0].shape[0])

    def shape(self) -> MoEShape:
        """Its sizes, whether or not it has weights; the rank is not known here."""
        w = self.weights(self.host_tensors())
        return MoEShape(w.num_experts, w.hidden_size, w.intermediate_size, self.top_k, 1)

    def disk_names(self) -> dict[str, ExpertKey]:
        """Names that a checkpoint gives this layer's weights, where they are not those of the experts module."""
        if self.row is None or isinstance(self.modules[0], nn.ModuleList):
            return {}
        names = {id(p): f"{n}.{leaf}" for n, m in self._holders() for leaf, p in m.named_parameters()}
        gate_up, down = (names[id(p)] for p in _stacked(self.modules))
        turned = self.row.transposed
        return {
            gate_up: ExpertKey(self.name, "gate_up_proj", None, turned),
            down: ExpertKey(self.name, "down_proj", None, turned),
        }

    def put(self, experts: nn.Module) -> None:
        """Puts `MoEExperts`, or what is called as they are, into the model."""
        if self.row is None:
            setattr(self.block, self.name.rpartition(".")[2], experts)
        else:
            take_over(self.block, self.row, experts)
        # DeepSeek-V2's group-limited routing reads an attribute that transformers 5.0 to 5.6 do not set.
        if type(self.block).__name__ == "DeepseekV2Moe" and not hasattr(self.block, "num_experts"):
            cast(Any, self.block).num_experts = self.num_experts

    def _holders(self) -> Iterator[tuple[str, Any]]:
        prefix = self.name.rpartition(".")[0]
        names = self.row.holders if self.row else (self.name.rpartition(".")[2],)
        return ((f"{prefix}.{leaf}".lstrip("."), m) for leaf, m in zip(names, self.modules, strict=True))


def names_on_disk(model: nn.Module, found: Mapping[str, Layer]) -> CheckpointNames:
    """How checkpoints name the tensors of a model and of its routed experts.

    Args:
        model: with or without weights.
        found: its layers, from `find`.
    """
    others = {key: place for layer in found.values() for key, place in layer.disk_names().items()}
    return CheckpointNames(model, found, others)


def put_back(model: nn.Module, name: str, experts: MoEExperts) -> None:
    """Undoes `Layer.put`.

    Args:
        model: holds `experts`.
        name: their module name.
        experts: know the modules that held the weights.
    """
    parent, _, leaf = name.rpartition(".")
    block = model.get_submodule(parent)
    for module in experts.original:
        module.train(experts.training)
    if is_taken_over(block):
        give_back(block, experts.original)
    else:
        setattr(block, leaf, experts.original[0])


def find(model: nn.Module) -> dict[str, Layer]:
    """Every layer of routed experts, by the module name that `MoEExperts` get.

    Raises:
        KTError: there is none, one is attached already, or one does not fit.
    """
    what = type(model).__name__
    if any(isinstance(m, MoEExperts) for m in model.modules()):
        raise KTError("This model's routed experts are attached already.")
    for name, module in model.named_modules():
        if _V4 and type(module).__name__ in _MISFITS:
            reason = _MISFITS[type(module).__name__]
            raise KTError(f"{type(module).__name__} ({name}) of {what} does not fit: {reason}. {_REMEDY}")
    places = expert_modules(model)
    modules = [model.get_submodule(name) for names in places.values() for name in names]
    if len(set(map(id, modules))) < len(modules):
        raise KTError(f"{what}: layers share their experts module; ktmoe takes one per layer.")
    if not places:
        raise KTError(
            f"{what} has no MoE layer: no module of it holds routed experts. use_kt is for mixture-of-experts models; "
            "train this one without it (use_kt: false)."
        )
    found = {}
    for name, holders in places.items():
        block = model.get_submodule(name.rpartition(".")[0])
        held = tuple(model.get_submodule(holder) for holder in holders)
        row = _row(block)
        if why := _why_not(block, held, row):
            shown = block if isinstance(held[0], nn.ModuleList) or len(held) > 1 else held[0]
            raise KTError(
                f"{type(shown).__name__} ({name}) of {what} does not fit: {why}. ktmoe computes D(silu(G x) * (U x)). "
                f"{_REMEDY}"
            )
        found[name] = Layer(name, block, held, row, _top_k(model, block, name))
    return found


def expert_modules(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Names of the modules that hold routed experts' weights, whether they fit or not.

    Returns:
        By the module name that `MoEExperts` get; usually that module alone.
    """
    found: dict[str, tuple[str, ...]] = {}
    claimed: set[str] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        row = _row(module)
        if row is not None and row.holders != ("experts",):
            holders = tuple(f"{name}.{h}".lstrip(".") for h in row.holders)
            found[f"{name}.experts".lstrip(".")] = holders
            claimed.update(holders)
        elif name and name not in claimed and (_is_stacked(module) or _is_list(name, module)):
            found[name] = (name,)
    return found


def _is_stacked(module: nn.Module) -> bool:
    """Weights [E, ...] of an MLP, whatever the class is called."""
    stacked = [p for p in module.parameters(recurse=False) if p.dim() == 3 and p.shape[0] > 1]
    alike = len(stacked) >= 2 and len({p.shape[0] for p in stacked}) == 1  # no position embeddings [1, ...]
    return alike or (bool(stacked) and "Experts" in type(module).__name__)


def _is_list(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList) and name.rsplit(".", 1)[-1] == "experts" and len(module) > 1


def _row(block: nn.Module) -> Row | None:
    """What is known about a block whose experts are not the stacked ones of transformers 5."""
    package = type(block).__module__.partition(".")[0]
    row = {"transformers": ROWS, "transformers_modules": REMOTE_ROWS}.get(package, {}).get(type(block).__name__)
    if row is None or is_taken_over(block) or not all(hasattr(block, holder) for holder in row.holders):
        return None
    # transformers 5 keeps the names of blocks whose experts it stacks.
    older = len(row.holders) > 1 or isinstance(block.experts, nn.ModuleList) or (row.transposed and _V4)
    return row if older else None


_REMEDY = "Train this model without ktmoe (use_kt: false)."
_NEWER = "With transformers 5.2 or later, which stacks experts, ktmoe takes every model whose experts are plain"


def _why_not(block: nn.Module, held: tuple[Any, ...], row: Row | None) -> str:
    """Why ktmoe cannot compute these experts, or ""."""
    if isinstance(held[0], nn.ModuleList):
        if row is not None:
            return _why_no_list(list(held[0]))
        if not type(block).__module__.startswith("transformers."):
            return (
                f"its class comes from {type(block).__module__}, which ktmoe does not know. Use a release of "
                "transformers that has the model itself, and leave out trust_remote_code"
            )
        return f"transformers {transformers.__version__} calls its experts one by one, in its own way. {_NEWER}"
    if row is not None:
        return _why_not_silu(getattr(block, "activation", None) or getattr(held[0], "act_fn", None))
    return _why_not_plain(held[0])


def _why_no_list(experts: list[Any]) -> str:
    names = _names(experts[0])
    for e, expert in enumerate(experts):
        matrices = [getattr(expert, name, None) for name in names]
        if any(type(m) is not nn.Linear for m in matrices) or len(list(expert.parameters())) != len(names):
            biases = any(getattr(m, "bias", None) is not None for m in matrices)
            held = "biases" if biases else ", ".join(type(m).__name__ for m in matrices)
            return f"expert {e} is {type(expert).__name__} with {held}; expected nn.Linear for {', '.join(names)}"
    return _why_not_silu(getattr(experts[0], "act_fn", None))


def _why_not_plain(module: Any) -> str:
    """For an experts module of transformers 5."""
    held = dict(module.named_parameters())
    if getattr(module, "has_bias", False) or any(name.endswith("bias") for name in held):
        return "its experts have biases"
    if not getattr(module, "has_gate", True) or set(held) == {"up_proj", "down_proj"}:
        return "its experts have no gate"
    gate_up, down = held.get("gate_up_proj"), held.get("down_proj")
    if gate_up is None or down is None or len(held) > 2:
        return f"it has parameters {sorted(held)}; expected gate_up_proj and down_proj alone"
    takes = list(inspect.signature(module.forward).parameters)
    if takes != ["hidden_states", "top_k_index", "top_k_weights"]:
        return f"it is called with ({', '.join(takes)}), not (hidden_states, top_k_index, top_k_weights)"
    e, two_i, h = gate_up.shape
    if getattr(module, "is_transposed", False) or tuple(down.shape) != (e, h, two_i // 2):
        return (
            f"gate_up_proj {tuple(gate_up.shape)} and down_proj {tuple(down.shape)} are not [E, 2I, H] and [E, H, I]"
        )
    gate = getattr(type(module), "_apply_gate", None)
    if gate is not None and not gate.__module__.startswith("transformers.integrations"):
        return "it has a gate function of its own"
    return _why_not_silu(getattr(module, "act_fn", None))


def _why_not_silu(act: Any) -> str:
    x = torch.linspace(-6, 6, 25, device="cpu")
    if act is None or not torch.allclose(act(x), nn.functional.silu(x)):
        return f"its activation is {type(act).__name__}, not silu"
    return ""


def _names(expert: Any) -> tuple[str, ...]:
    return next((names for names in _NAMES if hasattr(expert, names[0])), PROJECTIONS)


def _stacked(modules: tuple[Any, ...]) -> tuple[nn.Parameter, nn.Parameter]:
    if len(modules) == 2:
        return modules[0].weight, modules[1].weight
    return modules[0].gate_up_proj, modules[0].down_proj


def _top_k(model: Any, block: Any, name: str) -> int:
    """Experts per token, from the router beside the experts, else from the block or the configuration."""
    for module in (*block.children(), block):
        value = getattr(module, "top_k", None)
        if isinstance(value, int):
            return value
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    for key in ("num_experts_per_tok", "moe_k", "moe_topk"):
        value = getattr(config, key, None)
        if isinstance(value, int):
            return value
    raise KTError(f"{name}: neither its router nor the model's configuration says how many experts a token has.")
