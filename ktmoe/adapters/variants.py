"""Which options of a `LoraConfig` routed experts have, and routers that get LoRA by their weight. Others are refused.

Asked only about what a configuration reaches: DoRA on attention is peft's affair.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from peft import LoraConfig

from ktmoe.adapters.layer import PLAIN_INIT
from ktmoe.types import KTError


# Options that mean to routed experts what they mean to one nn.Linear per projection without a bias, or that concern
# other modules alone. Any other, of a peft to come too, is refused if it is set.
_HONOURED = {
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "lora_dropout", "bias",
    "target_modules", "exclude_modules", "target_parameters", "modules_to_save", "layers_to_transform",
    "layers_pattern", "fan_in_fan_out", "trainable_token_indices", "ensure_weight_tying", "runtime_config",
    "qalora_group_size", "megatron_core",
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
}  # fmt: skip
# What peft's LoRA of a parameter does not have.
_NOT_BY_WEIGHT = ("lora_dropout", "use_dora", "lora_bias", "velora_config", "fan_in_fan_out")


def check_on_experts(config: LoraConfig) -> None:
    """Refuses what LoRA of routed experts does not have.

    Raises:
        KTError: names the option.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in _HONOURED and value and value != _default(field):
            raise KTError(
                f"{field.name}: got {value}; the routed experts have plain LoRA only. Leave it out, or keep them out "
                "of target_modules: they are exclude_modules: [experts]."
            )
    if config.init_lora_weights not in PLAIN_INIT:
        raise KTError(
            f"init_lora_weights: got {config.init_lora_weights!r}; the routed experts take True, False or 'gaussian'. "
            "Write one of them, or keep the experts out of target_modules: they are exclude_modules: [experts]."
        )


def check_by_weight(config: LoraConfig, name: str) -> None:
    """Refuses what peft's LoRA of a parameter does not have, before it is met while layers are being made.

    Args:
        config: asks for it.
        name: the module whose weight gets LoRA.

    Raises:
        KTError: names the option.
    """
    if not hasattr(config, "target_parameters"):
        raise KTError(
            f"target_modules: reaches {name}, which is no linear layer; peft 0.17 or later has LoRA for its weight. "
            "Leave it out."
        )
    for option in _NOT_BY_WEIGHT:
        if value := getattr(config, option, None):
            raise KTError(
                f"{option}: got {value}; {name} gets LoRA by its weight, since peft has no layer for it or "
                f"target_parameters says so, and that knows no {option}. Leave one of the two out."
            )
    if config.init_lora_weights not in PLAIN_INIT:
        raise KTError(
            f"init_lora_weights: got {config.init_lora_weights!r}; {name} gets LoRA by its weight, which takes True, "
            "False or 'gaussian'. Leave one of the two out."
        )


def _default(field: Any) -> Any:
    made = field.default_factory is not dataclasses.MISSING
    return field.default_factory() if made else field.default
