"""`ktmoe merge`: a checkpoint with an adapter merged into it, written shard by shard, a tensor in memory at a time."""

from __future__ import annotations

import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm

from ktmoe.adapters.config import PREFIX, scale
from ktmoe.adapters.files import Adapter, read_adapter
from ktmoe.adapters.layout import checkpoint_layout
from ktmoe.checkpoints.names import CheckpointNames, ExpertKey
from ktmoe.checkpoints.reader import INDEX, Checkpoint
from ktmoe.models.families import find, names_on_disk
from ktmoe.types import PROJECTIONS, KTError, Lora


_SCALE = "_scale_inv"
_REPLACED = ".original_module."  # what a module that was trained whole was before
_FLOATS = ("BF16", "F16", "F32", "F64")
_WEIGHT_FILES = ("safetensors", "bin", "pt", "pth", "ckpt", "h5", "msgpack", "onnx", "gguf", "part")
_KINDS = (("shared_expert", "shared experts"), ("shared_mlp", "shared experts"), ("attn", "attention"))
_MERGE_THERE = "Merge this adapter with stock peft (merge_and_unload)."


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


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the output: its dtype as safetensors writes it, its size, and its bytes, piece by piece."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    pieces: Callable[[], Iterator[Tensor]]
    kind: str = ""
    count: int = 0


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
    names, adapter, model = _fit(str(source), str(adapter_path))
    tensors = _plan(_Source(checkpoint), names, adapter, model)
    size = sum(t.nbytes for t in tensors.values())
    parent = out.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(parent).free
    if free < size:
        raise KTError(f"out_path: {parent} has {free / 1e9:.3g} GB free; the checkpoint takes {size / 1e9:.3g} GB.")
    part.mkdir()
    try:
        _write_all(part, source, checkpoint, tensors, config_json)
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
            model = snapshot_download(model, ignore_patterns=[f"*.{s}" for s in _WEIGHT_FILES[1:]])
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


def _fit(source: str, adapter_path: str) -> tuple[CheckpointNames, Adapter, nn.Module]:
    """The adapter, and the class of model that it fits: the causal language model, else the one in config.json."""
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise KTError(f"{source}: {error}") from error
    architecture = getattr(transformers, (config.architectures or ["-"])[0], None)
    makers = [AutoModelForCausalLM.from_config, *([architecture._from_config] if architecture else [])]
    refused: list[KTError] = []
    for make in makers:
        try:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = make(config)
        except (ValueError, KeyError, AttributeError, TypeError) as error:  # not that kind of model
            refused.append(KTError(f"{source}: transformers makes no model of it ({error})."))
            continue
        try:
            found = find(model)
            shapes = {name: layer.shape() for name, layer in found.items()}
            adapter = read_adapter(adapter_path, shapes, checkpoint_layout(config.model_type))
            _check_modules(adapter, model)
        except KTError as error:
            refused.append(error)
            continue
        return names_on_disk(model, found), adapter, model
    raise refused[0]


def _check_modules(adapter: Adapter, model: nn.Module) -> None:
    """Refuses an adapter that is not of this model, or not plain LoRA."""
    parameters = {n: tuple(p.shape) for n, p in model.named_parameters()}
    for key, tensor in adapter.rest.items():
        if _REPLACED in key:
            continue
        name, lora, side = key.removeprefix(PREFIX).partition(".lora_")
        if not lora:
            there = parameters.get(_parameter(key), "no parameter of that name")
            if there != tuple(tensor.shape):
                raise KTError(
                    f"{adapter.source}: {key} {tuple(tensor.shape)} does not fit the model, which has {there}. "
                    f"{_MERGE_THERE}"
                )
        elif f"{name}.weight" not in parameters:
            raise KTError(f"{adapter.source}: {key} does not fit the model, which has no {name}.weight.")
        elif side not in ("A.weight", "B.weight", "embedding_A", "embedding_B") or tensor.dim() != 2:
            raise KTError(f"{adapter.source}: {key} is more than plain LoRA. {_MERGE_THERE}")
        else:
            out, inner = parameters[f"{name}.weight"][:: -1 if side.startswith("embedding") else 1]
            here, wanted = (tensor.shape[1], inner) if "A" in side else (tensor.shape[0], out)
            if here != wanted:
                raise KTError(f"{adapter.source}: {key} is {tuple(tensor.shape)}; the model has {wanted} for {here}.")
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(text, "tie_word_embeddings", False):
        ends = {id(m) for m in (model.get_input_embeddings(), model.get_output_embeddings())}  # type: ignore[operator]
        tied = [n for n, m in model.named_modules() if id(m) in ends]
        hit = [
            k for k in adapter.rest if any(k.startswith((f"{PREFIX}{n}.lora_", f"{PREFIX}{n}.weight")) for n in tied)
        ]
        if hit:
            raise KTError(
                f"{adapter.source}: {hit[0]} is of an embedding that this model shares between input and output; a "
                f"merged checkpoint would change both. {_MERGE_THERE}"
            )


