"""Commands that write checkpoints: merged, and quantised."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Optional

import typer

from ktmoe.cli.root import app
from ktmoe.errors import KTError
from ktmoe.exits import run


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
