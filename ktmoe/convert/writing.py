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

from ktmoe.checkpoints.reader import INDEX, Checkpoint
from ktmoe.convert.changes import OutputTensor
from ktmoe.types import KTError


WEIGHT_FILES = ("safetensors", "bin", "pt", "pth", "ckpt", "h5", "msgpack", "onnx", "gguf", "part")


def write_all(
    part: Path, source: Path, checkpoint: Checkpoint, tensors: Mapping[str, OutputTensor], config: dict[str, Any]
) -> None:
    size = sum(t.nbytes for t in tensors.values())
    with tqdm(total=size, desc="Merging", unit="B", unit_scale=True) as bar:
        for file, keys in checkpoint.files().items():
            kept = {k: tensors[k] for k in keys if k in tensors}
            _write(part / Path(file).name, kept, checkpoint.metadata(keys[0]) if keys else {}, bar.update)
    for other in source.iterdir():
        weights = other.name.endswith((".index.json", *(f".{s}" for s in WEIGHT_FILES)))
        if other.is_file() and not weights and not other.name.startswith((".", "adapter_")):
            shutil.copyfile(other, part / other.name)
    if checkpoint.fp8_keys():
        config.pop("quantization_config", None)
        (part / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    index = source / INDEX
    if index.is_file():
        found = json.loads(index.read_text(encoding="utf-8"))
        found["weight_map"] = {k: v for k, v in found["weight_map"].items() if k in tensors}
        found["metadata"] = {**(found.get("metadata") or {}), "total_size": size}
        (part / INDEX).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


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
