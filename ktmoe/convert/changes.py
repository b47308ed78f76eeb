"""What the tensors of a merged checkpoint are: those of the model, and what an adapter adds to each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ktmoe.adapters import PREFIX, Adapter, scale
from ktmoe.checkpoints import Checkpoint, CheckpointNames, ExpertKey
from ktmoe.types import PROJECTIONS, KTError, Lora


REPLACED = ".original_module."  # in an adapter's keys: what a module that was trained whole was before
_SCALE = "_scale_inv"
_KINDS = (("shared_expert", "shared experts"), ("shared_mlp", "shared experts"), ("attn", "attention"))
MERGE_THERE = "Merge this adapter with stock peft (merge_and_unload)."


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of the output: its dtype as safetensors writes it, its size, and its bytes, piece by piece."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    pieces: Callable[[], Iterator[Tensor]]
    kind: str = ""
    count: int = 0


class Source:
    """The tensors of the input as the output has them: quantised ones as bf16."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.stored = checkpoint, set(checkpoint.stored_keys())

    def output(self, key: str, change: Callable[[Tensor, int], Tensor] | None, kind: str, count: int) -> OutputTensor:
        """A tensor, with `change(matrix, e)` applied to it, or to each of the E matrices that it stacks."""
        checkpoint, shape = self.checkpoint, self.checkpoint.shapes[key]
        tensor = checkpoint.tensor(key)
        dtype, width = ("BF16", 2) if key in self.stored else (checkpoint.dtype(key), tensor.element_size())

        def pieces() -> Iterator[Tensor]:
            whole = checkpoint.dequantise(key) if key in self.stored else tensor
            if change is None:
                yield whole
                return
            for e, matrix in enumerate(whole if kind == "experts" and whole.dim() == 3 else [whole]):
                yield _finite(key, change(matrix, e).to(whole.dtype))

        return OutputTensor(dtype, shape, math.prod(shape) * width, pieces, kind, count)


def _finite(key: str, merged: Tensor) -> Tensor:
    if not merged.isfinite().all():
        raise KTError(f"{key}: merging gives NaN or infinity. Is the adapter broken?")
    return merged


def plan(source: Source, names: CheckpointNames, adapter: Adapter, model: Any) -> dict[str, OutputTensor]:
    """Every tensor of the output, with whatever is merged into it. Only headers and the adapter are read."""
    checkpoint = source.checkpoint
    loras = {n: Lora(e.tensors, e.scaling) for n, e in adapter.experts.items()}
    checkpoint.experts({n: _sizes(lora) for n, lora in loras.items()}, names)  # all there, once, of the right shape
    parameters = dict(model.named_parameters())
    checkpoint.check_numbers(names, parameters)
    changes = _module_changes(adapter)
    tensors = {}
    done: set[str] = set()
    for key, shape in checkpoint.shapes.items():
        if key.endswith(_SCALE) and key.removesuffix(_SCALE) in source.stored:
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
            f"{lost[0]}. {MERGE_THERE}"
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
        parameter_of(k): _replacing(tensor)
        for k, tensor in adapter.rest.items()
        if ".lora_" not in k and REPLACED not in k
    }
    for name, module in adapter.modules.items():
        embedding = f"{PREFIX}{name}.lora_embedding_A" in adapter.rest
        sides = (f"{PREFIX}{name}.lora_{f'embedding_{s}' if embedding else f'{s}.weight'}" for s in "AB")
        a, b = (adapter.rest[side] for side in sides)
        by, saved = scale(adapter.config, module.rank, module.alpha), changes.get(f"{name}.weight")
        changes[f"{name}.weight"] = _adding(a, b, by, embedding, saved)
    return changes


def parameter_of(key: str) -> str:
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
