"""Whether a model's routed experts fit into memory, known before a weight is read; and in which format they would."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import psutil

from ktmoe import memory
from ktmoe.backends import TABLE, Plan, kt
from ktmoe.config import KTConfig
from ktmoe.planning import plan
from ktmoe.types import KTError, MoEShape


# From the fastest to the smallest.
WAYS: tuple[Mapping[str, str], ...] = (
    {"kt_backend": "AMXBF16", "kt_share_backward": "off"},
    {"kt_backend": "AMXBF16", "kt_share_backward": "on"},
    {"kt_backend": "AMXFP8", "kt_share_backward": "on"},
    {"kt_backend": "AMXInt8", "kt_share_backward": "on"},
    {"kt_backend": "AMXInt4", "kt_share_backward": "on"},
    {"kt_backend": "torch", "kt_torch_packing": "both"},
    {"kt_backend": "torch", "kt_torch_packing": "forward"},
    {"kt_backend": "torch", "kt_torch_packing": "off"},
)


@dataclass(frozen=True)
class Way:
    """One way to hold the experts.

    Attributes:
        keys: to write.
        size: bytes of the process's memory that their weights take.
        why_not: why this machine cannot compute so, "" if it can.
    """

    keys: Mapping[str, str]
    size: int
    why_not: str = ""


def free_memory() -> int:
    """Bytes for packed weights: what is free without swapping, swap, and what an earlier model in this process had."""
    return memory.available() + psutil.swap_memory().free + kt.idle_bytes()


def ways(shapes: Sequence[MoEShape], stored: str = "") -> Iterator[Way]:
    """How the experts can be held, from the fastest way to the smallest.

    Args:
        shapes: of every layer.
        stored: the format of the weights, as `ExpertWeights.stored`.
    """
    for keys in WAYS:
        row = TABLE[keys["kt_backend"]]
        if row.stored not in ("", stored):
            continue
        share = keys.get("kt_share_backward") == "on"
        planned = Plan(row.name, None, 1, 1, share, keys.get("kt_torch_packing", "auto"))
        why_not = next((why for shape in set(shapes) if (why := row.refuse_shape(shape))), "") or row.refuse_host()
        yield Way(keys, _bytes([(planned, shape) for shape in shapes]), why_not)


def _bytes(layers: Sequence[tuple[Plan, MoEShape]]) -> int:
    parts = [TABLE[planned.backend].memory(planned, shape) for planned, shape in layers]
    return sum(part.each for part in parts) + max((part.once for part in parts), default=0)


def check_room(config: KTConfig, shapes: Sequence[MoEShape], stored: str = "") -> None:
    """Refuses experts whose packed weights alone are larger than the memory, swap included.

    Args:
        config: with what is `auto` decided.
        shapes: of every layer.
        stored: the format of the weights, as `ExpertWeights.stored`.

    Raises:
        KTError: names both sizes and the keys with which they fit.
    """
    size, free = _bytes([(plan(config, shape, stored), shape) for shape in shapes]), free_memory()
    if size <= free:
        return
    fits = [way for way in ways(shapes, stored) if not way.why_not and way.size <= free]
    shown = "; ".join(f"{as_keys(way.keys)} ({gigabytes(way.size)})" for way in fits[:3])
    raise KTError(
        f"kt_backend: {config.kt_backend}: the routed experts take {gigabytes(size)} of memory, and {gigabytes(free)} "
        f"are free, swap included. {'What fits: ' + shown + '.' if shown else 'A machine with more memory is needed.'}"
    )


def as_keys(keys: Mapping[str, str]) -> str:
    """As they are written into a YAML."""
    return ", ".join(f"{name}: {value}" for name, value in keys.items())


def gigabytes(size: int) -> str:
    """A size for people."""
    return f"{size / 1e9:.3g} GB"
