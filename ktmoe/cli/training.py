"""Commands that go through LLaMA-Factory: what it trains, says, merges, and what would be refused before."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from ktmoe.cli.root import FORWARD, app
from ktmoe.errors import KTError
from ktmoe.exits import run


@app.command(**FORWARD, epilog="The keys of LLaMA-Factory itself are listed by: ktmoe train -h")
def train(ctx: typer.Context) -> None:
    """Train with stock LLaMA-Factory: its arguments (CONFIG.yaml key=value ..., or --key value ...) plus ktmoe's.

    use_kt: true runs the routed experts on the CPU: kt_backend, kt_num_threads, kt_tp_enabled, kt_num_gpu_experts,
    kt_gpu_experts, kt_weight_path, kt_max_len, kt_share_backward, kt_cpu_activation, kt_torch_packing, kt_verify,
    kt_fallback. Without use_kt, LLaMA-Factory runs as it is.
    """
    from ktmoe.llamafactory import main as train_main

    run(lambda: train_main(ctx.args))


@app.command(**FORWARD)
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


@app.command(**FORWARD)
def chat(ctx: typer.Context) -> None:
    """Talk to a model in the terminal, by stock LLaMA-Factory: its arguments plus ktmoe's, as for train.

    With use_kt: true the routed experts run on the CPU, with the LoRA of adapter_name_or_path.
    """
    from ktmoe.llamafactory import main as llamafactory

    run(lambda: llamafactory(ctx.args, "chat"))


@app.command(**FORWARD)
def export(ctx: typer.Context) -> None:
    """Merge an adapter into a model: LLaMA-Factory's arguments (model, adapter, export_dir, template) plus use_kt.

    With use_kt: true, from file to file, as `ktmoe merge`. Without, by stock LLaMA-Factory in memory; that is refused
    where LoRA of the routed experts would be lost.
    """
    from ktmoe.llamafactory import main as llamafactory

    run(lambda: llamafactory(ctx.args, "export"))


@app.command()
def webui() -> None:
    """Serve LLaMA-Factory's page for the browser; what it trains is run by ktmoe train.

    Under "Extra configurations", the extra arguments take ktmoe's keys: {"use_kt": true, "kt_backend": "auto"};
    without use_kt, LLaMA-Factory runs as it is. GRADIO_SERVER_NAME and GRADIO_SERVER_PORT say where the page is.
    """
    from ktmoe.llamafactory import serve_page

    run(serve_page)


@app.command("eval", hidden=True, **FORWARD)
def evaluate(ctx: typer.Context) -> None:
    """Refused: LLaMA-Factory 0.9.5 has switched the command off."""

    def command() -> None:
        raise KTError(
            "eval: LLaMA-Factory 0.9.5 has switched this command off. For the loss on a dataset: ktmoe train with "
            "do_train: false, do_eval: true and eval_dataset."
        )

    run(command)
