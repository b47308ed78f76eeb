"""Stock LLaMA-Factory with `use_kt: true`: nothing of it is changed on disk, and nothing at all without that key."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ktmoe.errors import KTError
from ktmoe.llamafactory import keys, shipped, torchrun


if TYPE_CHECKING:
    from ktmoe.budget import Budget


__all__ = ["calibrate", "check", "engage", "install", "main", "plan", "serve_page"]

_PATIENCE = 10.0  # seconds for an answer that nobody reads any more


def install() -> None:
    """Puts ktmoe into LLaMA-Factory, in memory. See `ktmoe.llamafactory.patches`."""
    from ktmoe.llamafactory import patches

    patches.install()


def engage(args: keys.Args) -> None:
    """Checks what would otherwise fail while LLaMA-Factory is imported or launched, and sets how this process runs.

    To be called before torch allocates anything: its allocator looks at the environment once.

    Args:
        args: the arguments, flat.

    Raises:
        KTError: an environment or a value that `use_kt` cannot run with.
    """
    # First of all: torch looks when it allocates for the first time. It asks for huge pages then. Activations come and
    # go at every layer, and each time every 4 KB of them were a page fault: a tenth of a step on a CPU.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

    from ktmoe.llamafactory import preflight, rules

    preflight.check_environment()
    rules.check_values(keys.values(args))
    os.environ["USE_KT"] = "1"  # the launcher reads this, not the YAML: without it, several GPUs mean torchrun
    os.environ.setdefault("NPROC_PER_NODE", "1")  # for FORCE_TORCHRUN; its default is the number of GPUs


def main(argv: Sequence[str], command: str = "train") -> None:
    """`llamafactory-cli COMMAND` with these arguments.

    Args:
        argv: what LLaMA-Factory takes after its command: a YAML or JSON file and `key=value`, or `--key value`.
        command: train, chat or export.

    Raises:
        KTError: arguments that the user can mend.
        SystemExit: from LLaMA-Factory's parser, or with the exit code of torchrun.
    """
    argv, args = _read(argv)
    if keys.uses_kt(args):
        engage(args)
    install()
    from llamafactory import cli, launcher

    torchrun.use_own(launcher)
    sys.argv = ["ktmoe", command, *argv]
    try:
        cli.main()
    finally:
        _end_of_generation()


def _end_of_generation() -> None:
    """Waits for threads that generate: chat's main thread has the last word before the thread that made it is done.

    Python's end would stop such a thread inside torch, which ends the process with `std::terminate`.
    """
    for thread in threading.enumerate():
        if thread.name.endswith("(generate)"):  # Python names threads after their function
            thread.join(_PATIENCE)


def check(argv: Sequence[str]) -> str:
    """Everything that `ktmoe train` would refuse before it loads anything, and nothing else.

    Args:
        argv: as `main` takes it.

    Returns:
        What would run, in a line.

    Raises:
        KTError: what would be refused.
    """
    model_args, _, training_args, finetuning_args = _parsed(argv)
    from ktmoe.llamafactory import preflight

    return (
        f"{finetuning_args.stage} of {model_args.model_name_or_path} to {training_args.output_dir}: nothing was found "
        f"that would be refused before loading. {preflight.experts_in_words(model_args, finetuning_args)}"
    )


def plan(argv: Sequence[str], processes: int | None = None) -> Budget:
    """What a training would take, and everything that would be refused before.

    Args:
        argv: as `main` takes it.
        processes: of this host; by default one.

    Raises:
        KTError: what would be refused, memory left out.
    """
    from ktmoe.llamafactory.foresight import budget_of

    model_args, data_args, training_args, finetuning_args = _parsed(argv, kt_plan="off")
    return budget_of(model_args, data_args, training_args, finetuning_args, processes)


def calibrate(path: str, tokens: int) -> tuple[str, dict[str, list[int]]]:
    """Counts which experts the tokens of a training go to, without training.

    Args:
        path: of its configuration. Which experts that has on the GPU is left out: the counts may be yet to come.
        tokens: how many are enough.

    Returns:
        The model, and E counts for each of its layers, by name.

    Raises:
        KTError: what would be refused; or a training set that cannot be read.
    """
    from ktmoe import calibration
    from ktmoe.llamafactory.arguments import kt_config
    from ktmoe.llamafactory.rows import rows

    model_args, data_args, *others = _parsed([path], kt_num_gpu_experts=0, kt_gpu_experts=None)
    model, of_training = model_args.model_name_or_path, rows(model_args, data_args, *others)
    where = {
        "revision": model_args.model_revision,
        "cache_dir": model_args.cache_dir,
        "token": model_args.hf_hub_token,
        "trust_remote_code": model_args.trust_remote_code,
    }
    return model, calibration.calibrate(
        model, of_training, tokens, data_args.cutoff_len, kt_config(model_args), **where
    )


def serve_page() -> None:
    """Serves LLaMA-Factory's page. See `ktmoe.llamafactory.webui`."""
    from ktmoe.llamafactory.webui import serve

    serve()


def _parsed(argv: Sequence[str], **more: Any) -> Any:
    """Model, data, training and fine-tuning arguments, as `ktmoe train` would have them."""
    _, args = _read(argv)
    if not keys.uses_kt(args):
        raise KTError(
            "use_kt: is not true in these arguments; this command is for trainings with use_kt: true. Name a "
            "configuration that has it (ktmoe examples lists some), or append use_kt=true."
        )
    if isinstance(args, Mapping):
        args = {**args, **more}
    else:
        args = [*args, *(f"--{name}={value}" for name, value in more.items())]
    engage(args)
    install()
    from llamafactory.hparams import parser

    return parser.get_train_args(args)[:4]


def _read(argv: Sequence[str]) -> tuple[Sequence[str], keys.Args]:
    """The arguments with an example's own path, if one is meant, and the keys in them, checked."""
    if argv and (found := shipped.example(argv[0])):
        print(f"ktmoe: {argv[0]}: no such file; the example that comes with ktmoe is used.", file=sys.stderr)
        argv = [str(found), *argv[1:]]
    args = keys.flat(keys.read(argv))
    keys.check(args)
    return argv, args
