"""Whether a model's routed experts fit into memory, known before a weight is read; and in which format they would."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import psutil

from ktmoe import memory
from ktmoe.backends import TABLE, Memory, Plan, kt
from ktmoe.config import KTConfig
from ktmoe.planning import MAX_LEN, plan
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
        activations: bytes from their forwards to their backwards, of one batch.
    """

    keys: Mapping[str, str]
    size: int
    why_not: str = ""
    activations: int = 0


def free_memory() -> int:
    """Bytes for packed weights: what is free without swapping, swap, and what an earlier model in this process had."""
    return memory.available() + psutil.swap_memory().free + kt.idle_bytes()


def ways(
    shapes: Sequence[MoEShape],
    stored: str = "",
    tokens: int = 0,
    one_at_a_time: bool = False,
    max_len: int = MAX_LEN,
) -> Iterator[Way]:
    """How the experts can be held, from the fastest way to the smallest.

    Args:
        shapes: of every layer.
        stored: the format of the weights, as `ExpertWeights.stored`.
        tokens: of a batch.
        one_at_a_time: whether a layer's backward follows its forward before the next layer's, as checkpointing has it
            where forwards are not retained.
        max_len: tokens of a call of the kernel.
    """
    for keys in WAYS:
        if TABLE[keys["kt_backend"]].stored in ("", stored):
            yield way_of(keys, shapes, tokens, one_at_a_time, max_len)


def way_of(
    keys: Mapping[str, str],
    shapes: Sequence[MoEShape],
    tokens: int = 0,
    one_at_a_time: bool = False,
    max_len: int = MAX_LEN,
) -> Way:
    """One way to hold the experts, by its keys; the rest as `ways` takes it."""
    row = TABLE[keys["kt_backend"]]
    share = keys.get("kt_share_backward") == "on"
    planned = Plan(row.name, None, 1, max_len, share, keys.get("kt_torch_packing", "auto"))
    why_not = next((why for shape in set(shapes) if (why := row.refuse_shape(shape))), "") or row.refuse_host()
    called = [row.activations(planned, row.built_for(shape), tokens) for shape in shapes]
    if one_at_a_time and not row.is_kernel:  # an object of the kernel keeps what it has
        called = [Memory(0, once=part.each + part.once) for part in called]
    return Way(keys, _bytes([(planned, shape) for shape in shapes]), why_not, _sum(called))


def _bytes(layers: Sequence[tuple[Plan, MoEShape]]) -> int:
    return _sum([TABLE[planned.backend].memory(planned, shape) for planned, shape in layers])


def _sum(parts: Sequence[Memory]) -> int:
    return sum(part.each for part in parts) + max((part.once for part in parts), default=0)


def split(found: Sequence[Way], config: KTConfig, shapes: Sequence[MoEShape]) -> tuple[list[Way], list[Way]]:
    """The ways that a configuration leaves open, and the others. `auto` quantises nothing unasked.

    A backend that this host does not have has given way to torch, as in `planning.plan`.

    Args:
        found: from `ways`.
        config: as the user wrote it.
        shapes: of every layer.
    """
    wanted = {name: getattr(config, name) for name in ("kt_backend", "kt_share_backward", "kt_torch_packing")}
    if config.kt_backend != "auto" and TABLE[config.kt_backend].refuse_host():
        wanted["kt_backend"] = plan(config, shapes[0]).backend
    mine = [way for way in found if _has(way, wanted)]
    return mine, [way for way in found if way not in mine]


def _has(way: Way, wanted: Mapping[str, str]) -> bool:
    if wanted["kt_backend"] == "auto" and way.keys["kt_backend"] == "AMXInt8":
        return False
    return all(wanted[name] in ("auto", value) for name, value in way.keys.items())


def check_least(config: KTConfig, shapes: Sequence[MoEShape], stored: str, rest: int) -> None:
    """Refuses, before anything is loaded, a model that does not fit however its experts are held.

    Args:
        config: as the user wrote it.
        shapes: of every layer.
        stored: the format of the weights, as `ExpertWeights.stored`.
        rest: bytes of host memory for what is not routed experts.

    Raises:
        KTError: names the sizes and the keys with which they fit.
    """
    if config.kt_plan == "off":
        return
    found = [way for way in ways(shapes, stored) if not way.why_not]
    (mine, others), free = split(found, config, shapes), free_memory()
    least = min((way.size for way in mine), default=0)
    if least + rest <= free:
        return
    fits = [way for way in others if way.size + rest <= free]
    raise KTError(
        f"kt_backend: {config.kt_backend}: the routed experts take {gigabytes(least)} of memory at least, everything "
        f"else in host memory {gigabytes(rest)}, and {gigabytes(free)} are free, swap included. {_remedy(fits)} "
        "kt_plan: off goes on all the same."
    )


def _remedy(fits: Sequence[Way]) -> str:
    if not fits:
        return "A machine with more memory is needed."
    return f"What fits: {'; '.join(f'{as_keys(way.keys)} ({gigabytes(way.size)})' for way in fits[:3])}."


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
    if size <= free or config.kt_plan == "off":
        return
    fits = [way for way in ways(shapes, stored) if not way.why_not and way.size <= free]
    raise KTError(
        f"kt_backend: {config.kt_backend}: the routed experts take {gigabytes(size)} of memory, and {gigabytes(free)} "
        f"are free, swap included. {_remedy(fits)} kt_plan: off goes on all the same."
    )


def as_keys(keys: Mapping[str, str]) -> str:
    """As they are written into a YAML."""
    return ", ".join(f"{name}: {value}" for name, value in keys.items())


def gigabytes(size: int) -> str:
    """A size for people."""
    return f"{size / 1e9:.3g} GB"
