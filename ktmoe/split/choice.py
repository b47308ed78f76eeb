"""Which experts of a layer are on the device: a list, those with most tokens of a calibration, or the first ones."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace

from ktmoe import counts, devices
from ktmoe.config import KTConfig
from ktmoe.types import KTError, MoEShape


def on_device(config: KTConfig, shape: MoEShape, layer: str | None = None) -> tuple[int, ...]:
    """Ids of one layer's experts that `kt_num_gpu_experts` keeps on the device, ascending; none without that key.

    Args:
        config: as the user wrote it.
        shape: of the whole layer.
        layer: its name in the model, by which a file of counts knows it.

    Raises:
        KTError: no device, more experts than can be there, or a list or file that does not fit the layer.
    """
    n, named = config.kt_num_gpu_experts, config.kt_gpu_experts
    if not n:
        return ()
    if devices.accelerator() is None:
        raise KTError(
            f"kt_num_gpu_experts: got {n}; torch sees no GPU here (ktmoe doctor says what it sees). Write 0, or leave "
            "it out."
        )
    e = shape.num_experts
    if n > e - shape.top_k:
        raise KTError(
            f"kt_num_gpu_experts: got {n}; of {e} experts, {shape.top_k} for each token, at most {e - shape.top_k} "
            "can be on the GPU: a token may have all of its experts on the CPU."
        )
    if named is None:
        return tuple(range(n))
    if not isinstance(named, (str, os.PathLike)):
        if max(named) >= e:
            raise KTError(f"kt_gpu_experts: got {max(named)}; this model's experts are 0 to {e - 1}.")
        return tuple(sorted(named))
    if layer is None:
        raise KTError(
            f"kt_gpu_experts: got {named!r}, whose counts are of a model's layers; a layer by itself takes a list of "
            "ids, or its name in the model as layer=."
        )
    layers = counts.read(named)
    if layer not in layers or len(layers[layer]) != e:
        has = f"{len(layers[layer])} experts" if layer in layers else "no such layer"
        raise KTError(
            f"kt_gpu_experts: {named}: {layer} has {e} experts here and {has} there: it is of another model. Write "
            "one for this model: ktmoe calibrate."
        )
    by_count = sorted(range(e), key=lambda expert: (-layers[layer][expert], expert))
    return tuple(sorted(by_count[:n]))


def left_on_cpu(config: KTConfig, shape: MoEShape) -> MoEShape:
    """What the CPU's backend is built for: the layer without the experts that are on the device."""
    return replace(shape, num_experts=shape.num_experts - config.kt_num_gpu_experts)


def device_bytes(config: KTConfig, shapes: Iterable[MoEShape]) -> int:
    """Bytes that the experts on the device take there, in bf16."""
    return sum(6 * config.kt_num_gpu_experts * s.hidden_size * s.intermediate_size for s in shapes)


def check_device(config: KTConfig, shapes: Iterable[MoEShape]) -> None:
    """Refuses experts that the device has no memory for.

    Args:
        config: as the user wrote it.
        shapes: of every layer, whole.

    Raises:
        KTError: names both sizes and the number that fits.
    """
    device, shapes = devices.accelerator(), list(shapes)
    if not config.kt_num_gpu_experts or config.kt_plan == "off" or device is None:
        return
    size, free = device_bytes(config, shapes), devices.free(device)
    if size > free:
        most = config.kt_num_gpu_experts * free // size
        raise KTError(
            f"kt_num_gpu_experts: got {config.kt_num_gpu_experts}; so many of each of {len(shapes)} layers take "
            f"{size / 1e9:.3g} GB in bf16, and {free / 1e9:.3g} GB of {device} are free, for everything else too. "
            f"Fewer than {most + 1} fit. kt_plan: off goes on all the same."
        )
