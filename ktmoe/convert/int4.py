"""`ktmoe quantize --format int4`: a checkpoint whose routed experts are INT4 in groups, as Kimi K2 is released."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from ktmoe_reference import pack_int4, quantize_int4
from torch import Tensor

from ktmoe.checkpoints import Checkpoint, CheckpointNames
from ktmoe.convert.changes import OutputTensor
from ktmoe.convert.merge import complete
from ktmoe.convert.output import Output
from ktmoe.convert.writing import names_written, size_written, write_all
from ktmoe.stored import GROUP
from ktmoe.types import KTError


# As compressed-tensors writes it: linear layers of the routed experts alone, weights alone.
_QUANTISATION = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": [r"re:.*\.experts\.\d+\..*"],
            "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP, "symmetric": True},
            "input_activations": None,
        }
    },
    "ignore": ["lm_head"],
}


def quantize_int4_model(model: str | os.PathLike[str], out: str | os.PathLike[str]) -> str:
    """Writes a checkpoint whose routed experts are INT4, each number rounded to the nearest; the rest is copied.

    Same files and layout as the model's, as safetensors, its experts in compressed-tensors' `pack-quantized` format.
    `model_name_or_path` takes it.

    Args:
        model: a directory, or a name on the hub.
        out: a directory, as for `merge_adapter`.

    Returns:
        What was written, in a sentence.

    Raises:
        KTError: a checkpoint that is quantised already or stacks its experts, sizes that are no multiple of 32, an
            output that is there, or a full disk. Nothing is left behind.
    """
    from ktmoe.models import experts_in, find, make_skeleton, model_configuration, names_on_disk

    place = Output(out)
    checkpoint = Checkpoint(model)
    complete(checkpoint, {})
    if stored := checkpoint.stored_keys():
        raise KTError(f"{model}: its matrices are quantised already, e.g. {stored[0]}. Train with it as it is.")
    made = make_skeleton(model_configuration(str(checkpoint.source.folder), None, {})[0])
    layers = set(experts_in(made, checkpoint))  # all there, once, of the right shape
    names = names_on_disk(made, find(made))
    tensors = {key: _outputs(checkpoint, key, names, layers) for key in checkpoint.shapes}
    place.check(names_written(checkpoint), size_written(checkpoint, tensors))
    with place.written() as part:
        write_all(part, checkpoint, tensors, "Quantising", _QUANTISATION)
    _quantised.cache_clear()
    changed = sum(len(found) > 1 for found in tensors.values())
    size = sum(t.nbytes for found in tensors.values() for t in found.values())
    return f"{Path(out)}: {changed} matrices of {len(layers)} layers in INT4, {size / 1e9:.3g} GB in all"


def _outputs(checkpoint: Checkpoint, key: str, names: CheckpointNames, layers: set[str]) -> dict[str, OutputTensor]:
    """What becomes of one tensor of the input."""
    shape, place = checkpoint.shapes[key], names.place(key)
    if place is None or place.layer not in layers:
        tensor = checkpoint.tensor(key)
        nbytes = tensor.numel() * tensor.element_size()
        return {key: OutputTensor(checkpoint.dtype(key), shape, nbytes, lambda: iter([checkpoint.tensor(key)]))}
    if place.expert is None:
        raise KTError(
            f"{key} holds all experts of a layer; INT4 files have a matrix for each. Save the model with "
            "transformers 5 (save_pretrained), which writes most families so."
        )
    out, width = shape
    if width % GROUP:
        raise KTError(f"{key}: {width} columns; INT4 needs a multiple of {GROUP}.")

    def packed() -> Iterator[Tensor]:
        yield _quantised(checkpoint, key)[0].view(torch.int32)

    def scales() -> Iterator[Tensor]:
        yield _quantised(checkpoint, key)[1]

    return {
        f"{key}_packed": OutputTensor("I32", (out, width // 8), out * width // 2, packed),
        f"{key}_scale": OutputTensor("BF16", (out, width // GROUP), 2 * out * width // GROUP, scales),
        f"{key}_shape": OutputTensor("I64", (2,), 16, lambda: iter([torch.tensor(shape)])),
    }


@functools.lru_cache(maxsize=1)  # its numbers and its scales are written one after the other
def _quantised(checkpoint: Checkpoint, key: str) -> tuple[Tensor, Tensor]:
    q, scale = quantize_int4(checkpoint.tensor(key))
    if not scale.isfinite().all():
        raise KTError(f"{key}: holds NaN or infinite numbers. Is the checkpoint damaged?")
    return pack_int4(q), scale
