"""Writing a checkpoint, a tensor in memory at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tqdm.auto import tqdm

from ktmoe.checkpoints import Checkpoint
from ktmoe.convert.changes import OutputTensor
from ktmoe.convert.output import is_weights
from ktmoe.types import KTError


_SINGLE, _INDEX, _CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"


def names_written(checkpoint: Checkpoint) -> list[str]:
    """The files of the output: those of the input that are read, as safetensors, and what lies beside them."""
    index = [_INDEX] if checkpoint.source.promised else []
    return [*(_name(file, checkpoint) for file in checkpoint.files()), *index, *(f.name for f in _beside(checkpoint))]


def size_written(checkpoint: Checkpoint, tensors: Mapping[str, Mapping[str, OutputTensor]]) -> int:
    """Bytes of the output, without what headers and index take."""
    return _size(tensors) + sum(f.stat().st_size for f in _beside(checkpoint))


def _size(tensors: Mapping[str, Mapping[str, OutputTensor]]) -> int:
    return sum(t.nbytes for found in tensors.values() for t in found.values())


def write_all(
    part: Path,
    checkpoint: Checkpoint,
    tensors: Mapping[str, Mapping[str, OutputTensor]],
    what: str,
    quantisation: Mapping[str, Any] | None = None,
) -> None:
    """Writes weights, index, configuration and what belongs to them.

    Args:
        part: an empty folder.
        checkpoint: the input.
        tensors: of the output, by the key of the input that they come from.
        what: is going on, for the bar.
        quantisation: what config.json says of it.

    Raises:
        KTError: a file is not as it was written.
    """
    size = _size(tensors)
    where: dict[str, str] = {}
    with tqdm(total=size, desc=what, unit="B", unit_scale=True) as bar:
        for file, keys in checkpoint.files().items():
            kept = {name: tensor for k in keys for name, tensor in tensors.get(k, {}).items()}
            name = _name(file, checkpoint)
            _write(part / name, kept, checkpoint.metadata(keys[0]) if keys else {}, bar.update)
            where |= dict.fromkeys(kept, name)
    for other in _beside(checkpoint):
        shutil.copyfile(other, part / other.name)
    if checkpoint.source.promised:
        index = {"metadata": {**checkpoint.source.metadata, "total_size": size}, "weight_map": where}
        (part / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    config: dict[str, Any] = json.loads((part / _CONFIG).read_text(encoding="utf-8"))
    changed = ["transformers_weights", *(["quantization_config"] if checkpoint.stored_keys() else [])]
    if any([config.pop(key, None) for key in changed]) or quantisation:
        config |= {"quantization_config": quantisation} if quantisation else {}
        (part / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _name(file: str, checkpoint: Checkpoint) -> str:
    """By which transformers finds it without being told."""
    if not checkpoint.source.promised:
        return _SINGLE
    name = Path(file).name
    return (
        name if name.endswith(".safetensors") else f"{Path(name.replace('pytorch_model', 'model')).stem}.safetensors"
    )


def _beside(checkpoint: Checkpoint) -> list[Path]:
    """Configuration, tokenizer, generation files."""
    folder = checkpoint.source.folder
    found = sorted(folder.iterdir()) if folder else []
    return [f for f in found if f.is_file() and not is_weights(f.name) and not f.name.startswith((".", "adapter_"))]


def _write(
    path: Path, tensors: Mapping[str, OutputTensor], metadata: dict[str, str], progress: Callable[[int], Any]
) -> None:
    """One safetensors file. The library's own writer wants all of its tensors in memory at once."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for key, tensor in tensors.items():
        header[key] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            for piece in tensor.pieces():
                file.write(piece.contiguous().reshape(-1).view(torch.uint8).numpy().data)
                del piece  # before the next one is made
            progress(tensor.nbytes)
    with safe_open(path, "pt") as written:  # the library checks the header against the length of the file
        if set(written.keys()) != set(tensors):
            raise KTError(f"{path}: not as it was written. Is the disk full?")
