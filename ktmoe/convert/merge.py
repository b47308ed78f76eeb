"""`ktmoe merge`: a checkpoint with an adapter merged into it, written shard by shard, a tensor in memory at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktmoe.checkpoints import HUB, Checkpoint
from ktmoe.convert.changes import Source, plan
from ktmoe.convert.fitting import fit
from ktmoe.convert.output import WEIGHT_FILES, Output
from ktmoe.convert.writing import names_written, size_written, write_all
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
        dequantised: matrices that were quantised and are bf16 now.
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
        became = f" {self.dequantised} quantised matrices became bf16." if self.dequantised else ""
        return (
            f"{self.path}: {sum(self.counts.values())} matrices merged: {what} ({self.layers} layers of routed "
            f"experts). {self.shards} shards, {self.nbytes / 1e9:.3g} GB.{became}"
        )


def merge_adapter(
    model_path: str | os.PathLike[str],
    adapter_path: str | os.PathLike[str],
    out_path: str | os.PathLike[str],
    *,
    model_options: Mapping[str, Any] | None = None,
    adapter_options: Mapping[str, Any] | None = None,
    finish: Callable[[Path], None] | None = None,
) -> Merged:
    """Writes a model with a LoRA adapter merged in: W + scaling * B A in fp32, rounded to W's dtype.

    Same files and layout as the model's, as safetensors: whatever loads the one loads the other. Configuration,
    tokenizer and generation files are copied. FP8 weights with block scales become bf16. At most one tensor is in
    memory at a time (of stacked experts: one expert's matrix). The output appears when it is complete, or not at all.

    Args:
        model_path: a directory, or a name on the hub; the files are those that transformers reads.
        adapter_path: of any format that `ktmoe.load_adapter` reads.
        out_path: a directory. One that is there is written into if it holds no model and no file of the same name.
        model_options: `subfolder`, `revision`, `cache_dir`, `token` ... of the model, as for `from_pretrained`.
        adapter_options: those of the adapter.
        finish: writes more into the folder, which it gets, before it is in its place.

    Returns:
        What was merged.

    Raises:
        KTError: an output that is there, an adapter that does not fit the model, quantised weights of another kind,
            damaged files, or a full disk. Nothing is left behind.

    Examples:
        >>> merged = ktmoe.merge_adapter(model_path, adapter_path, new_path)
        >>> merged.counts["experts"]  # 1 layer, 4 experts, 3 projections
        12
        >>> model = transformers.AutoModelForCausalLM.from_pretrained(new_path)
    """
    hub, adapter_hub = _hub("model_options", model_options), _hub("adapter_options", adapter_options)
    out = Output(out_path)
    checkpoint = Checkpoint(
        model_path, adapter_beside=os.path.realpath(model_path) == os.path.realpath(adapter_path), **hub
    )
    complete(checkpoint, hub)
    names, adapter, model = fit(str(checkpoint.source.folder), str(adapter_path), adapter_hub)
    tensors = plan(Source(checkpoint), names, adapter, model)
    written = {key: {key: tensor} for key, tensor in tensors.items()}
    out.check(names_written(checkpoint), size_written(checkpoint, written))
    with out.written() as part:
        write_all(part, checkpoint, written, "Merging")
        if finish is not None:
            finish(part)
    counts: dict[str, int] = {}
    for tensor in tensors.values():
        if tensor.count:
            counts[tensor.kind] = counts.get(tensor.kind, 0) + tensor.count
    size = sum(t.nbytes for t in tensors.values())
    return Merged(
        str(out_path), counts, len(adapter.experts), len(checkpoint.files()), size, len(checkpoint.stored_keys())
    )


def _hub(argument: str, given: Mapping[str, Any] | None) -> dict[str, Any]:
    odd = sorted(set(given or ()) - set(HUB))
    if odd:
        raise KTError(f"{argument}: got {odd[0]!r}; expected some of {', '.join(HUB)}.")
    return {k: v for k, v in (given or {}).items() if v is not None}


def complete(checkpoint: Checkpoint, hub: Mapping[str, Any]) -> None:
    """Downloads what lies beside the weights, where the model is on the hub.

    Raises:
        KTError: no config.json.
    """
    source = checkpoint.source
    if source.folder is None:
        raise KTError(f"{source.path}: no config.json in it. Name the directory of a transformers model.")
    if os.path.isdir(source.path):
        return
    from huggingface_hub import snapshot_download

    options = {k: v for k, v in hub.items() if k not in ("subfolder", "proxies")}
    ignored = ["*.index.json", *(f"*.{suffix}" for suffix in WEIGHT_FILES)]
    try:
        snapshot_download(source.path, ignore_patterns=ignored, **options)
    except (OSError, ValueError) as error:
        raise KTError(f"{source.path}: neither a directory nor a model that the hub can give ({error}).") from error
