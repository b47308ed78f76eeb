"""The command line itself: its name, its version, and how commands are made."""

from __future__ import annotations

from typing import Annotated, Any

import typer

import ktmoe


app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # a traceback is for bugs, and then a plain one
    help="LoRA fine-tuning of mixture-of-experts models whose experts run on the CPU.",
)
FORWARD: dict[str, Any] = {  # for commands whose arguments are LLaMA-Factory's
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
    "options_metavar": "",
}


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"ktmoe {ktmoe.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
