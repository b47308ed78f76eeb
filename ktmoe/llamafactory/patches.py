"""What is replaced inside LLaMA-Factory: in memory only, and without effect unless `use_kt: true`."""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from ktmoe import adapters
from ktmoe.checkpoints import Checkpoint
from ktmoe.llamafactory import checkpoints, keys, preflight
from ktmoe.llamafactory.arguments import extend, kt_config
from ktmoe.llamafactory.audio import torchaudio_stand_in
from ktmoe.llamafactory.export import export
from ktmoe.models import (
    check_headers,
    forget_fp8,
    moe_layers,
    native_class,
    native_config,
    stream,
    summary,
    unwrapped_layers,
    without_experts,
)
from ktmoe.types import KTError


_installed = False


def install() -> None:
    """Puts ktmoe into LLaMA-Factory, which it imports. Later calls do nothing.

    Raises:
        KTError: LLaMA-Factory is missing, refuses its surroundings, or is a version in which a place has moved.
    """
    global _installed
    if _installed:
        return
    _import_llamafactory()
    from llamafactory.data import loader as data
    from llamafactory.data import parser as data_parser
    from llamafactory.data import template
    from llamafactory.hparams import ModelArguments, parser
    from llamafactory.model import loader
    from llamafactory.train import tuner

    extend(ModelArguments)
    for module, name, wrapper in (
        (parser, "read_args", _read_args),
        (parser, "_parse_args", _parse_args),
        (parser, "_parse_train_args", _parse_train_args),
        (parser, "_check_extra_dependencies", _check_extra_dependencies),
        (parser, "get_ray_args", _user_errors),
        (parser, "get_train_args", _get_train_args),
        (parser, "get_infer_args", _get_infer_args),
        (template, "get_template_and_fix_tokenizer", _user_errors),
        (data_parser, "get_dataset_list", _user_errors),
        (data, "_load_single_dataset", _user_errors),
        (loader, "load_tokenizer", _load_tokenizer),
        (loader, "load_config", _load_config),
        (loader, "load_model", _load_model),
        (loader, "init_adapter", _init_adapter),
        (tuner, "export_model", _export_model),
    ):
        replace(module, name, wrapper)
    _held(parser, "get_last_checkpoint")
    from llamafactory.model import adapter

    for name in ("get_peft_model", "PeftModel", "find_all_linear_modules"):
        _held(adapter, name)
    _installed = True


