"""Commands before a training: what it takes, which experts its data goes to, which keys there are."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

import ktmoe
from ktmoe.cli.root import app
from ktmoe.errors import KTError
from ktmoe.exits import run


@app.command()
def plan(
    model: Annotated[
        str, typer.Argument(help="A folder with a config.json, a hub name, or a configuration as train's.")
    ],
    arguments: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(help="After a configuration: its keys, as for train (key=value)."),
    ] = None,
    rank: Annotated[Optional[int], typer.Option(min=1, max=1024, help="LoRA rank (8).")] = None,  # noqa: UP045
    sequences: Annotated[Optional[int], typer.Option(min=1, help="Of a batch (1).")] = None,  # noqa: UP045
    length: Annotated[Optional[int], typer.Option(min=1, help="Tokens of each (2048).")] = None,  # noqa: UP045
    checkpointing: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option(help="Whether activations are computed again in the backward (yes)."),
    ] = None,
    processes: Annotated[Optional[int], typer.Option(min=1, help="Of this host (1).")] = None,  # noqa: UP045
    time: Annotated[bool, typer.Option("--time", help="Predict a step's time: measures for some seconds.")] = False,
    trust_remote_code: Annotated[bool, typer.Option(help="Let the model's own code run.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of the tables.")] = False,
) -> None:
    """What memory a training takes, by part and by format of the experts, and what fits here. No weight is read.

    For a model, with LoRA on all its linear layers; or for a configuration of LLaMA-Factory with use_kt: true, whose
    keys say the rest. Exit code 1: nothing fits.

    For example: ktmoe plan Qwen/Qwen3-30B-A3B --rank 16 --length 4096, or ktmoe plan qwen3_moe_lora_sft_kt.yaml
    """
    from rich.console import Console

    from ktmoe import budget

    options = {"rank": rank, "sequences": sequences, "length": length, "checkpointing": checkpointing}
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    several: dict[str, Any] = {} if processes is None else {"processes": processes}

    def command() -> None:
        if model.endswith((".yaml", ".yml", ".json")):
            if named := [*given, *(["trust-remote-code"] if trust_remote_code else [])]:
                raise KTError(f"--{named[0]}: {model} says that. Give its own keys after it, as key=value.")
            with contextlib.redirect_stdout(sys.stderr):  # LLaMA-Factory's log is no part of the answer
                from ktmoe.llamafactory import plan as of_training

                found = of_training([model, *(arguments or [])], processes)
        elif arguments:
            raise KTError(f"{arguments[0]}: keys belong to a configuration; for a model there are --rank and others.")
        else:
            found = budget.of_model(model, trust_remote_code=trust_remote_code, **given, **several)
        seconds = budget.predict(found) if time else None
        if as_json:
            typer.echo(json.dumps({"model": model, **budget.as_json(found, seconds)}, indent=1))
        else:
            budget.show(found, seconds, Console())
        raise typer.Exit(int(found.best is None))

    run(command)


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(help="A folder, a hub name, or a configuration as train's.")],
    data: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(help="For a model: .jsonl, .json, .csv, .parquet, .txt, or a data set on the hub."),
    ] = None,
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("expert_counts.json"),
    tokens: Annotated[int, typer.Option(min=1, help="How many are enough.")] = 200_000,
    length: Annotated[int, typer.Option(min=1, help="At which longer rows of DATA are cut off.")] = 2048,
    trust_remote_code: Annotated[bool, typer.Option(help="Let the model's own code run.")] = False,
) -> None:
    """Count which experts one's own data goes to, for kt_num_gpu_experts with kt_gpu_experts: FILE.

    For a configuration of LLaMA-Factory with use_kt: true, its training set as it would be trained on.

    For example: ktmoe calibrate Qwen/Qwen3-30B-A3B chats.jsonl, or ktmoe calibrate qwen3_moe_lora_sft_kt.yaml
    """

    def command() -> None:
        from ktmoe import calibration, counts

        counts.check_place(out)
        name, of_configuration = model, model.endswith((".yaml", ".yml", ".json"))
        if of_configuration and data is None:
            from ktmoe.llamafactory import calibrate as of_training

            name, layers = of_training(model, tokens)
        elif of_configuration or data is None:
            raise KTError("DATA: a configuration names its own; a model needs a file or a data set on the hub.")
        else:
            layers = calibration.of_data(model, data, tokens, length, trust_remote_code)
        counts.write(out, layers, model=name)
        typer.echo(calibration.in_words(layers, out))

    run(command)


@app.command()
def schema() -> None:
    """Print a JSON schema of ktmoe's keys, with which editors complete and check a configuration.

    For example: ktmoe schema > kt.schema.json, and as the first line of the YAML file:

    # yaml-language-server: $schema=kt.schema.json
    """
    typer.echo(json.dumps(ktmoe.KTConfig.schema(), indent=2))
