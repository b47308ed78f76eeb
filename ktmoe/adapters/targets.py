"""Which modules of a model get LoRA: what a `LoraConfig` means to peft, the routed experts among them.

The one place that decides, with the experts attached or not, before anything is loaded or changed.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig
from peft.tuners import tuners_utils
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from ktmoe.adapters.config import patterns, short_names, target_parameters
from ktmoe.adapters.coverage import ExpertNames, check_parameters, check_saved, covers, ends, rank_and_alpha, value_of
from ktmoe.adapters.layer import LoraExperts
from ktmoe.adapters.layout import CheckpointLayout, checkpoint_layout
from ktmoe.adapters.routers import by_weight, check_felt, linear_routers
from ktmoe.adapters.variants import check_by_weight, check_on_experts
from ktmoe.experts import MoEExperts
from ktmoe.types import PROJECTIONS, KTError


EXPERTS_TARGET = "experts"
# Parts of the names of what peft puts beside and inside a module that it adapts or trains in full.
_OF_PEFT = (".lora_", ".original_module", ".modules_to_save", ".token_adapter")
_ALL, _DUMMY = "all-linear", "dummy-target-modules"  # what peft means by these strings


@dataclass(frozen=True)
class Reached:
    """What a configuration reaches in a model.

    Attributes:
        modules: names of the modules outside of the experts that peft has a LoRA layer for.
        by_weight: names of routers that get LoRA by their parameter `weight`.
        experts: (rank, alpha) by the name of a layer of routed experts.
        exact: whether peft has to be given exactly these names, since it would find others by the user's.
    """

    modules: list[str]
    by_weight: list[str]
    experts: dict[str, tuple[int, float]]
    exact: bool


def prepare_config(peft_config: LoraConfig, model: nn.Module) -> LoraConfig:
    """The configuration that injects adapters into an attached model: ktmoe's layer registered, targets resolved.

    Raises:
        KTError: what cannot be honoured exactly; see `reach`.
    """
    config = copy.deepcopy(peft_config)
    experts = _attached(model)
    modules = own_modules(model)
    reached = reach(config, model, experts)
    if reached.exact:
        config.target_modules = short_names({*reached.modules, *reached.experts}, {*modules, *experts})
        config.layers_to_transform = config.layers_pattern = None
        if getattr(config, "exclude_modules", None):
            config.exclude_modules = None
        alike = reached.experts | {f"{n}.weight": _of_router(config, n) for n in reached.by_weight}
        ranks, alphas = ({n: both[k] for n, both in alike.items()} for k in (0, 1))
        config.rank_pattern = _first(ranks, config.r, config.rank_pattern)
        config.alpha_pattern = _first(alphas, config.lora_alpha, config.alpha_pattern)
    if reached.by_weight:
        named = {f"{n}.weight" for n in reached.by_weight}
        others = [t for t in target_parameters(config) if not any(ends(n, t) for n in named)]
        config.target_parameters = sorted({*others, *named})
    _say(config, peft_config, reached, experts, linear_routers(modules, experts))
    return with_experts_layer(config)


def with_experts_layer(config: LoraConfig) -> LoraConfig:
    """The configuration, with ktmoe's layer for routed experts registered in it: peft does not save that."""
    config._register_custom_module({MoEExperts: LoraExperts})
    return config


def check_lora_config(
    config: LoraConfig, model: nn.Module, experts: Mapping[str, int], hidden: Collection[str] = ()
) -> int:
    """Refuses what `prepare_config` would refuse, for a model whose experts are not attached, or have no weights yet.

    Args:
        config: for the model.
        model: with weights or on the meta device.
        experts: experts per layer, by the name that their module will have.
        hidden: names of the modules that hold the routed experts now.

    Returns:
        The largest rank that the experts get.

    Raises:
        KTError: see `reach`.
    """
    found = reach(config, model, experts, hidden).experts
    return max((rank for rank, _ in found.values()), default=config.r)


