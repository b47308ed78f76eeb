"""Everything that can be refused before a tokenizer, a dataset or a model is loaded: nearly all for `use_kt: true`."""

from __future__ import annotations

import contextlib
import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ktmoe.adapters import EXPERTS_FILE
from ktmoe.checkpoints import refuse_quantised
from ktmoe.config import KTConfig
from ktmoe.llamafactory.arguments import kt_config
from ktmoe.types import KTError


if TYPE_CHECKING:
    from peft import LoraConfig


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


_EXPERT_LORA = re.compile(r"\.experts\..*lora_")
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
    "quantization_bit": (_off, "none", "kt_backend: AMXInt8 quantises the routed experts; the rest stays in bf16"),
    "use_unsloth": (_off, "false", _OWN_MODEL),
    "mixture_of_depths": (_off, "none", _OWN_MODEL),
    "enable_liger_kernel": (_off, "false", "it replaces the experts' modules. Leave it out"),
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

_MODES = {"USE_RAY": "Ray", "USE_MCA": "the Megatron backend", "USE_V1": "LLaMA-Factory's v1 trainer"}
# A LoraConfig's options by LLaMA-Factory's keys.
_KEYS = {"target_modules": "lora_target", "modules_to_save": "additional_target", "'all-linear'": "all"}
_SHARDING = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}


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
            raise KTError(f"{name}: got {_shown(given[name])}; use_kt: true expects {expected}: {why}.")


def check_environment() -> None:
    """Refuses launch modes with more than one process or with another trainer.

    Raises:
        KTError: names the variable.
    """
    for name, what in (_MODES | _SHARDING).items():
        if os.environ.get(name, "0").lower() in ("true", "y", "1"):
            raise KTError(f"{name}: got {os.environ[name]}; use_kt: true does not run under {what} yet. Unset {name}.")
    for name in ("WORLD_SIZE", "NPROC_PER_NODE", "NNODES"):
        if name != "WORLD_SIZE" and os.environ.get("FORCE_TORCHRUN", "0").lower() not in ("true", "y", "1"):
            continue  # without torchrun the others mean nothing
        if os.environ.get(name, "1") != "1":
            raise KTError(
                f"{name}: got {os.environ[name]}; use_kt: true trains in one process so far, which uses every core "
                "and one GPU if there is one. Set it to 1, or start without torchrun."
            )


def check_loading(model_args: Any, finetuning_args: Any) -> None:
    """Refuses kt settings, adapters and models that do not fit, from their configuration files alone.

    Raises:
        KTError: before a weight is read.
    """
    check_inference(model_args, finetuning_args, None if model_args.adapter_name_or_path else _lora(finetuning_args))
    _check_reference(model_args, finetuning_args)


def check_inference(model_args: Any, finetuning_args: Any, lora: LoraConfig | None = None) -> None:
    """What `check_loading` does for a model that is not trained; with `lora`, for one that gets this adapter.

    Raises:
        KTError: as `check_loading`.
    """
    from ktmoe.models import check_model

    model_config = load_config(model_args)
    if _is_multimodal(model_config):
        kind = type(model_config).__name__
        raise KTError(f"model_name_or_path: {kind} is multimodal; only text models are built so far.")
    refuse_quantised(f"model_name_or_path: {model_args.model_name_or_path}", model_config)
    with _in_its_words():
        check_model(model_config, kt_config(model_args), largest_rank(model_args, finetuning_args), lora)


def _check_reference(model_args: Any, finetuning_args: Any) -> None:
    """The model that preferences are compared with, and the losses that LLaMA-Factory computes as they are called."""
    if finetuning_args.stage == "dpo" and finetuning_args.pref_loss in ("hinge", "ipo", "kto_pair"):
        from llamafactory.train.dpo import trainer

        if "loss_type" in inspect.signature(trainer.DPOTrainer.dpo_loss).parameters:  # which it does not pass
            raise KTError(
                f"pref_loss: got {finetuning_args.pref_loss!r}; with the installed trl, LLaMA-Factory would compute "
                "the sigmoid loss instead. Write sigmoid, orpo or simpo, or use trl.DPOTrainer."
            )
    if finetuning_args.ref_model is None:
        if finetuning_args.ref_model_adapters:
            raise KTError(
                "ref_model_adapters: given without ref_model; LLaMA-Factory would ignore it. Write ref_model too "
                "(it may be the same as model_name_or_path)."
            )
        return
    reference = type(model_args).copyfrom(
        model_args,
        model_name_or_path=finetuning_args.ref_model,
        adapter_name_or_path=finetuning_args.ref_model_adapters,
    )
    try:
        check_inference(reference, type(finetuning_args)())
    except KTError as error:
        raise KTError(f"ref_model: {error}") from error


