"""`ktmoe plan`: the memory that a model takes, by part and by format, from its configuration alone."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from ktmoe import memory
from ktmoe.checkpoints import stored_format
from ktmoe.models import layers_of
from ktmoe.retained import bytes_per_token
from ktmoe.room import Way, as_keys, free_memory, gigabytes, ways
from ktmoe.types import KTError, MoEShape


_MASTERS = 16  # bytes a LoRA parameter: fp32 itself, its gradient, and AdamW's two moments


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes, of a model and of this machine.

    Attributes:
        layers: how many there are of each shape.
        rest: parameters outside of the routed experts, in bf16.
        lora: LoRA of the routed experts: fp32 parameters, gradients and AdamW's moments.
        retained: of one token, from its forward to its backward, in all layers, where forwards are kept.
        ways: how the experts' weights can be held.
        free: what this machine has for them, swap included.
        total: memory of this machine, or what a container or batch job grants.
    """

    layers: dict[MoEShape, int]
    rest: int
    lora: int
    retained: int
    ways: tuple[Way, ...]
    free: int
    total: int

    @property
    def best(self) -> Way | None:
        """The fastest way that fits beside the experts' LoRA."""
        return next((way for way in self.ways if not way.why_not and way.size + self.lora <= self.free), None)

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        return {
            "layers": [{**vars(shape), "count": count} for shape, count in self.layers.items()],
            "rest_bytes": self.rest,
            "lora_bytes": self.lora,
            "retained_bytes_per_token": self.retained,
            "free_bytes": self.free,
            "total_bytes": self.total,
            "ways": [
                {"keys": dict(w.keys), "bytes": w.size, "fits": w.size + self.lora <= self.free, "why_not": w.why_not}
                for w in self.ways
            ],
            "best": dict(self.best.keys) if self.best else None,
        }


def make(model: str, rank: int, trust_remote_code: bool = False) -> MemoryPlan:
    """Reads a model's configuration; no weight, and nothing that is not there already or on the hub.

    Args:
        model: a folder, or a hub name.
        rank: of the experts' LoRA.
        trust_remote_code: whether the model's own code may be run.

    Raises:
        KTError: there is no such model, or it has no routed experts that ktmoe runs.
    """
    try:
        config = transformers.AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        said = " ".join(str(error).split())
        raise KTError(f"{model}: neither a folder with a config.json nor a model of the hub ({said}).") from error
    shapes, others = layers_of(config, rank, trust_remote_code=trust_remote_code)
    lora = sum(rank * 3 * (s.hidden_size + s.intermediate_size) * s.num_experts for s in shapes)
    return MemoryPlan(
        dict(Counter(shapes)),
        2 * others,
        _MASTERS * lora,
        sum(bytes_per_token(s, torch.bfloat16) for s in shapes),
        tuple(ways(shapes, stored_format(config))),
        free_memory(),
        memory.total(),
    )


def show(model: str, rank: int, as_json: bool, to: Console, trust_remote_code: bool = False) -> int:
    """Says what fits.

    Args:
        model: a folder, or a hub name.
        rank: of the experts' LoRA.
        as_json: as one JSON object on stdout instead of a table.
        to: the terminal.
        trust_remote_code: whether the model's own code may be run.

    Returns:
        The exit code: 1 if no way fits, else 0.
    """
    plan = make(model, rank, trust_remote_code)
    if as_json:
        print(json.dumps({"model": model, "rank": rank, **plan.as_json()}, indent=1))
        return int(plan.best is None)
    for shape, count in plan.layers.items():
        to.print(
            f"{count} layers of {shape.num_experts} routed experts, {shape.hidden_size} x {shape.intermediate_size}, "
            f"{shape.top_k} for each token",
            highlight=False,
        )
    table = Table(title="Memory of the routed experts")
    for column in ("keys", "weights", ""):
        table.add_column(column)
    for way in plan.ways:
        fits = way.size + plan.lora <= plan.free
        verdict = way.why_not or ("fits" if fits else "does not fit")
        table.add_row(as_keys(way.keys), gigabytes(way.size), verdict, style=None if fits else "dim")
    to.print(table)
    for line in (
        f"LoRA of the routed experts, rank {rank}: {gigabytes(plan.lora)} (fp32, gradients and AdamW's moments)",
        f"kept for the backward: {plan.retained / 1e3:.3g} KB a token, unless kt_cpu_activation: recompute",
        f"everything else of the model in bf16: {gigabytes(plan.rest)}, on the GPU if there is one",
        f"this machine: {gigabytes(plan.total)} in all, {gigabytes(plan.free)} free, swap included",
        f"the fastest way that fits: {as_keys(plan.best.keys)}" if plan.best else "None fits.",
    ):
        to.print(line, highlight=False, soft_wrap=True)
    return int(plan.best is None)