class _Source:
    """The tensors of the input as the output has them: FP8 as bf16."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.fp8 = checkpoint, set(checkpoint.fp8_keys())

    def output(self, key: str, change: Callable[[Tensor, int], Tensor] | None, kind: str, count: int) -> _Tensor:
        """A tensor, with `change(matrix, e)` applied to it, or to each of the E matrices that it stacks."""
        checkpoint, shape = self.checkpoint, self.checkpoint.shapes[key]
        tensor = checkpoint.tensor(key)
        dtype, width = ("BF16", 2) if key in self.fp8 else (checkpoint.dtype(key), tensor.element_size())

        def pieces() -> Iterator[Tensor]:
            whole = checkpoint.dequantise(key) if key in self.fp8 else tensor
            if change is None:
                yield whole
                return
            for e, matrix in enumerate(whole if kind == "experts" and whole.dim() == 3 else [whole]):
                yield _finite(key, change(matrix, e).to(whole.dtype))

        return _Tensor(dtype, shape, math.prod(shape) * width, pieces, kind, count)


def _finite(key: str, merged: Tensor) -> Tensor:
    if not merged.isfinite().all():
        raise KTError(f"{key}: merging gives NaN or infinity. Is the adapter broken?")
    return merged


def _plan(source: _Source, names: CheckpointNames, adapter: Adapter, model: Any) -> dict[str, _Tensor]:
    """Every tensor of the output, with whatever is merged into it. Only headers and the adapter are read."""
    checkpoint = source.checkpoint
    loras = {n: Lora(e.tensors, e.scaling) for n, e in adapter.experts.items()}
    checkpoint.experts({n: _sizes(lora) for n, lora in loras.items()}, names)  # all there, once, of the right shape
    parameters = dict(model.named_parameters())
    changes = _module_changes(adapter)
    tensors = {}
    done: set[str] = set()
    for key, shape in checkpoint.shapes.items():
        if key.endswith(_SCALE) and key.removesuffix(_SCALE) in source.fp8:
            continue
        place = names.place(key)
        name = None if place else names.parameter(key, parameters)
        if place is not None and place.layer in loras:
            tensors[key] = source.output(key, *_expert_change(shape, place, loras[place.layer]))
        elif name in changes:
            if shape != parameters[name].shape:
                raise KTError(f"{checkpoint.path}: {key} is {shape}; the model has {tuple(parameters[name].shape)}.")
            done.add(name)
            kind = next((kind for part, kind in _KINDS if part in name), "elsewhere")
            tensors[key] = source.output(key, changes[name], kind, 1)
        else:
            tensors[key] = source.output(key, None, "", 0)
    lost = sorted(set(changes) - done)
    if lost:
        raise KTError(
            f"{adapter.source}: {len(lost)} of its modules are no tensors of their own in {checkpoint.path}, e.g. "
            f"{lost[0]}. {_MERGE_THERE}"
        )
    return tensors


def _sizes(lora: Lora) -> tuple[int, int, int]:
    e, i, _ = lora.tensors["gate_proj.lora_B"].shape
    return e, i, lora.tensors["down_proj.lora_B"].shape[1]


def _expert_change(
    shape: tuple[int, ...], place: ExpertKey, lora: Lora
) -> tuple[Callable[[Tensor, int], Tensor], str, int]:
    """What is added to one expert's matrix, or to each of a tensor that stacks them."""
    e, i, h = _sizes(lora)
    projections = PROJECTIONS[:2] if place.projection == "gate_up_proj" else (place.projection,)
    expected = {"gate_up_proj": (e, 2 * i, h), "down_proj": (e, h, i)}.get(place.projection)
    turned = place.expert is None and (shape != expected if place.transposed is None else place.transposed)

    def change(matrix: Tensor, n: int) -> Tensor:
        n = n if place.expert is None else place.expert
        delta = torch.cat([lora.delta(p, n) for p in projections])  # [out, in]
        return matrix.float() + (delta.T if turned else delta)

    return change, "experts", (e if place.expert is None else 1) * len(projections)


def _module_changes(adapter: Adapter) -> dict[str, Callable[[Tensor, int], Tensor]]:
    """By parameter name: what makes the merged tensor of the model's."""
    changes = {
        _parameter(k): _replacing(tensor)
        for k, tensor in adapter.rest.items()
        if ".lora_" not in k and _REPLACED not in k
    }
    for name, module in adapter.modules.items():
        embedding = f"{PREFIX}{name}.lora_embedding_A" in adapter.rest
        sides = (f"{PREFIX}{name}.lora_{f'embedding_{s}' if embedding else f'{s}.weight'}" for s in "AB")
        a, b = (adapter.rest[side] for side in sides)
        by, saved = scale(adapter.config, module.rank, module.alpha), changes.get(f"{name}.weight")
        changes[f"{name}.weight"] = _adding(a, b, by, embedding, saved)
    return changes


def _parameter(key: str) -> str:
    """Of a tensor that an adapter has whole: `modules_to_save`, or an embedding that peft saves beside its LoRA."""
    return key.removeprefix(PREFIX).replace(".base_layer.", ".")


def _adding(
    a: Tensor, b: Tensor, scaling: float, turned: bool, first: Callable[[Tensor, int], Tensor] | None
) -> Callable[[Tensor, int], Tensor]:
    def change(matrix: Tensor, e: int) -> Tensor:
        base = first(matrix, e) if first else matrix
        delta = (b.float() @ a.float()).mul_(scaling)
        return base.float() + (delta.T if turned else delta)

    return change


def _replacing(tensor: Tensor) -> Callable[[Tensor, int], Tensor]:
    return lambda _, __: tensor


def _write_all(
    part: Path, source: Path, checkpoint: Checkpoint, tensors: Mapping[str, _Tensor], config: dict[str, Any]
) -> None:
    size = sum(t.nbytes for t in tensors.values())
    with tqdm(total=size, desc="Merging", unit="B", unit_scale=True) as bar:
        for file, keys in checkpoint.files().items():
            kept = {k: tensors[k] for k in keys if k in tensors}
            _write(part / Path(file).name, kept, checkpoint.metadata(keys[0]) if keys else {}, bar.update)
    for other in source.iterdir():
        weights = other.name.endswith((".index.json", *(f".{s}" for s in _WEIGHT_FILES)))
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
    path: Path, tensors: Mapping[str, _Tensor], metadata: dict[str, str], progress: Callable[[int], Any]
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
