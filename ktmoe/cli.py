"""The command line: every command of `ktmoe`, its arguments and its help."""

from __future__ import annotations

import contextlib
import json
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

import ktmoe
from ktmoe.errors import KTError
from ktmoe.exits import run


app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # a traceback is for bugs, and then a plain one
    help="LoRA fine-tuning of mixture-of-experts models whose experts run on the CPU.",
)


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


_FORWARD: dict[str, Any] = {  # for commands whose arguments are LLaMA-Factory's
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
    "options_metavar": "",
}


@app.command(**_FORWARD, epilog="The keys of LLaMA-Factory itself are listed by: ktmoe train -h")
def train(ctx: typer.Context) -> None:
    """Train with stock LLaMA-Factory: its arguments (CONFIG.yaml key=value ..., or --key value ...) plus ktmoe's.

    use_kt: true runs the routed experts on the CPU: kt_backend, kt_num_threads, kt_tp_enabled, kt_num_gpu_experts,
    kt_gpu_experts, kt_weight_path, kt_max_len, kt_share_backward, kt_cpu_activation, kt_torch_packing, kt_verify,
    kt_fallback. Without use_kt, LLaMA-Factory runs as it is.
    """
    from ktmoe.llamafactory import main as train_main

    run(lambda: train_main(ctx.args))


@app.command(**_FORWARD)
def check(ctx: typer.Context) -> None:
    """Everything that `ktmoe train` would refuse before loading a model, without training: the same arguments.

    Keys, data sets, the Trainer's settings, model, adapter and backend, from configuration files alone. Exit code 2
    with the first that is wrong.
    """
    from ktmoe.llamafactory import check as checked

    run(lambda: typer.echo(f"ktmoe: {checked(ctx.args)}"))


@app.command()
def examples(
    name: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(help="The one to write into the current folder; without it, the names of all."),
    ] = None,
) -> None:
    """List the examples that come with ktmoe, or write one to start from: configurations, scripts for Trainer and TRL.

    For example: ktmoe examples qwen3_moe_lora_sft_kt
    """
    from ktmoe.llamafactory import shipped

    def command() -> None:
        if name is None:
            typer.echo("\n".join(shipped.examples()))
        else:
            written = shipped.write_example(name)
            next_step = "python runs it" if written.suffix == ".py" else "ktmoe check, then ktmoe train, take it"
            typer.echo(f"ktmoe: {written} is written. {next_step}.")

    run(command)


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


@app.command(**_FORWARD)
def chat(ctx: typer.Context) -> None:
    """Talk to a model in the terminal, by stock LLaMA-Factory: its arguments plus ktmoe's, as for train.

    With use_kt: true the routed experts run on the CPU, with the LoRA of adapter_name_or_path.
    """
    from ktmoe.llamafactory import main as llamafactory

    run(lambda: llamafactory(ctx.args, "chat"))


@app.command(**_FORWARD)
def export(ctx: typer.Context) -> None:
    """Merge an adapter into a model: LLaMA-Factory's arguments (model, adapter, export_dir, template) plus use_kt.

    With use_kt: true, from file to file, as `ktmoe merge`. Without, by stock LLaMA-Factory in memory; that is refused
    where LoRA of the routed experts would be lost.
    """
    from ktmoe.llamafactory import main as llamafactory

    run(lambda: llamafactory(ctx.args, "export"))


@app.command("eval", hidden=True, **_FORWARD)
def evaluate(ctx: typer.Context) -> None:
    """Refused: LLaMA-Factory 0.9.5 has switched the command off."""

    def command() -> None:
        raise KTError(
            "eval: LLaMA-Factory 0.9.5 has switched this command off. For the loss on a dataset: ktmoe train with "
            "do_train: false, do_eval: true and eval_dataset."
        )

    run(command)


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


@app.command()
def merge(
    model: Annotated[str, typer.Argument(help="The base model: a folder with safetensors, or a hub name.")],
    adapter: Annotated[str, typer.Argument(help="The LoRA adapter: a folder, or a hub name.")],
    out: Annotated[Path, typer.Argument(help="Where the merged model goes: a folder, new or without a model in it.")],
) -> None:
    """Merge an adapter into its base model: a plain checkpoint that transformers and serving engines load.

    Written shard by shard, with one tensor in memory at a time. OUT appears when it is complete, or not at all.
    """
    from ktmoe.convert import merge_adapter

    run(lambda: typer.echo(str(merge_adapter(model, adapter, out))))


class Format(str, Enum):
    """Of `ktmoe quantize`."""

    INT8 = "int8"
    INT4 = "int4"


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="A folder with safetensors, or a hub name.")],
    out: Annotated[Path, typer.Argument(help="Folder for the packed weights (int8), or for the whole model (int4).")],
    format: Annotated[Format, typer.Option(help="int8: files for kt_weight_path; int4: a checkpoint.")] = Format.INT8,
    tp: Annotated[int, typer.Option(min=1, max=4, help="Parts of tensor parallelism, as kt_tp_enabled makes.")] = 1,
    threads: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Threads of the kernel. Default: the physical cores."),
    ] = None,
) -> None:
    """Quantise MODEL's routed experts.

    int8: packed files in OUT, about half the size of bf16, for kt_backend: AMXInt8 and kt_weight_path: OUT. Run it
    again after it was stopped, or to mend damaged files: layers that are whole are not made again.

    int4: a checkpoint in OUT in compressed-tensors' format, for model_name_or_path: OUT and kt_backend: AMXInt4 or
    torch. Each number is rounded to the nearest of 16 in its group of 32, which moves a model further than int8 does.
    """
    from ktmoe.convert import quantize_int4_model, quantize_model

    def command() -> None:
        if format is Format.INT4:
            if tp != 1 or threads is not None:
                raise KTError(
                    "--format int4: --tp and --threads are for int8, which the kernel packs. Leave them out."
                )
            typer.echo(f"ktmoe: {quantize_int4_model(model, out)}. To train with them:")
            typer.echo(f"model_name_or_path: {out}")
            return
        layers = quantize_model(model, out, tp, threads)
        size = sum(layer.size for layer in layers)
        typer.echo(f"ktmoe: {len(layers)} layers, {size / 1e9:.3g} GB. To train with them:")
        typer.echo(f"kt_backend: AMXInt8\nkt_weight_path: {out}")

    run(command)


def main() -> None:
    """The console script `ktmoe`."""
    app(prog_name="ktmoe")


if __name__ == "__main__":
    main()
