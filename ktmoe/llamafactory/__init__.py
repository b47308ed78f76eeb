"""Stock LLaMA-Factory with `use_kt: true`: nothing of it is changed on disk, and nothing at all without that key."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from ktmoe.llamafactory import keys, shipped, torchrun


__all__ = ["install", "main"]


def install() -> None:
    """Puts ktmoe into LLaMA-Factory, in memory. See `ktmoe.llamafactory.patches`."""
    from ktmoe.llamafactory import patches

    patches.install()


def main(argv: Sequence[str], command: str = "train") -> None:
    """`llamafactory-cli COMMAND` with these arguments.

    Args:
        argv: what LLaMA-Factory takes after its command: a YAML or JSON file and `key=value`, or `--key value`.
        command: train, chat or export.

    Raises:
        KTError: arguments that the user can mend.
        SystemExit: from LLaMA-Factory's parser, or with the exit code of torchrun.
    """
    if argv and (found := shipped.example(argv[0])):
        print(f"ktmoe: {argv[0]}: no such file; the example that comes with ktmoe is used.", file=sys.stderr)
        argv = [str(found), *argv[1:]]
    args = keys.flat(keys.read(argv))
    keys.check(args)
    if keys.uses_kt(args):
        _engage(args)
    install()
    from llamafactory import cli, launcher

    torchrun.use_own(launcher)
    sys.argv = ["ktmoe", command, *argv]
    cli.main()


def _engage(args: keys.Args) -> None:
    """Checks what would otherwise fail while LLaMA-Factory is imported or launched, and sets how it launches."""
    from ktmoe.llamafactory import preflight, rules

    preflight.check_environment()
    rules.check_values(keys.values(args))
    os.environ["USE_KT"] = "1"  # the launcher reads this, not the YAML: without it, several GPUs mean torchrun
    os.environ.setdefault("NPROC_PER_NODE", "1")  # for FORCE_TORCHRUN; its default is the number of GPUs
