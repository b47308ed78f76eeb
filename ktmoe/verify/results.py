"""How every section of the verification ends: one sentence, an exit code and, if asked for, a file."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from rich.console import Console

from ktmoe.backends import KERNEL_BACKENDS, TABLE, kt
from ktmoe.gate import contract
from ktmoe.models import expert_shapes
from ktmoe.types import KTError, MoEShape


COLOURS = {"pass": "green", "fail": "red", "not verified": "yellow"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every section has."""
    parser.add_argument("--output", type=Path, metavar="DIR", help="where the results go, as DIR/<section>.json")
    parser.add_argument("--allow-unverified", action="store_true", help="succeed where no kernel can be measured")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the sections that can take a model's own shapes."""
    parser.add_argument("--model", help="a model whose layer shapes to use: a folder with config.json, or a hub name")
    parser.add_argument("--rank", type=int, default=8, help="LoRA rank for --model (default: 8)")


def model_shapes(args: argparse.Namespace) -> dict[str, MoEShape]:
    """The shapes of `--model`, by name; empty without it. Ends the program if it cannot be read."""
    try:
        return shapes_of(args.model, args.rank) if args.model else {}
    except KTError as error:
        raise SystemExit(f"ktmoe: {error}") from None


def shapes_of(model: str, rank: int) -> dict[str, MoEShape]:
    """The shapes of a model's MoE layers, with just enough experts, by name.

    Raises:
        KTError: a model that cannot be read or has no experts that ktmoe can compute.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise KTError(f"MODEL: {model!r} has no configuration that transformers can read: {error}") from error
    found = [contract.reduced(shape) for shape in expert_shapes(config, rank)]
    name = Path(model).name
    return {name if i == 0 else f"{name} ({i + 1})": shape for i, shape in enumerate(found)}


def has_weights(model: str) -> bool:
    """Whether a folder has safetensors beside its config.json. The hub is not asked for gigabytes."""
    return next(Path(model).glob("*.safetensors"), None) is not None


def backends_for(shape: MoEShape, to: Console, stored: str | None = None) -> list[str]:
    """The backends of this host that can compute a layer; says which kernel ones cannot, and why.

    Args:
        shape: of the layer.
        to: where to say it.
        stored: the format of its weights, as `ExpertWeights.stored`; None where they are drawn.
    """
    found = ["torch"]
    for name in KERNEL_BACKENDS if kt.available() else ():
        if stored is not None and TABLE[name].stored not in ("", stored):
            continue
        if why := TABLE[name].why_not(shape):
            to.print(f"{name} left out: {why}", style="yellow", markup=False, highlight=False)
        else:
            found.append(name)
    return found


def sizes(shape: MoEShape) -> str:
    """A shape in few letters."""
    s = shape
    return f"E={s.num_experts}, H={s.hidden_size}, I={s.intermediate_size}, K={s.top_k}, r={s.rank}"


def console() -> Console:
    """For tables and progress; wide enough for a table where it goes to a file."""
    return Console(width=None if sys.stdout.isatty() else 160)


def end(
    to: Console,
    args: argparse.Namespace,
    section: str,
    measured: Collection[str],
    problems: list[str],
    data: dict[str, Any],
    summary: str = "",
) -> int:
    """Says how a section ended and writes its results.

    Args:
        to: where to say it.
        args: with what `add_arguments` added.
        section: its name.
        measured: the backends that really computed something here.
        problems: what was found wrong, as sentences.
        data: what was measured; plain JSON.
        summary: what passed, one sentence; by default that the kernel did.

    Returns:
        The exit code: 0 if nothing is wrong and the kernel was measured, or need not be.
    """
    kernels = [name for name in KERNEL_BACKENDS if name in measured]
    for problem in problems:
        to.print(problem, style="red", markup=False, highlight=False)
    if problems:
        verdict, summary = "fail", f"{section} FAILED: {len(problems)} problems"
    elif not kernels:
        why = "it did not run" if kt.available() else kt.variant()
        verdict, summary = "not verified", f"kernel NOT verified on this host: {why}"
    else:
        verdict = "pass"
        summary = summary or f"{section}: kernel verified: {kt.variant()} ({', '.join(kernels)})"
    to.print(summary, style=COLOURS[verdict], markup=False, highlight=False)
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        text = {"section": section, "verdict": verdict, "summary": summary, "problems": problems, "data": data}
        part = args.output / f"{section}.json.part"
        part.write_text(json.dumps(text, indent=1, allow_nan=False) + "\n")
        part.replace(args.output / f"{section}.json")  # whole or absent
    return int(verdict == "fail" or (verdict == "not verified" and not args.allow_unverified))
