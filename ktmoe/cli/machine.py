"""Commands about this machine: what it can do, and whether its kernel computes what it should."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from ktmoe.cli.root import app
from ktmoe.exits import run


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of the table.")] = False,
) -> None:
    """Look at this machine and installation: CPU, cores, memory, caches, versions, kernel, GPU, each with its remedy.

    Exit code 0: nothing stands in the way, though notes may say what would be faster; 1: there is a problem.
    """
    from rich.console import Console

    from ktmoe.doctor import doctor as diagnosis

    raise typer.Exit(diagnosis(as_json, Console()))


@app.command()
def verify(
    model: Annotated[
        Optional[str],  # noqa: UP045  (read by typer at run time on Python 3.10)
        typer.Argument(help="Use this model's layer shapes: a folder with config.json, or a hub name."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for report.html and report.json.")] = Path("ktmoe-verify"),
    rank: Annotated[int, typer.Option(min=1, help="LoRA rank for MODEL's shapes.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the accuracy cases and of the soak run.")] = 0,
    soak_minutes: Annotated[float, typer.Option(min=0.1, help="How long the soak run takes.")] = 1.0,
    allow_unverified: Annotated[
        bool, typer.Option("--allow-unverified", help="Succeed where there is no kernel to verify.")
    ] = False,
) -> None:
    """Check the kernel on this machine: accuracy against the specification, traps, memory over time, throughput.

    Weights are drawn; where MODEL is a folder with safetensors, every expert is checked on its own weights too, and
    how far INT8 is from bf16 on them is shown. Otherwise only config.json is needed.
    """
    from ktmoe.verify import report, results

    def command() -> None:
        if model:
            results.shapes_of(model, rank)  # a mistake shows before minutes of work
        raise SystemExit(report.verify(output, model, rank, seed, soak_minutes, allow_unverified, results.console()))

    run(command)
