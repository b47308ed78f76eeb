"""What is replaced inside LLaMA-Factory: in memory only, and without effect unless `use_kt: true`."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from ktmoe.llamafactory import data, loading, logs, parsing
from ktmoe.llamafactory.arguments import extend
from ktmoe.llamafactory.audio import torchaudio_stand_in
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
    from llamafactory.data import loader as data_loader
    from llamafactory.data import parser as data_parser
    from llamafactory.data import template
    from llamafactory.hparams import ModelArguments, parser
    from llamafactory.model import loader
    from llamafactory.train import tuner

    extend(ModelArguments)
    for module, name, wrapper in (
        (parser, "read_args", parsing.read_args),
        (parser, "_parse_args", parsing.parse_args),
        (parser, "_parse_train_args", parsing.parse_train_args),
        (parser, "_check_extra_dependencies", parsing.check_extra_dependencies),
        (parser, "get_ray_args", parsing.user_errors),
        (parser, "get_train_args", parsing.get_train_args),
        (parser, "get_infer_args", parsing.get_infer_args),
        (template, "get_template_and_fix_tokenizer", parsing.user_errors),
        (data_parser, "get_dataset_list", data.get_dataset_list),
        (data_loader, "_load_single_dataset", parsing.user_errors),
        (data_loader, "get_dataset", parsing.user_errors),
        (loader, "load_tokenizer", loading.load_tokenizer),
        (loader, "load_config", loading.load_config),
        (loader, "patch_config", loading.patch_config),
        (loader, "load_model", loading.load_model),
        (loader, "init_adapter", loading.init_adapter),
        (tuner, "export_model", parsing.export_model),
        (tuner, "_training_function", logs.with_training_log),
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
