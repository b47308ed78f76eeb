"""The demo's results: what is printed, and what must hold for the demo to succeed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


MINIMUM_LOSS_DROP = 0.4  # nats per token
MINIMUM_PREFERENCE_GAIN = 0.5  # nats per token, of preferred answers over the others
# Two fp32 computations of one function differ by about 1e-6 here.
MAXIMUM_UPCYCLING_DIFFERENCE = 1e-5
MAXIMUM_LOGITS_DIFFERENCE = 1e-4


class DemoFailure(Exception):
    """A check of the demo failed."""


def check_upcycling(console: Console, before: dict[str, Any]) -> None:
    """Say whether the mixture of experts computes what the dense model computes.

    Raises:
        DemoFailure: If it does not.
    """
    console.print(
        "The mixture of experts computes what the dense model computes: "
        f"logits of {before['tokens']} tokens differ by {before['difference']:.1e} (mean, relative; "
        f"limit {MAXIMUM_UPCYCLING_DIFFERENCE:.0e}), the likeliest next token is the same for {before['same_tokens']}."
    )
    if not before["difference"] < MAXIMUM_UPCYCLING_DIFFERENCE:  # written so that NaN fails
        raise DemoFailure("The mixture of experts does not compute what the dense model computes.")


def show(
    console: Console, run: Any, records: list[dict[str, str]], before: dict[str, Any], after: dict[str, Any]
) -> dict[str, Any]:
    """Print answers and a summary; the results that :func:`check` judges."""
    difference = logits_difference(run.path("ktmoe.safetensors"), run.path("stock.safetensors"))
    for record, old, new in zip(records, before["answers"], after["answers"], strict=True):
        table = Table(title=record["instruction"], title_justify="left", show_header=False, width=console.width)
        for label, text in (("before", old), ("after", new), ("docstring", record["output"])):
            table.add_row(label, text or "(nothing)")
        console.print(table)

    summary = Table(title="ktmoe demo", show_header=False)
    summary.add_row("trained parameters", f"{trained_parameters(run.path('adapter')):,}")
    summary.add_row("held-out loss, nats per token", f"{before['loss']:.3f} -> {after['loss']:.3f}")
    for side, name in (("chosen", "preferred answers"), ("rejected", "the model's own answers before")):
        if side in after:
            summary.add_row(f"loss of {name}", f"{before[side]:.3f} -> {after[side]:.3f}")
    summary.add_row("logits, ktmoe against stock peft", f"{difference:.1e} (limit {MAXIMUM_LOGITS_DIFFERENCE:.0e})")
    for name, seconds in run.seconds.items():
        summary.add_row(f"time: {name}", f"{seconds:.0f} s")
    for name, path in (
        ("adapter", run.path("adapter")),
        ("merged model", run.path("merged")),
        *(("loss plot", plot) for plot in sorted(run.path("adapter").glob("training_*.png"))),
    ):
        summary.add_row(name, str(path))
    console.print(summary)
    return {
        "drop": before["loss"] - after["loss"],
        "gain": _gap(after) - _gap(before),
        "norm": after["expert_update_norm"],
        "difference": difference,
    }


def check(results: dict[str, Any], stage: str) -> None:
    """Fail unless the run shows what it is meant to show. The comparisons are written so that NaN fails.

    Raises:
        DemoFailure: With what fell short.
    """
    if stage == "sft" and not results["drop"] >= MINIMUM_LOSS_DROP:
        raise DemoFailure(f"The held-out loss fell by {results['drop']:.3f}; it should by {MINIMUM_LOSS_DROP}.")
    if stage == "dpo" and not results["gain"] >= MINIMUM_PREFERENCE_GAIN:
        raise DemoFailure(
            f"Preferred answers gained {results['gain']:.3f} nats per token on the others; it should be "
            f"{MINIMUM_PREFERENCE_GAIN}."
        )
    if not results["norm"] > 0:
        raise DemoFailure("No trained expert LoRA arrived in the model that stock peft loaded.")
    if not results["difference"] < MAXIMUM_LOGITS_DIFFERENCE:
        raise DemoFailure(
            f"Stock peft and ktmoe disagree about the saved adapter: their logits differ by "
            f"{results['difference']:.1e} (relative, limit {MAXIMUM_LOGITS_DIFFERENCE:.0e})."
        )


def _gap(report: dict[str, Any]) -> float:
    """How much likelier preferred answers are than the others, in nats per token."""
    return report.get("rejected", 0.0) - report.get("chosen", 0.0)


def logits_difference(ours: Path, stock: Path) -> float:
    """Relative mean absolute difference between two files of logits."""
    from held_out import relative_difference
    from safetensors.torch import load_file

    return relative_difference(load_file(ours)["logits"], load_file(stock)["logits"])


def trained_parameters(adapter: Path) -> int:
    """Number of values in the saved adapter, from the header of its file."""
    from math import prod

    from safetensors import safe_open

    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as tensors:
        return sum(prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())
