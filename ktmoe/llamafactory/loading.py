"""What is put around LLaMA-Factory's loading of tokenizers, models and adapters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from ktmoe import adapters
from ktmoe.checkpoints import Checkpoint
from ktmoe.llamafactory import preflight
from ktmoe.llamafactory.arguments import kt_config
from ktmoe.llamafactory.logs import logger, warnings_to_log
from ktmoe.models import (
    bf16_is_slow,
    check_headers,
    forget_stored,
    linear_routers,
    make_skeleton,
    moe_layers,
    native_class,
    native_config,
    stream,
    summary,
    unwrapped_layers,
    with_skipped,
    without_experts,
)
from ktmoe.types import KTError


def load_tokenizer(original: Any) -> Any:
    def load_tokenizer(model_args: Any) -> Any:
        try:
            with native_config(_native(model_args)):
                return original(model_args)
        except OSError as error:
            raise KTError(f"{model_args.model_name_or_path}: {error} {error.__cause__ or ''}".rstrip()) from error

    return load_tokenizer


def load_config(original: Any) -> Any:
    def load_config(model_args: Any) -> Any:
        config = original(model_args)
        if model_args.use_kt and model_args.compute_dtype is None and bf16_is_slow():
            # With bf16: false. LLaMA-Factory would load the configuration's dtype all the same.
            setattr(config, "dtype" if hasattr(config, "dtype") else "torch_dtype", torch.float32)
        return config

    return load_config


def patch_config(original: Any) -> Any:
    def patch_config(config: Any, tokenizer: Any, model_args: Any, *args: Any) -> Any:
        if model_args.use_kt:
            forget_stored(config)  # `stream` dequantises; LLaMA-Factory and transformers need a GPU for it
        return original(config, tokenizer, model_args, *args)

    return patch_config


def load_model(original: Any) -> Any:
    def load_model(
        tokenizer: Any, model_args: Any, finetuning_args: Any, is_trainable: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        native = _native(model_args)
        trust = model_args.trust_remote_code
        if native and trust:
            logger().info_rank0(
                f"trust_remote_code: the model is transformers' own ({native}); its remote code is not run."
            )
        if model_args.use_kt:
            # Damaged, incomplete and quantised files are refused before anything is loaded.
            check_headers(preflight.load_config(model_args), _checkpoint(model_args), kt_config(model_args))
        quantised = _routers_spared(model_args) if model_args.use_kt else contextlib.nullcontext()
        streamed = without_experts() if model_args.use_kt else contextlib.nullcontext()
        with (
            native_config(native),
            mock.patch.object(model_args, "trust_remote_code", trust and not native),
            quantised,
            streamed,
        ):
            model = original(tokenizer, model_args, finetuning_args, is_trainable, *args, **kwargs)
        # No Trainer moves it; bitsandbytes has where it computes. The routed experts stay where they are.
        if model_args.use_kt and not is_trainable and not getattr(model, "quantization_method", None):
            from llamafactory.extras.misc import get_current_device

            model.to(get_current_device())
        return model

    return load_model


@contextlib.contextmanager
def _routers_spared(model_args: Any) -> Iterator[None]:
    """Within it, LLaMA-Factory's configuration for bitsandbytes leaves routers as they are."""
    if model_args.quantization_bit is None:
        yield
        return
    from llamafactory.model import patcher

    skipped = linear_routers(make_skeleton(preflight.load_config(model_args)), _checkpoint(model_args))
    original = patcher.configure_quantization

    def configure_quantization(*args: Any) -> None:
        original(*args)
        *_, init_kwargs = args
        if quantised := init_kwargs.get("quantization_config"):
            init_kwargs["quantization_config"] = with_skipped(quantised, skipped)

    with mock.patch.object(patcher, "configure_quantization", configure_quantization):
        yield


def init_adapter(original: Any) -> Any:
    def init_adapter(config: Any, model: Any, model_args: Any, finetuning_args: Any, is_trainable: bool) -> Any:
        if not model_args.use_kt:
            with _nothing_dropped():
                return original(config, model, model_args, finetuning_args, is_trainable)
        with _adapter_functions(), warnings_to_log():
            rank = preflight.largest_rank(model_args, finetuning_args)
            model = stream(model, _checkpoint(model_args), kt_config(model_args), r=rank)
            model = original(config, model, model_args, finetuning_args, is_trainable)
        left = unwrapped_layers(model)
        if left or not moe_layers(model):
            raise KTError(
                f"use_kt: {len(left)} layers of routed experts stayed with transformers ({', '.join(left[:3])}); "
                "expected none. This is a bug of ktmoe: please report it with the model's name."
            )
        for line in summary(model):
            logger().info_rank0(line)
        return model

    return init_adapter


def _checkpoint(model_args: Any) -> Checkpoint:
    return Checkpoint(
        model_args.model_name_or_path,
        cache_dir=model_args.cache_dir,
        revision=model_args.model_revision,
        token=model_args.hf_hub_token,
    )


def _native(model_args: Any) -> str:
    if not model_args.use_kt:
        return ""
    from llamafactory.model import loader

    return native_class(model_args.model_name_or_path, loader._get_init_kwargs(model_args))


@contextlib.contextmanager
def _adapter_functions() -> Iterator[None]:
    """Within it, LLaMA-Factory makes and loads adapters by ktmoe; `lora_target: all` is the experts too, no router."""
    from llamafactory.model import adapter

    find = adapter.find_all_linear_modules

    def find_all_linear_modules(model: Any, *args: Any) -> list[str]:
        chosen_by = {name.rpartition(".")[2] for name in adapters.routers(model)}
        return [*(name for name in find(model, *args) if name not in chosen_by), adapters.EXPERTS_TARGET]

    class PeftModel(adapter.PeftModel):
        from_pretrained = staticmethod(adapters.load_adapter)

    with (
        mock.patch.object(adapter, "get_peft_model", adapters.get_peft_model),
        mock.patch.object(adapter, "PeftModel", PeftModel),
        mock.patch.object(adapter, "find_all_linear_modules", find_all_linear_modules),
    ):
        yield


@contextlib.contextmanager
def _nothing_dropped() -> Iterator[None]:
    """Within it, an adapter whose expert LoRA the installed peft ignores is refused: it would do so without a word."""
    from llamafactory.model import adapter

    stock: Any = adapter.PeftModel

    class PeftModel(stock):
        @staticmethod
        def from_pretrained(model: Any, model_id: str, **kwargs: Any) -> Any:
            made = stock.from_pretrained(model, model_id, **kwargs)
            preflight.check_experts_loaded(made, model_id, kwargs)
            return made

    with mock.patch.object(adapter, "PeftModel", PeftModel):
        yield
