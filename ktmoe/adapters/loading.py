"""An adapter's files brought into a model: which modules it adapts, and its numbers, all of them or none."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from ktmoe.adapters.config import PREFIX, patterns, scale, short_names
from ktmoe.adapters.files import Adapter, read_adapter
from ktmoe.adapters.guard import our_own
from ktmoe.adapters.layer import LoraExperts
from ktmoe.adapters.rollback import all_or_nothing
from ktmoe.adapters.targets import layout_of, with_experts_layer
from ktmoe.experts import MoEExperts
from ktmoe.types import KTError


_RESIZE = (
    "The vocabulary was another one when the adapter was trained: call `model.resize_token_embeddings({rows})` before "
    "the adapter is loaded; in LLaMA-Factory give the add_tokens, add_special_tokens or resize_vocab of the training."
)


def read(model: Any, source: str, config: LoraConfig | None, hub: Mapping[str, Any]) -> Adapter:
    """An adapter from disk that fits a model, with adapters or without. Nothing is changed.

    Raises:
        KTError: files that are damaged, incomplete, or of another model.
    """
    experts = {n.removesuffix(".base_layer"): m for n, m in model.named_modules() if isinstance(m, MoEExperts)}
    shapes = {n.removeprefix(PREFIX): m.shape(1) for n, m in experts.items()}
    adapter = read_adapter(source, shapes, layout_of(model), config, **hub)
    names = {n.removeprefix(PREFIX) for n in plain_names(model)}
    foreign = sorted(set(adapter.modules) - names)
    if foreign:
        raise KTError(
            f"{source}: the adapter does not fit this model, which has no module of the name {foreign[0]} "
            f"({len(foreign)} such). Was it trained on another model?"
        )
    return adapter


def config_of(adapter: Adapter, model: nn.Module, is_trainable: bool) -> LoraConfig:
    """The configuration that injects exactly the modules that an adapter's file has.

    On disk gate_proj names the routed experts and any dense MLP alike; the keys say which of them were trained.
    """
    config = copy.deepcopy(adapter.config)
    config.inference_mode = not is_trainable
    modules = dict(adapter.modules)
    linear = {n for n, m in model.named_modules() if n in modules and _has_layer(m)}
    ranks: dict[str, float] = {n: m.rank for n, m in modules.items()}
    alphas = {n: m.alpha for n, m in modules.items()}
    for name, lora in adapter.experts.items():
        ranks[name] = lora.rank
        alphas[name] = lora.scaling * (math.sqrt(lora.rank) if config.use_rslora else lora.rank)
    config.target_modules = short_names(linear | set(adapter.experts), plain_names(model))
    named = {n if n in linear or n in adapter.experts else f"{n}.weight": n for n in ranks}
    config.rank_pattern = patterns({key: ranks[n] for key, n in named.items()}, config.r)
    config.alpha_pattern = patterns({key: alphas[n] for key, n in named.items()}, config.lora_alpha)
    if hasattr(config, "target_parameters"):  # what is no layer of peft's, such as a router: by its weight
        config.target_parameters = sorted(f"{n}.weight" for n in set(modules) - linear) or None
    config.layers_to_transform = config.layers_pattern = None
    if getattr(config, "exclude_modules", None):
        config.exclude_modules = None
    return with_experts_layer(config)


def _has_layer(module: nn.Module) -> bool:
    """Whether peft has a LoRA layer for it as a module."""
    return isinstance(module, (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)) or (
        hasattr(module, "base_layer") and not hasattr(module, "parameter_name")
    )


def fill(model: Any, adapter: Adapter, name: str) -> Any:
    """Copies an adapter's tensors into a PeftModel that has its modules.

    Args:
        model: a PeftModel.
        adapter: as its files say it.
        name: of the adapter in the model.

    Returns:
        What torch says of missing and unexpected keys: none.

    Raises:
        KTError: tensors that are missing, of a wrong shape, or that have no place. The model stays as it was.
    """
    layers = {n: m for n, m in expert_layers(model) if m.stacked(name)}
    named = {n.removeprefix(PREFIX): m for n, m in layers.items()}
    if set(named) != set(adapter.experts) or any(named[n].r[name] != e.rank for n, e in adapter.experts.items()):
        raise KTError(
            f"{adapter.source}: adapter {name!r} of this model has LoRA on {len(named)} layers of routed "
            f"experts, the file on {len(adapter.experts)}, or of another rank. Load it under a new name."
        )
    _check_scales(model, adapter, name, named)
    inside = tuple(f"{n}." for n in layers)
    own = {k: v for k, v in model.state_dict().items() if not inside or not k.startswith(inside)}
    whole = _check_rest(model, adapter, name, own)
    with all_or_nothing(model) as kept, our_own():
        for key in own:
            if name in key.split(".") or key in whole:
                kept.append(own[key])
        for layer in layers.values():
            for parameter in layer.stacked(name).values():
                kept.append(parameter.data)
        result = set_peft_model_state_dict(model, dict(adapter.rest), adapter_name=name)
        if result.unexpected_keys:
            raise KTError(f"{adapter.source}: not expected: {', '.join(result.unexpected_keys[:5])}.")
        with torch.no_grad():
            for n, layer in named.items():
                for key, parameter in layer.stacked(name).items():
                    parameter.copy_(adapter.experts[n].tensors[key])
    result.missing_keys[:] = []
    return result


def _check_scales(model: Any, adapter: Adapter, name: str, experts: Mapping[str, LoraExperts]) -> None:
    """Refuses numbers that would be scaled by another alpha / r than they were trained with."""
    layers = {n.removeprefix(PREFIX): m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    wanted = {n: scale(adapter.config, m.rank, m.alpha) for n, m in adapter.modules.items() if not m.parameter}
    wanted |= {n: e.scaling for n, e in adapter.experts.items()}
    for module, value in wanted.items():
        layer: Any = experts.get(module) or layers.get(module)
        if layer is None or name not in layer.r:
            continue
        rank = layer.r[name]
        here = layer.lora_alpha[name] / (math.sqrt(rank) if getattr(layer, "use_rslora", {}).get(name) else rank)
        if not math.isclose(here, value, rel_tol=1e-5):
            raise KTError(
                f"{adapter.source}: {module} is scaled by {value:.6g}, adapter {name!r} of this model by {here:.6g}. "
                "Load it under a new name."
            )
    tokens = [
        {k: list(v) for k, v in t.items()} if isinstance(t, dict) else t and list(t)
        for t in (getattr(c, "trainable_token_indices", None) for c in (adapter.config, model.peft_config[name]))
    ]
    if tokens[0] != tokens[1]:
        raise KTError(
            f"{adapter.source}: trainable_token_indices is {tokens[0]}, that of adapter {name!r} of this model "
            f"{tokens[1]}. Load it under a new name."
        )


def _check_rest(model: Any, adapter: Adapter, name: str, own: Mapping[str, Tensor]) -> set[str]:
    """Everything but the experts, against what peft itself would save: the same keys, and of the same shapes.

    Returns:
        Tensors of the base model that the file has whole, such as embeddings that were resized.
    """
    expected = get_peft_model_state_dict(model, dict(own), adapter_name=name, save_embedding_layers=False)
    missing = sorted(set(expected) - set(adapter.rest))
    whole = {k for k in adapter.rest if k not in expected and k in own}
    odd = sorted(set(adapter.rest) - set(expected) - whole)
    for key, tensor in adapter.rest.items():
        there = expected.get(key, own.get(key))
        if there is not None and there.shape != tensor.shape:
            grown = there.shape[1:] == tensor.shape[1:] and _is_vocabulary(model, key)
            raise KTError(
                f"{adapter.source}: {key} is {tuple(tensor.shape)}, expected {tuple(there.shape)}."
                + (f" {_RESIZE.format(rows=len(tensor))}" if grown else "")
            )
    if missing or odd:
        saved = [k for k in missing if ".lora_" not in k]
        raise KTError(
            f"{adapter.source}: the adapter does not fit this model. Missing: {missing[:5] or 'none'}; not expected: "
            f"{odd[:5] or 'none'}."
            + (
                " modules_to_save in adapter_config.json names it: save the adapter again, or take it out."
                * bool(saved)
            )
        )
    return whole


def _is_vocabulary(model: Any, key: str) -> bool:
    """Whether a tensor is of the input or output embedding, or adapts one."""
    base = model.get_base_model()
    ends = []
    for get in ("get_input_embeddings", "get_output_embeddings"):
        ends.append(getattr(base, get)() if hasattr(base, get) else None)
    names = [n for n, m in model.named_modules() if any(m is e for e in ends if e is not None)]
    return any(key.startswith(f"{n}.") for n in names)


def expert_layers(model: nn.Module) -> list[tuple[str, LoraExperts]]:
    """Routed experts with adapters, by module name."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, LoraExperts)]


def plain_names(model: nn.Module) -> set[str]:
    """Names of a model's own modules, as they were before peft put its layers around some of them."""
    return {
        n.removeprefix(PREFIX).replace(".base_layer", "")
        for n, _ in model.named_modules()
        if ".lora_" not in n and n not in ("", "base_model", "base_model.model")
    }
