"""`ktmoe merge`: a checkpoint with an adapter merged into it, written shard by shard, a tensor in memory at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktmoe.checkpoints.reader import Checkpoint
from ktmoe.convert.changes import Source, plan
from ktmoe.convert.fitting import fit
from ktmoe.convert.writing import WEIGHT_FILES, write_all
from ktmoe.types import KTError


@dataclass(frozen=True)
class Merged:
    """What `merge_adapter` wrote.

    Attributes:
        path: of the checkpoint.
        counts: matrices that changed, by "experts", "attention", "shared experts" and "elsewhere".
        layers: of routed experts that have changed.
        shards: files written.
        nbytes: of all tensors.
        dequantised: matrices that were FP8 and are bf16 now.
    """

    path: str
    counts: dict[str, int]
    layers: int
    shards: int
    nbytes: int
    dequantised: int

    def __str__(self) -> str:
        """In one paragraph."""
        what = ", ".join(f"{n} in {kind}" for kind, n in self.counts.items())
        fp8 = f" {self.dequantised} FP8 matrices became bf16." if self.dequantised else ""
        return (
            f"{self.path}: {sum(self.counts.values())} matrices merged: {what} ({self.layers} layers of routed "
            f"experts). {self.shards} shards, {self.nbytes / 1e9:.3g} GB.{fp8}"
        )


def merge_adapter(
    model_path: str | os.PathLike[str], adapter_path: str | os.PathLike[str], out_path: str | os.PathLike[str]
) -> Merged:
    """Writes a model with a LoRA adapter merged in: W + scaling * B A in fp32, rounded to W's dtype.

    Same files and layout as the model's, so that whatever loads the one loads the other. Configuration, tokenizer and
    generation files are copied. FP8 weights with block scales become bf16. At most one tensor is in memory at a time
    (of stacked experts: one expert's matrix). The output appears when it is complete, or not at all.

    Args:
        model_path: a directory with safetensors, or a name on the hub.
        adapter_path: of any format that `ktmoe.load_adapter` reads.
        out_path: a directory that does not exist, or is empty.

    Returns:
        What was merged.

    Raises:
        KTError: an output that is there, an adapter that does not fit the model, quantised weights of another kind,
            damaged files, or a full disk. Nothing is left behind.
    """
    out = Path(out_path)
    part = out.with_name(f"{out.name}.part")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise KTError(f"out_path: {out} is there already and not empty. Name a new directory.")
    if part.exists():
        raise KTError(f"out_path: {part} is there, perhaps of a merge that was killed. Delete it.")
    source = _local(str(model_path))
    config_json = json.loads((source / "config.json").read_text(encoding="utf-8"))
    checkpoint = Checkpoint(source)
    _check_quantisation(checkpoint, config_json)
    names, adapter, model = fit(str(source), str(adapter_path))
    tensors = plan(Source(checkpoint), names, adapter, model)
    size = sum(t.nbytes for t in tensors.values())
    parent = out.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(parent).free
    if free < size:
        raise KTError(f"out_path: {parent} has {free / 1e9:.3g} GB free; the checkpoint takes {size / 1e9:.3g} GB.")
    part.mkdir()
    try:
        write_all(part, source, checkpoint, tensors, config_json)
        if out.exists():
            out.rmdir()
        os.replace(part, out)
    except OSError as error:
        raise KTError(f"{part}: {error}. Nothing was left behind.") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    counts: dict[str, int] = {}
    for tensor in tensors.values():
        if tensor.count:
            counts[tensor.kind] = counts.get(tensor.kind, 0) + tensor.count
    return Merged(str(out), counts, len(adapter.experts), len(checkpoint.files()), size, len(checkpoint.fp8_keys()))


def _local(model: str) -> Path:
    """The model's directory, downloaded if it is a name on the hub."""
    if not Path(model).is_dir():
        from huggingface_hub import snapshot_download

        try:
            model = snapshot_download(model, ignore_patterns=[f"*.{s}" for s in WEIGHT_FILES[1:]])
        except (OSError, ValueError) as error:
            raise KTError(f"{model}: neither a directory nor a model that the hub can give ({error}).") from error
    if not (Path(model) / "config.json").is_file():
        raise KTError(f"{model}: no config.json in it. Name the directory of a transformers model.")
    return Path(model)


def _check_quantisation(checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
    quantisation = config.get("quantization_config")
    fp8 = set(checkpoint.fp8_keys())
    odd = [k for k in checkpoint.shapes if checkpoint.dtype(k).startswith("F8") and k not in fp8]
    odd += [k for k in fp8 if len(checkpoint.shapes[k]) != 2]
    method = quantisation.get("quant_method") if isinstance(quantisation, Mapping) else quantisation
    if odd or (method and method != "fp8"):
        raise KTError(
            f"{checkpoint.path}: quantised ({method or 'FP8'}{f', e.g. {odd[0]}' if odd else ''}), and LoRA is merged "
            "into bf16, fp16, fp32, or FP8 with block scales. Take the unquantised checkpoint."
        )