def reach(config: LoraConfig, model: Any, experts: Mapping[str, int], hidden: Collection[str] = ()) -> Reached:
    """What a configuration reaches in a model: as peft, by peft's own matching.

    Args:
        config: as the user wrote it.
        model: attached, or not yet.
        experts: experts per layer, by module name.
        hidden: names of the modules that hold routed experts in a model that is not attached.

    Raises:
        KTError: only some of a layer's experts or projections, ranks that differ among them, options that they do not
            have, modules that LoRA cannot be put on, or nothing at all.
    """
    modules = own_modules(model, (*hidden, *experts))
    linear = linear_routers(modules, experts)
    odd = {n for n, m in modules.items() if by_weight(n, m, experts)}
    asked = _asked(config, model, {*modules} - {*linear}, experts)
    layers = _layers(model, experts)
    shown = _shown_targets(config)
    for layer in layers:
        check_saved(config, layer)
    matched = [n for n in modules if tuners_utils.check_target_module_exists(asked, n)]
    weights = _named_weights(config, modules, layers)
    foreign = next((n for n in matched if n not in odd and not _has_layer(modules[n], config)), None)
    if foreign is not None:
        raise KTError(
            f"target_modules: got {shown}, which reaches {foreign}; peft has no LoRA for "
            f"{type(modules[foreign]).__name__}. Name linear layers, or 'experts'."
        )
    for name in sorted({*matched, *weights} & {*linear, *odd}):
        check_felt(name, model)
    for name in sorted({*matched} & odd | {*weights}):
        check_by_weight(config, name)
    found = {layer.name: rank_and_alpha(config, layer) for layer in layers if covers(asked, layer, shown)}
    if found:
        check_on_experts(config)
    if layers and getattr(config, "layer_replication", None):
        raise KTError("layer_replication: given; it would copy layers with their routed experts. Leave it out.")
    if not (matched or found or weights or config.target_modules == _DUMMY):
        what = "A string is a regular expression for whole names; names go into a list. "
        raise KTError(
            f"target_modules: got {shown}; {type(model).__name__} has no such module to put LoRA on. "
            f"{what if isinstance(config.target_modules, str) else ''}'all-linear' is a good start."
        )
    named = any(tuners_utils.check_target_module_exists(asked, e) for e in experts)
    exact = bool(found or named or {*matched} & odd) or _is_all(config)
    return Reached([n for n in matched if n not in odd], [n for n in matched if n in odd], found, exact)


def layout_of(model: nn.Module) -> CheckpointLayout:
    """How files name this model's experts."""
    config = getattr(model, "config", None)
    return checkpoint_layout(getattr(config, "model_type", None))


def routers(model: nn.Module) -> list[str]:
    """Names of the linear layers that choose experts in an attached model, which "all-linear" leaves alone.

    Most routers of transformers 5 are no nn.Linear, so that it does not reach them anyway.
    """
    return linear_routers(own_modules(model), _attached(model))


def own_modules(model: nn.Module, hidden: Iterable[str] = ()) -> dict[str, nn.Module]:
    """A model's own modules by name, without what adapters put around them, outside of the modules `hidden`."""
    under = tuple(f"{name}." for name in hidden)
    return {
        name: module
        for name, module in ((n.replace(".base_layer", ""), m) for n, m in model.named_modules())
        if name and not f"{name}.".startswith(under or ("\0",)) and not any(part in name for part in _OF_PEFT)
    }


def _attached(model: nn.Module) -> dict[str, int]:
    named = ((n, m) for n, m in model.named_modules() if isinstance(m, MoEExperts))
    return {name.removesuffix(".base_layer"): module.num_experts for name, module in named}


def _layers(model: nn.Module, experts: Mapping[str, int]) -> list[ExpertNames]:
    layout = layout_of(model)
    projections = tuple(layout.projections[p] for p in PROJECTIONS)
    return [ExpertNames(name, count, projections, layout.stacked) for name, count in experts.items()]


