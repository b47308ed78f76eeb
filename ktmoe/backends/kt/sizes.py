"""Which sizes, ranks and numbers of parts the kernel takes: beyond them it crashes, or is silently wrong."""

from __future__ import annotations

from ktmoe.backends.kt.formats import FORMATS
from ktmoe.types import KTError, MoEShape


_MAX_RANK = 128  # the largest rank ever checked against a reference
_MAX_TP = 4  # K17: the merge of five and more parts sums only the first four


def packed_bytes(kind: str, shape: MoEShape) -> int:
    """Of one layer's weights, packed once; the backward takes as much again, for each layer or once for all."""
    weights = 3 * shape.num_experts * shape.hidden_size * shape.intermediate_size
    return int(weights * FORMATS[kind].bytes_per_weight)


def valid_tp(kind: str, shape: MoEShape, wanted: int) -> int:
    """The largest number of parts up to `wanted` that divides I into granules (K17, K18)."""
    fits = [
        t for t in range(1, min(wanted, _MAX_TP) + 1) if _fits(kind, shape.num_experts, shape.intermediate_size, t)
    ]
    return max(fits, default=1)


def _fits(kind: str, experts: int, size: int, parts: int = 1) -> bool:
    needed = FORMATS[kind]
    return size % (parts * needed.granule) == 0 and experts * size % (parts * needed.all_experts) == 0


def check_shape(kind: str, shape: MoEShape) -> None:
    """Refuses shapes on which the extension crashes.

    Raises:
        KTError: names the size, what is needed and the remedy.
    """
    granule = FORMATS[kind].granule
    for name in ("hidden_size", "intermediate_size"):
        if getattr(shape, name) % granule:
            other = " AMXBF16 needs multiples of 32 only, and" if kind != "AMXBF16" else ""
            raise KTError(
                f"{name}: the model has {getattr(shape, name)}; kt_backend: {kind} needs a multiple of {granule}."
                f"{other} kt_backend: torch takes any size."
            )
        if not _fits(kind, shape.num_experts, getattr(shape, name)):
            raise KTError(
                f"num_experts: the model has {shape.num_experts} of {name} {getattr(shape, name)}; kt_backend: {kind} "
                f"needs a product of the two that is a multiple of {FORMATS[kind].all_experts}. kt_backend: torch "
                "takes any size."
            )
    largest = FORMATS[kind].rank or _MAX_RANK
    if shape.rank > largest:
        raise KTError(
            f"r (lora_rank): got {shape.rank}; kt_backend: {kind} takes 1 to {largest}. Use a smaller rank or "
            "kt_backend: torch."
        )


def check_tp(kind: str, shape: MoEShape, tp: int) -> None:
    """Refuses a number of parts on which the extension crashes or is wrong.

    Raises:
        KTError: says which numbers fit.
    """
    fits = [t for t in range(1, _MAX_TP + 1) if valid_tp(kind, shape, t) == t]
    if tp not in fits:
        raise KTError(
            f"tensor parallelism: got {tp} parts; I = {shape.intermediate_size} divides into "
            f"{', '.join(map(str, fits))} for {kind}."
        )
