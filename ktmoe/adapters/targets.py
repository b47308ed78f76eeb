"""Which modules of an attached model get LoRA: peft's targets, the routed experts among them, and what is refused."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable
from typing import Any

from peft import LoraConfig
from torch import nn

from ktmoe.adapters.layer import PLAIN_INIT, LoraExperts
from ktmoe.adapters.layout import CheckpointLayout, checkpoint_layout
from ktmoe.experts import MoEExperts
from ktmoe.types import PROJECTIONS, KTError


EXPERTS_TARGET = "experts"
_NOT_ON_EXPERTS = (
    "use_dora", "lora_bias", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "eva_config",
    "corda_config", "loftq_config", "trainable_token_indices", "layer_replication",
)  # fmt: skip


def prepare_config(peft_config: LoraConfig, model: nn.Module) -> LoraConfig:
    """The configuration that injects adapters into an attached model: ktmoe's layer registered, targets resolved.

    Raises:
        KTError: options that the experts' LoRA does not have, or a target that names some of their projections only.
    """
    config = copy.deepcopy(peft_config)
    experts = [n.removesuffix(".base_layer") for n, m in model.named_modules() if isinstance(m, MoEExperts)]
    config.target_modules, reached = _resolve_targets(config, model, experts)
    inside = [e for e in experts for saved in config.modules_to_save or () if f".{e}.".find(f".{saved}.") >= 0]
    if inside:
        raise KTError(
            f"modules_to_save: got {_shown(config.modules_to_save)}, which holds the routed experts ({inside[0]}); "
            "their own weights are frozen. Name modules outside of them; experts get LoRA by target_modules."
        )
    if experts and not reached:
        warnings.warn(
            f"ktmoe: target_modules = {_shown(peft_config.target_modules)} leaves the routed experts without LoRA; "
            "they stay frozen. Add 'experts' (or gate_proj, up_proj and down_proj) to train them.",
            stacklevel=3,
        )
    if reached:
        check_lora_config(config)
        if config.lora_dropout:
            warnings.warn(
                f"ktmoe: lora_dropout = {config.lora_dropout} is not applied to the routed experts, only to the rest.",
                stacklevel=3,
            )
    return with_experts_layer(config)


def with_experts_layer(config: LoraConfig) -> LoraConfig:
    """The configuration, with ktmoe's layer for routed experts registered in it: peft does not save that."""
    config._register_custom_module({MoEExperts: LoraExperts})
    return config


def check_lora_config(config: LoraConfig) -> None:
    """Refuses options that the LoRA of routed experts does not have, before a model is touched.

    Raises:
        KTError: names the option.
    """
    for name in _NOT_ON_EXPERTS:
        if getattr(config, name, None):
            raise KTError(
                f"{name}: got {getattr(config, name)}; the routed experts have plain LoRA only. Leave it out."
            )
    for name in ("rank_pattern", "alpha_pattern"):
        if getattr(config, name, None):
            raise KTError(f"{name}: got {getattr(config, name)}; all routed experts share one rank. Leave it out.")
    if getattr(config, "target_parameters", None):
        raise KTError("target_parameters: the routed experts are no parameters here. Write target_modules: experts.")
    if config.init_lora_weights not in PLAIN_INIT:
        raise KTError(
            f"init_lora_weights: got {config.init_lora_weights!r}; the routed experts take True, False or 'gaussian'."
        )


def layout_of(model: nn.Module) -> CheckpointLayout:
    """How files name this model's experts."""
    config = getattr(model, "config", None)
    return checkpoint_layout(getattr(config, "model_type", None))


def routers(model: nn.Module) -> list[str]:
    """Names of the linear layers that choose experts: one output per expert, beside the routed experts.

    Most routers of transformers 5 are no nn.Linear, so that no target reaches them.
    """
    found = []
    for name, experts in ((n, m) for n, m in model.named_modules() if isinstance(m, MoEExperts)):
        name = name.removesuffix(".base_layer")
        block = name.rpartition(".")[0]
        for inner, module in model.get_submodule(block).named_modules():
            beside = f"{block}.{inner}".removesuffix(".base_layer")
            of_an_mlp = beside.startswith(f"{name}.") or beside.endswith("_proj") or ".lora_" in beside
            if isinstance(module, nn.Linear) and not of_an_mlp and module.out_features == experts.num_experts:
                found.append(beside)
    return found


def _resolve_targets(config: LoraConfig, model: Any, experts: list[str]) -> tuple[Any, set[str]]:
    """Targets that peft matches in an attached model, and the layers of routed experts among them."""
    targets = config.target_modules
    names = tuple(layout_of(model).projections[p] for p in PROJECTIONS)
    plain = {n.removesuffix(".base_layer"): m for n, m in model.named_modules() if ".lora_" not in n}
    if targets is None:
        return None, set()  # peft's default for the architecture, which names attention projections
    if isinstance(targets, str):
        if targets.lower() == "all-linear":
            head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
            linear = {n for n, m in plain.items() if isinstance(m, nn.Linear) and m is not head}
            return _with_experts(linear - set(routers(model)), set(experts), experts)
        layers = (nn.Linear, nn.Embedding)
        matched = {n for n, m in plain.items() if isinstance(m, layers) and re.fullmatch(targets, n)}
        tails = ("", *(f".0.{p}" for p in names), *(f".{p}" for p in names))
        _say_if_routed(matched, model)
        return _with_experts(
            matched, {e for e in experts if any(re.fullmatch(targets, e + t) for t in tails)}, experts
        )

    def meant(name: str) -> bool:
        return any(name == t or name.endswith(f".{t}") for t in targets)

    reached = {e for e in experts if meant(e)}
    for e in set(experts) - reached:
        named = [p for p in names if meant(f"{e}.{p}")]
        if named and len(named) < len(names):
            raise KTError(
                f"target_modules: got {_shown(targets)}; LoRA on the routed experts covers {', '.join(names)} "
                "together. Name all three, or 'experts', or none of them."
            )
        if named:
            reached.add(e)
    _say_if_routed({n for n in routers(model) if meant(n)}, model)
    return _with_experts(set(targets), reached, experts)


def _say_if_routed(matched: set[str], model: nn.Module) -> None:
    hit = sorted(matched & set(routers(model)))
    if hit:
        warnings.warn(
            f"ktmoe: target_modules reaches the router ({hit[0]} and {len(hit) - 1} more): its LoRA changes which "
            f"experts a token goes to. Leave {hit[0].rpartition('.')[2]!r} out to keep it, as all-linear does.",
            stacklevel=5,
        )


def _with_experts(targets: set[str], reached: set[str], experts: list[str]) -> tuple[set[str], set[str]]:
    """Adds the reached layers by one short name if they are all, else each by its own."""
    return targets | ({EXPERTS_TARGET} if reached and reached == set(experts) else reached), reached


def _shown(targets: str | Iterable[str] | None) -> str:
    return repr(targets) if targets is None or isinstance(targets, str) else "[" + ", ".join(sorted(targets)) + "]"
