"""Everything that can be refused before a tokenizer, a dataset or a model is loaded: nearly all for `use_kt: true`."""

from __future__ import annotations

import contextlib
import inspect
import os
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ktmoe.adapters import EXPERTS_FILE
from ktmoe.checkpoints import refuse_quantised, stored_format
from ktmoe.llamafactory.arguments import kt_config
from ktmoe.processes import check_sharding
from ktmoe.types import KTError


if TYPE_CHECKING:
    from peft import LoraConfig

_EXPERT_LORA = re.compile(r"\.experts\..*lora_")

_MODES = {"USE_RAY": "Ray", "USE_MCA": "the Megatron backend", "USE_V1": "LLaMA-Factory's v1 trainer"}
# A LoraConfig's options by LLaMA-Factory's keys.
_KEYS = {"target_modules": "lora_target", "modules_to_save": "additional_target", "'all-linear'": "all"}


def check_environment() -> None:
    """Refuses launch modes with another trainer, or that divide the model.

    Raises:
        KTError: names the variable.
    """
    for name, what in _MODES.items():
        if os.environ.get(name, "0").lower() in ("true", "y", "1"):
            raise KTError(f"{name}: got {os.environ[name]}; use_kt: true does not run under {what} yet. Unset {name}.")
    check_sharding()


def check_loading(model_args: Any, finetuning_args: Any) -> None:
    """Refuses kt settings, adapters and models that do not fit, from their configuration files alone.

    Raises:
        KTError: before a weight is read.
    """
    check_inference(
        model_args, finetuning_args, None if model_args.adapter_name_or_path else lora_config(finetuning_args)
    )
    _check_reference(model_args, finetuning_args)


def experts_in_words(model_args: Any, finetuning_args: Any) -> str:
    """Which backends would run the routed experts, and why not the one that was asked for."""
    from ktmoe.gate import bf16_bytes, contenders
    from ktmoe.models import layers_of
    from ktmoe.planning import plan
    from ktmoe.split import left_on_cpu

    model_config, config = load_config(model_args), kt_config(model_args)
    stored = stored_format(model_config)
    layers, _ = layers_of(model_config, largest_rank(model_args, finetuning_args))
    here = [left_on_cpu(config, layer) for layer in layers]
    found: dict[str, None] = {}
    for shape in dict.fromkeys(here):
        decided = plan(config, shape, stored)
        names = contenders(config, shape, sum(map(bf16_bytes, here)), stored)
        what = names[0] if len(names) == 1 else f"{' or '.join(names)}, whichever is measured to be faster"
        found[f"{what} ({decided.note})" if decided.note else what] = None
    return f"Routed experts: {'; '.join(found)}."


def check_inference(model_args: Any, finetuning_args: Any, lora: LoraConfig | None = None) -> None:
    """What `check_loading` does for a model that is not trained; with `lora`, for one that gets this adapter.

    Raises:
        KTError: as `check_loading`.
    """
    from ktmoe.models import check_installed, check_model

    model_config = load_config(model_args)
    if _is_multimodal(model_config):
        kind = type(model_config).__name__
        raise KTError(f"model_name_or_path: {kind} is multimodal; only text models are built so far.")
    if model_args.quantization_bit is not None:
        check_installed("quantization_bit")
    refuse_quantised(f"model_name_or_path: {model_args.model_name_or_path}", model_config)
    with _in_its_words():
        rank, stored = largest_rank(model_args, finetuning_args), stored_format(model_config)
        check_model(model_config, kt_config(model_args), rank, lora, stored=stored)


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


def check_device(model_args: Any, training_args: Any) -> None:
    """Refuses what needs a GPU where the rest of the model trains on the CPU.

    Raises:
        KTError: names the key.
    """
    if (
        model_args.use_unsloth_gc
        and not model_args.disable_gradient_checkpointing
        and training_args.device.type == "cpu"
    ):
        raise KTError(
            "use_unsloth_gc: got true; it keeps activations on a GPU, and this run has none. Leave it out: plain "
            "checkpointing saves the same memory on a CPU."
        )


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


def lora_config(finetuning_args: Any) -> LoraConfig:
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
