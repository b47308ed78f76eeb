"""Settings of LLaMA-Factory that cannot be what the user wants with `use_kt: true`, one a line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ktmoe.config import KTConfig
from ktmoe.types import KTError


def _off(value: Any) -> bool:
    return not value or str(value).lower() in ("false", "none", "null", "no")


def _is(expected: str) -> Callable[[Any], bool]:
    return lambda value: value == expected


def _one_of(*expected: str) -> Callable[[Any], bool]:
    return lambda value: value in expected


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0)


def _one_adapter(value: Any) -> bool:
    names = value.split(",") if isinstance(value, str) else value or ()
    return len(names) <= 1


def _plain_optimizer(value: Any) -> bool:
    return not str(getattr(value, "value", value)).lower().startswith(("galore", "apollo", "lomo", "adalomo"))


def _bits(value: Any) -> bool:
    return _off(value) or str(value) in ("4", "8")


def _bnb(value: Any) -> bool:
    return str(getattr(value, "value", value)).lower() == "bnb"


_LORA = "Write finetuning_type: lora, or train with use_kt: false"
_OWN_MODEL = "it brings a model class of its own, and the routed experts are found in transformers' classes"
_OWN_OPTIMIZER = "it takes every parameter for the matrix of one layer, and expert LoRA is stacked over the experts"
_NO_VALUE_HEAD = "reward models and PPO put a value head around the model, which is not built yet for such experts"
_NOT_BUILT = "not built yet for experts on the CPU"
_EVALUATE = "not built yet. Evaluate the loss (do_eval), or generate with the saved adapter in stock transformers"

# name: what fits, what was expected, why or what to do
_RULES: dict[str, tuple[Callable[[Any], bool], str, str]] = {
    "finetuning_type": (_is("lora"), "lora", f"the experts' own weights are frozen. {_LORA}"),
    "stage": (_one_of("sft", "dpo", "kto", "pt"), "sft, dpo, kto or pt", _NO_VALUE_HEAD),
    "lora_rank": (_whole, "a whole number of at least 1", "8 is a good start"),
    "lora_alpha": (_number, "a number above 0", "leave it out for twice lora_rank"),
    "pissa_init": (_off, "false", "the experts have plain LoRA only; LLaMA-Factory would ignore it"),
    "pissa_convert": (_off, "false", "the experts have plain LoRA only"),
    "adapter_name_or_path": (_one_adapter, "one adapter", "merge the others into the checkpoint first"),
    "create_new_adapter": (_off, "false", "LLaMA-Factory would ignore it and go on training the given adapter"),
    "use_galore": (_off, "false", f"it trains full weights. {_LORA}"),
    "use_apollo": (_off, "false", f"it trains full weights. {_LORA}"),
    "use_badam": (_off, "false", f"it trains full weights. {_LORA}"),
    "use_muon": (_off, "false", f"{_OWN_OPTIMIZER}. Leave it out"),
    "use_adam_mini": (_off, "false", f"{_OWN_OPTIMIZER}. Leave it out"),
    "optim": (_plain_optimizer, "an optimizer that leaves backward alone", "adamw_torch is the default"),
    "ref_model_adapters": (_one_adapter, "one adapter", "merge the others into the checkpoint first"),
    "ref_model_quantization_bit": (_off, "none", "kt_backend holds for the reference model's experts too"),
    "infer_backend": (_one_of("huggingface"), "huggingface", "vLLM and SGLang load the model by themselves"),
    "use_llama_pro": (_off, "false", _NOT_BUILT),
    "use_asft_loss": (_off, "false", "it loads a second model"),
    "quantization_bit": (_bits, "none, 4 or 8", "what is not routed experts, by bitsandbytes"),
    "quantization_method": (_bnb, "bnb", "what is not routed experts is quantised by bitsandbytes alone"),
    "use_unsloth": (_off, "false", _OWN_MODEL),
    "mixture_of_depths": (_off, "none", _OWN_MODEL),
    "enable_liger_kernel": (_off, "false", "it replaces the experts' modules. Leave it out"),
    "use_liger_kernel": (_off, "false", "it replaces the experts' modules. Leave it out"),
    "cutoff_len": (_whole, "a whole number of at least 1", "tokens per example; 2048 is a good start"),
    "use_v1_kernels": (_off, "none", "they replace the experts' modules. Leave it out"),
    "use_hyper_parallel": (_off, "false", _NOT_BUILT),
    "use_mca": (_off, "false", _NOT_BUILT),
    "train_from_scratch": (_off, "false", "LoRA needs trained weights"),
    "fp16": (_off, "false", "the experts compute in bf16, which fp16's loss scaling does not suit. Write bf16: true"),
    "fp16_full_eval": (_off, "false", "write bf16: true"),
    "fp8": (_off, "false", "write bf16: true"),
    "deepspeed": (_off, "none", f"{_NOT_BUILT}. One process holds the experts; leave it out"),
    "fsdp": (_off, "none", f"{_NOT_BUILT}. One process holds the experts; leave it out"),
    "predict_with_generate": (_off, "false", _EVALUATE),
    "do_predict": (_off, "false", _EVALUATE),
    "compute_accuracy": (_off, "false", _EVALUATE),
}  # fmt: skip


def check_values(given: Mapping[str, Any]) -> None:
    """Refuses kt values, and LLaMA-Factory settings that cannot be what the user wants with `use_kt: true`.

    Called with the keys as written, so that it comes before the errors that parsing them would raise (DeepSpeed not
    installed, for example), and again with the parsed arguments.

    Raises:
        KTError: the first one, with what it got, what was expected and the remedy.
    """
    KTConfig(**{name: given[name] for name in KTConfig.field_help() if name in given})
    for name, (fits, expected, why) in _RULES.items():
        if name in given and not fits(given[name]):
            raise KTError(f"{name}: got {shown(given[name])}; use_kt: true expects {expected}: {why}.")


def shown(value: Any) -> str:
    """A value as the user wrote it, shortened."""
    value = getattr(value, "value", value)  # of an enum
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