def _asked(config: LoraConfig, model: Any, names: Collection[str], experts: Iterable[str]) -> LoraConfig:
    """The configuration with targets that peft's matching takes: neither None nor "all-linear".

    Args:
        config: as the user wrote it.
        model: has the modules.
        names: what "all-linear" may mean, besides the experts.
        experts: layers of routed experts.
    """
    asked = copy.copy(config)
    if _is_all(config):
        every = tuners_utils._maybe_include_all_linear_layers(copy.copy(config), model).target_modules
        asked.target_modules = {*every} & {*names} | {*experts}
    elif config.target_modules is None:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        defaults = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind)
        if defaults is None and not target_parameters(config):
            raise KTError(f"target_modules: got None; peft has no default for {kind}. 'all-linear' is a good start.")
        asked.target_modules = defaults if isinstance(defaults, str) else {*(defaults or ())}
    elif isinstance(config.target_modules, str):
        try:
            re.compile(config.target_modules)
        except re.error as error:
            raise KTError(
                f"target_modules: got {config.target_modules!r}, which is no regular expression ({error}). Names of "
                "modules go into a list."
            ) from error
    return asked


def _named_weights(config: LoraConfig, modules: Mapping[str, nn.Module], layers: Iterable[ExpertNames]) -> list[str]:
    """Modules outside of the experts whose parameters target_parameters names."""
    targets = target_parameters(config)
    if not targets:
        return []
    owners = {f"{n}.{p}": n for n, m in modules.items() for p in m._parameters}
    for layer in layers:
        check_parameters(targets, layer, owners)
    return [n for parameter, n in owners.items() if any(ends(parameter, t) for t in targets)]


def _of_router(config: LoraConfig, name: str) -> tuple[int, float]:
    """Rank and alpha of a router by its weight: peft matches patterns with the parameter, users name the module."""
    names = (name, f"{name}.weight")
    return value_of(config.rank_pattern, names, config.r), value_of(config.alpha_pattern, names, config.lora_alpha)


def _first(values: Mapping[str, float], default: float, others: Mapping[str, Any] | None) -> dict[str, Any]:
    """A pattern that gives these modules their values, and the other modules what they had."""
    if not others:
        return patterns(values, default)
    return {re.escape(name): value for name, value in values.items()} | dict(others)


def _has_layer(module: nn.Module, config: LoraConfig) -> bool:
    """Whether peft has a LoRA layer for it, as far as that is known: quantised layers go by their names."""
    known = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
    custom = tuple(getattr(config, "_custom_modules", None) or ())
    return isinstance(module, (*known, *custom)) or any(w in type(module).__name__ for w in ("Linear", "Conv1D"))


def _is_all(config: LoraConfig) -> bool:
    return isinstance(config.target_modules, str) and config.target_modules.lower() == _ALL


def _say(
    config: LoraConfig, asked: LoraConfig, reached: Reached, experts: Collection[str], routers: Collection[str]
) -> None:
    """What the user should know of before training, once for each configuration."""
    level = 4
    if experts and not reached.experts:
        warnings.warn(
            f"ktmoe: target_modules = {_shown(asked.target_modules)} leaves the routed experts without LoRA; "
            "they stay frozen. Add 'experts' (or gate_proj, up_proj and down_proj) to train them.",
            stacklevel=level,
        )
    hit = sorted({*reached.modules} & {*routers} | {*reached.by_weight})
    if hit:
        warnings.warn(
            f"ktmoe: target_modules reaches the router ({hit[0]} and {len(hit) - 1} more): its LoRA changes which "
            f"experts a token goes to. Leave {hit[0].rpartition('.')[2]!r} out to keep it, as all-linear does.",
            stacklevel=level,
        )
    if reached.experts and config.lora_dropout:
        warnings.warn(
            f"ktmoe: lora_dropout = {config.lora_dropout} is not applied to the routed experts, only to the rest.",
            stacklevel=level,
        )


def _shown_targets(config: LoraConfig) -> str:
    """target_modules, and what is left out of them, as the user wrote them."""
    excluded = getattr(config, "exclude_modules", None)
    return _shown(config.target_modules) + (f" with exclude_modules {_shown(excluded)}" if excluded else "")


def _shown(targets: str | Iterable[str] | None) -> str:
    return repr(targets) if targets is None or isinstance(targets, str) else "[" + ", ".join(sorted(targets)) + "]"