def check_optimizer(training_args: Any) -> None:
    """Refuses an optimizer whose package is not installed: transformers would say so after the model is loaded.

    Raises:
        KTError: with its message.
    """
    from transformers import Trainer

    try:
        Trainer.get_optimizer_cls_and_kwargs(training_args)
    except (ImportError, ValueError) as error:
        raise KTError(f"optim: got {_shown(training_args.optim)}; {' '.join(str(error).split())}") from error


def check_experts_loaded(peft_model: Any, path: str, hub: Mapping[str, Any]) -> None:
    """Refuses, after stock peft has loaded an adapter, that it left LoRA on routed experts out without a word.

    peft before 0.20 does so on transformers 5, and so do later ones for families that are not in their table.

    Args:
        peft_model: what peft made of it.
        path: the adapter.
        hub: `subfolder`, `revision` ... as for peft.

    Raises:
        KTError: the file has expert LoRA, the model none.
    """
    import peft
    from safetensors import safe_open
    from transformers.utils import cached_file

    options = {k: v for k, v in hub.items() if k in ("subfolder", "revision", "cache_dir", "token") and v is not None}
    options["_raise_exceptions_for_missing_entries"] = False
    file = cached_file(path, "adapter_model.safetensors", **options)
    if file is None:  # a .bin file: nobody's that has expert LoRA
        return
    with safe_open(file, "pt") as opened:
        saved = any(_EXPERT_LORA.search(key) for key in opened.keys())
    there = any(".experts." in name and ".lora_" in name for name, _ in peft_model.named_parameters())
    if (saved and not there) or cached_file(path, EXPERTS_FILE, **options):  # stock peft never opens the latter
        raise KTError(
            f"adapter_name_or_path: {path} has LoRA on routed experts, which the installed peft {peft.__version__} "
            f"leaves out without a word for {type(peft_model.get_base_model()).__name__}. Write use_kt: true."
        )


def _lora(finetuning_args: Any) -> LoraConfig:
    """The adapter that LLaMA-Factory will ask for."""
    from peft import LoraConfig

    targets = finetuning_args.lora_target
    return LoraConfig(
        r=finetuning_args.lora_rank,
        lora_alpha=finetuning_args.lora_alpha,
        lora_dropout=finetuning_args.lora_dropout,
        target_modules="all-linear" if targets == ["all"] else list(targets),
        modules_to_save=finetuning_args.additional_target,
        use_rslora=finetuning_args.use_rslora,
        use_dora=finetuning_args.use_dora,
    )


@contextlib.contextmanager
def _in_its_words() -> Iterator[None]:
    """What is wrong with a LoraConfig, said of LLaMA-Factory's keys."""
    try:
        yield
    except KTError as error:
        said = str(error)
        for name, key in _KEYS.items():
            said = said.replace(name, key)
        raise KTError(said) from error


def load_config(model_args: Any) -> Any:
    """The model's configuration, of transformers' own class where it has one.

    Raises:
        KTError: no such model.
    """
    from llamafactory.model import loader
    from transformers.utils import logging

    from ktmoe.models import native_class, native_config

    verbosity = logging.get_verbosity()
    logging.set_verbosity_warning()  # LLaMA-Factory has just asked for more, which would print every configuration
    try:
        hub = loader._get_init_kwargs(model_args)
        with native_config(native_class(model_args.model_name_or_path, hub)):
            return loader.load_config(model_args)
    except (OSError, ValueError) as error:
        raise KTError(
            f"model_name_or_path: got {model_args.model_name_or_path!r}; expected a folder with a config.json, or a "
            f"model on the hub that transformers knows. {error}"
        ) from error
    finally:
        logging.set_verbosity(verbosity)


def largest_rank(model_args: Any, finetuning_args: Any) -> int:
    """The LoRA rank that the experts are loaded for: of the adapter to go on with, else `lora_rank`.

    Raises:
        KTError: no such adapter, or one that is no LoRA.
    """
    if not model_args.adapter_name_or_path:
        return int(finetuning_args.lora_rank)
    from peft import PeftConfig

    name = model_args.adapter_name_or_path[-1]
    try:
        config = PeftConfig.from_pretrained(
            name,
            subfolder=model_args.adapter_folder,
            cache_dir=model_args.cache_dir,
            revision=model_args.model_revision,
            token=model_args.hf_hub_token,
        )
    except (OSError, ValueError, TypeError) as error:
        raise KTError(f"adapter_name_or_path: got {name!r}, which is no saved adapter: {error}") from error
    if not isinstance(getattr(config, "r", None), int):
        raise KTError(f"adapter_name_or_path: {name!r} is a {config.peft_type} adapter; expected LORA.")
    return int(config.r)


def _is_multimodal(config: Any) -> bool:
    from transformers import AutoModelForImageTextToText

    parts = ("vision_config", "audio_config", "thinker_config")
    return any(hasattr(config, p) for p in parts) or type(config) in AutoModelForImageTextToText._model_mapping.keys()


def _shown(value: Any) -> str:
    value = getattr(value, "value", value)  # of an enum
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
