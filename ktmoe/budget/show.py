"""A budget for people and for scripts: `ktmoe plan`, and its short form when a training starts."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from ktmoe.budget.budget import Budget, Part, remedy
from ktmoe.budget.prediction import Prediction
from ktmoe.cores import numa_nodes
from ktmoe.room import as_keys, gigabytes


def as_json(budget: Budget, seconds: Prediction | None = None) -> dict[str, Any]:
    """For scripts: sizes in bytes, times in seconds."""
    best = budget.best
    return {
        "layers": [{**vars(shape), "count": count} for shape, count in budget.layers.items()],
        "batch": vars(budget.batch),
        "processes": budget.processes,
        "experts_on_device": budget.on_device,
        "host": [vars(part) for part in budget.host],
        "device": [vars(part) for part in budget.device],
        "device_name": budget.device_name,
        "free_host_bytes": budget.free_host,
        "free_device_bytes": budget.free_device,
        "total_host_bytes": budget.total_host,
        "predicted_seconds": {"experts": seconds.experts, "rest": seconds.rest} if seconds else None,
        "ways": [
            {
                "keys": dict(way.keys),
                "bytes": way.size,
                "activation_bytes": way.activations,
                "host_bytes": budget.on_host(way),
                "fits": budget.fits(way),
                "why_not": way.why_not,
            }
            for way in (*budget.ways, *budget.others)
        ],
        "best": dict(best.keys) if best else None,
    }


def show(budget: Budget, seconds: Prediction | None, to: Console) -> None:
    """Prints what training takes, by part, and which ways of holding the experts fit."""
    b = budget.batch
    for shape, count in budget.layers.items():
        line = f"{shape.num_experts} routed experts, {shape.hidden_size} x {shape.intermediate_size}"
        there = f", {budget.on_device} of them on {budget.device_name}" if budget.on_device else ""
        to.print(f"{count} layers of {line}, {shape.top_k} for each token{there}", highlight=False)
    kept = "checkpointing" if b.checkpointing else "no checkpointing"
    to.print(f"a batch of {b.sequences} x {b.length} tokens, {kept}, LoRA of rank {_rank(budget)}", highlight=False)
    if budget.processes > 1:
        own = "" if budget.free_device is None else " and a device of its own each"
        to.print(f"{budget.processes} processes on this host, with a batch{own}; one has the experts", highlight=False)
    where = "host memory" if budget.free_device is None else budget.device_name
    to.print(
        _parts("Beside the weights of the routed experts", [("host memory", budget.host), (where, budget.device)])
    )
    ways = Table(title="The routed experts, in host memory")
    for column in ("keys", "weights", "activations", "host memory in all", ""):
        ways.add_column(column, justify="left" if column in ("keys", "") else "right")
    for way in (*budget.ways, *budget.others):
        verdict = way.why_not or ("fits" if budget.fits(way) else "does not fit")
        sizes = (way.size, way.activations, budget.on_host(way))
        ways.add_row(as_keys(way.keys), *map(gigabytes, sizes), verdict, style=None if budget.fits(way) else "dim")
    to.print(ways)
    for line in [*_lines(budget), *([_time(seconds)] if seconds else [])]:
        to.print(line, highlight=False, soft_wrap=True)


def sentence(budget: Budget) -> str:
    """What a training takes, in a line."""
    way = budget.planned
    if way is None:
        return "no backend of this machine computes these experts"
    host = f"{gigabytes(budget.on_host(way))} of host memory ({gigabytes(budget.free_host)} free, swap included)"
    if budget.free_device is None:
        return f"at most {host}"
    device = f"{gigabytes(budget.of_device())} of {budget.device_name} ({gigabytes(budget.free_device)} free)"
    return f"at most {host} and {device}"


def _time(seconds: Prediction) -> str:
    rest = "the GPU's part is not predicted" if seconds.rest is None else f"{seconds.rest:.3g} s in everything else"
    threads = f" with {seconds.plan.threads} threads" if seconds.plan.threads else ""
    return (
        f"a step, predicted from what was measured here: {seconds.experts:.3g} s in the routed experts "
        f"({seconds.plan.backend}{threads}), {rest}"
    )


def _rank(budget: Budget) -> int:
    return max(shape.rank for shape in budget.layers)


def _parts(title: str, groups: list[tuple[str, tuple[Part, ...]]]) -> Table:
    table = Table(title=title)
    table.add_column("")
    table.add_column("where")
    table.add_column("size", justify="right")
    for where, parts in groups:
        for part in parts:
            table.add_row(part.name, where, gigabytes(part.size))
    return table


def _lines(budget: Budget) -> list[str]:
    total, free = gigabytes(budget.total_host), gigabytes(budget.free_host)
    found = [f"this machine: {total} of memory in all, {free} free, swap included"]
    if budget.free_device is not None:
        found.append(
            f"{budget.device_name}: {gigabytes(budget.of_device())} needed, {gigabytes(budget.free_device)} free"
        )
    nodes = numa_nodes()
    if len(nodes) > 1 and budget.planned:
        found.append(
            f"with kt_tp_enabled: {gigabytes(budget.planned.size // min(4, len(nodes)))} of the weights on each of "
            f"{min(4, len(nodes))} NUMA nodes"
        )
    if budget.best:
        return [*found, f"the fastest way that fits: {as_keys(budget.best.keys)}"]
    return [*found, f"None fits. {remedy(budget)}"]