def replace(module: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
    """Puts `wrapper(original)` wherever a loaded module of LLaMA-Factory holds `module.name`.

    Raises:
        KTError: the module has no such name.
    """
    original = _held(module, name)
    replacement = functools.wraps(original)(wrapper(original))
    for loaded in [m for n, m in list(sys.modules.items()) if n.partition(".")[0] == "llamafactory" and m is not None]:
        for attribute in [a for a, value in vars(loaded).items() if value is original]:
            setattr(loaded, attribute, replacement)


def _held(module: Any, name: str) -> Any:
    found = vars(module).get(name)
    if found is None:
        from llamafactory.extras.env import VERSION

        raise KTError(
            f"LLaMA-Factory {VERSION}: {module.__name__}.{name} is not there, so use_kt would have no effect. "
            "Install the tested version: pip install --no-deps llamafactory==0.9.5"
        )
    return found


def _import_llamafactory() -> None:
    try:
        with torchaudio_stand_in():
            import llamafactory.chat.chat_model
            import llamafactory.data
            import llamafactory.launcher
            import llamafactory.train.tuner  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "llamafactory":
            raise
        raise KTError("LLaMA-Factory is not installed: pip install --no-deps llamafactory==0.9.5") from error
    except ImportError as error:
        if "required for a normal functioning" not in str(error):  # what its version check says
            raise
        raise KTError(f"LLaMA-Factory does not accept an installed package: {' '.join(str(error).split())}") from error


def _logger() -> Any:
    from llamafactory.extras import logging

    return logging.get_logger("llamafactory.ktmoe")  # below its root logger, whose format and level hold


def _user_errors(original: Any) -> Any:
    """What LLaMA-Factory refuses here is the user's to mend."""

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except KTError:
            raise
        except (ValueError, AssertionError, ImportError) as error:
            raise KTError(str(error)) from error

    return call


def _read_args(original: Any) -> Any:
    def read_args(args: Any = None) -> Any:
        if args is None and len(sys.argv) > 1 and sys.argv[1].endswith(".json"):
            return keys.flat(keys.read(sys.argv[1:]))
        return keys.flat(original(args))

    return read_args


def _parse_args(original: Any) -> Any:
    def _parse_args(parser: Any, args: Any = None, allow_extra_keys: bool = False) -> Any:
        from llamafactory.hparams.parser import read_args

        args = read_args(args)
        keys.check(args)
        if keys.uses_kt(args):
            preflight.check_values(keys.values(args))
        return original(parser, args, allow_extra_keys=allow_extra_keys)

    return _parse_args


def _parse_train_args(original: Any) -> Any:
    def _parse_train_args(args: Any = None) -> Any:
        parsed = original(args)
        if parsed[0].use_kt:  # model_args
            preflight.check_environment()
            preflight.check_values({name: value for part in parsed for name, value in vars(part).items()})
        return parsed

    return _parse_train_args


def _check_extra_dependencies(original: Any) -> Any:
    """It demands forks of transformers and accelerate, which ktmoe does without."""

    def _check_extra_dependencies(model_args: Any, *args: Any, **kwargs: Any) -> None:
        with mock.patch.object(model_args, "use_kt", False):
            original(model_args, *args, **kwargs)

    return _check_extra_dependencies


def _get_train_args(original: Any) -> Any:
    def get_train_args(args: Any = None) -> Any:
        from llamafactory.hparams import parser

        args = parser.read_args(args)
        kt = keys.uses_kt(args)
        with mock.patch.object(parser, "get_last_checkpoint", _last_complete) if kt else contextlib.nullcontext():
            parsed = original(args)
        model_args, _, training_args, finetuning_args, _ = parsed
        if kt:
            checkpoints.check_resume(training_args.resume_from_checkpoint, training_args.output_dir)
            if training_args.resume_from_checkpoint is True:
                training_args.resume_from_checkpoint = _last_complete(training_args.output_dir)
            preflight.check_optimizer(training_args)
            preflight.check_loading(model_args, finetuning_args)
            # The Trainer would wrap the model in nn.DataParallel on a machine with several GPUs.
            training_args._n_gpu = min(training_args._n_gpu, 1)
            # Loaded to host memory; the Trainer then moves what is not experts. A device map would bring everything to
            # the GPU first, and one that names the CPU makes the Trainer leave the model there.
            model_args.device_map = None
        return parsed

    return _user_errors(get_train_args)


def _last_complete(output_dir: str) -> str | None:
    """In the place of transformers' `get_last_checkpoint`, which takes the newest folder whatever is in it."""
    found, skipped = checkpoints.last_complete(output_dir)
    if skipped:
        _logger().warning_rank0(
            f"ktmoe: {', '.join(skipped)} in {output_dir} was not written to its end: "
            f"{f'going on from {found}' if found else 'starting from the beginning'}."
        )
    return found


def _get_infer_args(original: Any) -> Any:
    def get_infer_args(args: Any = None) -> Any:
        parsed = original(args)
        model_args, _, finetuning_args, _ = parsed
        if model_args.use_kt:
            preflight.check_values({name: value for part in parsed for name, value in vars(part).items()})
            preflight.check_inference(model_args, finetuning_args)
            model_args.device_map = None  # `load_model` moves what is not experts
        return parsed

    return _user_errors(get_infer_args)


def _export_model(original: Any) -> Any:
    def export_model(args: Any = None) -> None:
        from llamafactory.hparams import parser

        args = parser.read_args(args)
        if not keys.uses_kt(args):
            original(args)
            return
        model_args, data_args, _, _ = parser.get_infer_args(args)
        _logger().info_rank0(f"ktmoe: {export(model_args, data_args)}")

    return export_model


def _load_tokenizer(original: Any) -> Any:
    def load_tokenizer(model_args: Any) -> Any:
        try:
            with native_config(_native(model_args)):
                return original(model_args)
        except OSError as error:
            raise KTError(f"{model_args.model_name_or_path}: {error} {error.__cause__ or ''}".rstrip()) from error

    return load_tokenizer


def _load_config(original: Any) -> Any:
    def load_config(model_args: Any) -> Any:
        config = original(model_args)
        if model_args.use_kt:
            forget_fp8(config)  # `stream` dequantises; LLaMA-Factory and transformers need a GPU for it
        return config

    return load_config


def _load_model(original: Any) -> Any:
    def load_model(
        tokenizer: Any, model_args: Any, finetuning_args: Any, is_trainable: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        native = _native(model_args)
        trust = model_args.trust_remote_code
        if native and trust:
            _logger().info_rank0(
                f"trust_remote_code: the model is transformers' own ({native}); its remote code is not run."
            )
        if model_args.use_kt:
            # Damaged, incomplete and quantised files are refused before anything is loaded.
            check_headers(preflight.load_config(model_args), _checkpoint(model_args))
        streamed = without_experts() if model_args.use_kt else contextlib.nullcontext()
        with native_config(native), mock.patch.object(model_args, "trust_remote_code", trust and not native), streamed:
            model = original(tokenizer, model_args, finetuning_args, is_trainable, *args, **kwargs)
        if model_args.use_kt and not is_trainable:  # no Trainer moves it; the routed experts stay where they are
            from llamafactory.extras.misc import get_current_device

            model.to(get_current_device())
        return model

    return load_model


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


def _init_adapter(original: Any) -> Any:
    def init_adapter(config: Any, model: Any, model_args: Any, finetuning_args: Any, is_trainable: bool) -> Any:
        if not model_args.use_kt:
            with _nothing_dropped():
                return original(config, model, model_args, finetuning_args, is_trainable)
        with _adapter_functions(), _warnings_to_log():
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
            _logger().info_rank0(line)
        return model

    return init_adapter


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


@contextlib.contextmanager
def _warnings_to_log() -> Iterator[None]:
    """ktmoe's own warnings go where LLaMA-Factory's go."""
    with warnings.catch_warnings():
        shown = warnings.showwarning

        def show(message: Any, *args: Any, **kwargs: Any) -> None:
            if str(message).startswith("ktmoe: "):
                _logger().warning_rank0_once(str(message))
            else:
                shown(message, *args, **kwargs)

        warnings.showwarning = show
        yield
