"""What is put around LLaMA-Factory's parser and commands: keys are checked before anything is loaded."""

from __future__ import annotations

import contextlib
import sys
from typing import Any
from unittest import mock

from ktmoe.llamafactory import checkpoints, data, foresight, keys, preflight, rules
from ktmoe.llamafactory.export import export
from ktmoe.llamafactory.logs import logger
from ktmoe.llamafactory.rehearsal import rehearse
from ktmoe.types import KTError


def read_args(original: Any) -> Any:
    def read_args(args: Any = None) -> Any:
        if args is None and len(sys.argv) > 1 and sys.argv[1].endswith(".json"):
            return keys.flat(keys.read(sys.argv[1:]))
        return keys.flat(original(args))

    return read_args


def parse_args(original: Any) -> Any:
    def _parse_args(parser: Any, args: Any = None, allow_extra_keys: bool = False) -> Any:
        from llamafactory.hparams.parser import read_args

        args = read_args(args)
        keys.check(args)
        if keys.uses_kt(args):
            rules.check_values(keys.values(args))
        return original(parser, args, allow_extra_keys=allow_extra_keys)

    return _parse_args


def parse_train_args(original: Any) -> Any:
    def _parse_train_args(args: Any = None) -> Any:
        parsed = original(args)
        if parsed[0].use_kt:  # model_args
            preflight.check_environment()
            rules.check_values({name: value for part in parsed for name, value in vars(part).items()})
        return parsed

    return _parse_train_args


def check_extra_dependencies(original: Any) -> Any:
    """It demands forks of transformers and accelerate, which ktmoe does without."""

    def _check_extra_dependencies(model_args: Any, *args: Any, **kwargs: Any) -> None:
        with mock.patch.object(model_args, "use_kt", False):
            original(model_args, *args, **kwargs)

    return _check_extra_dependencies


def get_train_args(original: Any) -> Any:
    def get_train_args(args: Any = None) -> Any:
        from llamafactory.hparams import parser

        args = parser.read_args(args)
        kt = keys.uses_kt(args)
        with mock.patch.object(parser, "get_last_checkpoint", _last_complete) if kt else contextlib.nullcontext():
            parsed = original(args)
        model_args, data_args, training_args, finetuning_args, _ = parsed
        if kt:
            checkpoints.check_resume(training_args.resume_from_checkpoint, training_args.output_dir)
            if training_args.resume_from_checkpoint is True:
                training_args.resume_from_checkpoint = _last_complete(training_args.output_dir)
            preflight.check_device(model_args, training_args)
            data.check_data(data_args)
            preflight.check_loading(model_args, finetuning_args)
            # The Trainer would wrap the model in nn.DataParallel on a machine with several GPUs.
            training_args._n_gpu = min(training_args._n_gpu, 1)
            # Loaded to host memory; the Trainer then moves what is not experts. A device map would bring everything to
            # the GPU first, and one that names the CPU makes the Trainer leave the model there.
            model_args.device_map = None
            rehearse(training_args, finetuning_args, data_args)
            foresight.check_budget(model_args, data_args, training_args, finetuning_args)
        return parsed

    return user_errors(get_train_args)


def _last_complete(output_dir: str) -> str | None:
    """In the place of transformers' `get_last_checkpoint`, which takes the newest folder whatever is in it."""
    found, skipped = checkpoints.last_complete(output_dir)
    if skipped:
        logger().warning_rank0(
            f"ktmoe: {', '.join(skipped)} in {output_dir} was not written to its end: "
            f"{f'going on from {found}' if found else 'starting from the beginning'}."
        )
    return found


def get_infer_args(original: Any) -> Any:
    def get_infer_args(args: Any = None) -> Any:
        parsed = original(args)
        model_args, _, finetuning_args, _ = parsed
        if model_args.use_kt:
            rules.check_values({name: value for part in parsed for name, value in vars(part).items()})
            preflight.check_inference(model_args, finetuning_args)
            model_args.device_map = None  # `load_model` moves what is not experts
        return parsed

    return user_errors(get_infer_args)


def export_model(original: Any) -> Any:
    def export_model(args: Any = None) -> None:
        from llamafactory.hparams import parser

        args = parser.read_args(args)
        if not keys.uses_kt(args):
            original(args)
            return
        model_args, data_args, _, _ = parser.get_infer_args(args)
        logger().info_rank0(f"ktmoe: {export(model_args, data_args)}")

    return export_model


def user_errors(original: Any) -> Any:
    """What LLaMA-Factory refuses here is the user's to mend."""

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except KTError:
            raise
        except (ValueError, AssertionError, ImportError) as error:
            raise KTError(str(error)) from error

    return call
