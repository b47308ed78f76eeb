"""Adapters on disk: what peft reads, and nothing that only ktmoe would understand.

Expert LoRA is six stacked tensors a layer in memory. On disk it is what peft writes for one `nn.Linear` per expert,
`...experts.{e}.gate_proj.lora_A.weight` [r, in], which serving engines read too; for families whose experts peft fuses
without knowing that format, it is peft's format for stacked parameters (`ktmoe.fused_lora`).
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ktmoe_reference import LORA_NAMES
from peft import LoraConfig, PeftConfig, load_peft_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ktmoe.adapters.config import (
    PREFIX,
    ModuleLora,
    modules_of,
    pattern_value,
    readable,
    saved_config,
    scale,
    target_parameters,
)
from ktmoe.adapters.fused import ExpertLora, Fused, fuse, split, unite, unpack
from ktmoe.adapters.layout import PER_EXPERT, CheckpointLayout
from ktmoe.types import PROJECTIONS, KTError, MoEShape


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
HUB = ("subfolder", "revision", "cache_dir", "token", "use_auth_token", "force_download", "local_files_only")
_EXPERT_KEY = re.compile(r"\.experts\.(\d+|base_layer|lora_)")
_DROPOUT = "lora_dropout"  # in the file's metadata, where the configuration must say 0 for peft to read it


@dataclass(frozen=True)
class Adapter:
    """An adapter as its files say it, in the names of the model's modules.

    Attributes:
        source: path or hub name.
        config: as in the file, with the dropout that it was trained with.
        experts: by module name of the routed experts; one rank and one scale for all.
        modules: LoRA elsewhere, by module name.
        rest: every tensor that is no expert's, under peft's keys.
    """

    source: str
    config: LoraConfig
    experts: dict[str, ExpertLora]
    modules: dict[str, ModuleLora]
    rest: dict[str, Tensor]


def read_adapter(source: str, shapes: Mapping[str, MoEShape], layout: CheckpointLayout, **hub: Any) -> Adapter:
    """Reads an adapter of either format whole; what does not fit the experts is refused here.

    Args:
        source: a directory, or a name on the hub.
        shapes: of the model's routed experts, by module name; their rank is not read.
        layout: how this family's files name experts.
        **hub: `subfolder`, `revision` ... as peft takes them.

    Raises:
        KTError: no adapter, not LoRA, damaged, or expert keys that are missing, of a wrong shape or of another model.
    """
    hub = {k: v for k, v in hub.items() if k in HUB and v is not None}
    try:
        config = PeftConfig.from_pretrained(source, **hub)
        weights = load_peft_weights(source, device="cpu", **hub)
    except (ValueError, OSError, TypeError, SafetensorError, EOFError) as error:
        raise KTError(f"{source}: no adapter that peft can read ({error}).") from error
    if not isinstance(config, LoraConfig):
        raise KTError(f"{source}: got {config.peft_type}; the routed experts take LoRA adapters only.")
    weights = {layout.to_module(k): v for k, v in weights.items()}
    places, rest = _places({k: tuple(v.shape) for k, v in weights.items()}, config, shapes, layout, source)
    found = {name: (_projections(place, weights, shapes[name]), shapes[name]) for name, place in places.items()}
    if trained := _metadata(source, hub).get(_DROPOUT):
        config.lora_dropout = float(trained)
    modules = modules_of({k: tuple(weights[k].shape) for k in rest}, config)
    return Adapter(source, config, unite(found), modules, {k: weights[k] for k in rest})


def write_experts(
    folder: Path, experts: Mapping[str, ExpertLora], layout: CheckpointLayout, names: Collection[str]
) -> None:
    """Adds expert LoRA to an adapter that peft has written without it, and makes the configuration say so.

    Both files are replaced as a whole, after what was written has been read back.

    Args:
        folder: of the adapter.
        experts: by module name; empty if the adapter has none.
        layout: how this family's files name experts.
        names: of all modules of the model.

    Raises:
        KTError: what was written is not what was to be written.
    """
    path, config_path = folder / WEIGHTS, folder / CONFIG
    with safe_open(path, "pt") as file:
        rest = {key: file.get_tensor(key) for key in file.keys()}
    config = json.loads(config_path.read_text(encoding="utf-8"))
    dropout = config.get("lora_dropout") or 0.0
    modules = modules_of({k: tuple(v.shape) for k, v in rest.items()}, LoraConfig(**readable(config)))
    remapped = any(m.rpartition(".")[2] in layout.remapped for m in modules)
    if not experts and (layout.unreadable or not remapped):  # peft that fuses nothing remaps nothing either
        return
    config = saved_config(config, experts, modules, layout, names)
    tensors = rest | (_per_expert(experts, layout) if layout.adapter_format == PER_EXPERT else _fused(experts))
    metadata = {"format": "pt"} | ({_DROPOUT: str(dropout)} if dropout and not config["lora_dropout"] else {})
    part, config_part = path.with_suffix(".part"), config_path.with_suffix(".part")
    save_file(tensors, part, metadata=metadata)
    config_part.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    _check_written(part, config_part, tensors, experts, layout)
    os.replace(part, path)
    os.replace(config_part, config_path)


@dataclass(frozen=True)
class _Place:
    """The keys of one layer's expert LoRA in a file.

    Attributes:
        keys: per-expert: (projection, side, expert) -> key; fused: (parameter, side, None) -> key.
        scaling: per projection or parameter.
        swapped: the fused tensors of peft before 0.19.
    """

    keys: dict[tuple[str, str, int | None], str]
    scaling: dict[str, float]
    swapped: bool = False


def _places(
    found: Mapping[str, tuple[int, ...]],
    config: LoraConfig,
    shapes: Mapping[str, MoEShape],
    layout: CheckpointLayout,
    source: str,
) -> tuple[dict[str, _Place], list[str]]:
    """Where each layer's expert LoRA is in a file, and the other keys. From names and shapes alone.

    Raises:
        KTError: keys that are missing, of a wrong shape or of another model.
    """
    of: dict[str, dict[str, str]] = {}
    rest, left = [], []
    for key in found:
        name = key.removeprefix(PREFIX)
        layer = next((n for n in shapes if name.startswith(f"{n}.")), None)
        if layer is not None:
            of.setdefault(layer, {})[name.removeprefix(f"{layer}.")] = key
        elif _EXPERT_KEY.search(key):
            left.append(key)
        else:
            rest.append(key)
    missing: list[str] = []
    wrong: list[str] = []
    places = {}
    for layer, keys in of.items():
        make = _fused_place if all(re.fullmatch(r"(base_layer\.)?lora_[AB]\.weight", k) for k in keys) else _per_place
        expected, places[layer] = make(layer, keys, found, config, shapes[layer], layout)
        for tail, size in expected.items():
            key = f"{PREFIX}{layer}.{tail}"
            if tail not in keys:
                missing.append(key)
            elif found[key] != size:
                wrong.append(f"{key} is {found[key]}, expected {size}")
        left += [key for tail, key in keys.items() if tail not in expected]
    if not of and _names_experts(config):
        missing = [f"{PREFIX}{layer}.*" for layer in shapes]
    if missing or wrong or left:
        shown = [f"{len(b)} {what}, e.g. {b[0]}" for b, what in
                 ((missing, "missing"), (wrong, "of a wrong shape"), (left, "not expected")) if b]  # fmt: skip
        raise KTError(f"{source}: expert LoRA does not fit this model: {'; '.join(shown)}.")
    return places, rest


def _names_experts(config: LoraConfig) -> bool:
    """Whether a configuration, as peft writes it before `write_experts`, promises expert LoRA."""
    targets = config.target_modules
    return not isinstance(targets, str) and any(t.rpartition(".")[2] == "experts" for t in targets or ())


def _per_place(
    layer: str, keys: Mapping[str, str], found: Any, config: LoraConfig, shape: MoEShape, layout: CheckpointLayout
) -> tuple[dict[str, tuple[int, ...]], _Place]:
    first = f"{layer}.0.{layout.projections['gate_proj']}"
    rank = pattern_value(config.rank_pattern, first, config.r)
    alpha = pattern_value(config.alpha_pattern, first, config.lora_alpha)
    expected: dict[str, tuple[int, ...]] = {}
    place: dict[tuple[str, str, int | None], str] = {}
    for name, (e, *size) in shape.lora_shapes(rank).items():
        projection, side = name.split(".")
        for n in range(e):
            tail = f"{n}.{layout.projections[projection]}.{side}.weight"
            expected[tail] = tuple(size)
            place[projection, side, n] = keys.get(tail, "")
    return expected, _Place(place, dict.fromkeys(PROJECTIONS, scale(config, rank, alpha)))


def _fused_place(
    layer: str, keys: Mapping[str, str], found: Any, config: LoraConfig, shape: MoEShape, layout: CheckpointLayout
) -> tuple[dict[str, tuple[int, ...]], _Place]:
    e, h, i = shape.num_experts, shape.hidden_size, shape.intermediate_size
    sizes = {"gate_up_proj": (h, 2 * i), "down_proj": (i, h)}  # in, out
    if any(tail.startswith("base_layer.") for tail in keys):  # the parameter that is wrapped first is inside
        tails = {"gate_up_proj": "base_layer.", "down_proj": ""}
    else:
        named = [p for p in sizes if any(t.rpartition(".")[2] == p for t in target_parameters(config))]
        tails = {named[0] if len(named) == 1 else "gate_up_proj": ""}

    def fits(parameter: str, tail: str, swapped: bool) -> bool:
        inner, outer = sizes[parameter][::-1] if swapped else sizes[parameter]
        a, b = (found.get(keys.get(f"{tail}lora_{s}.weight", ""), (0, 0)) for s in "AB")
        return a[1] == inner and b[0] == outer

    swapped = all(fits(p, t, True) for p, t in tails.items()) and not all(fits(p, t, False) for p, t in tails.items())
    expected: dict[str, tuple[int, ...]] = {}
    place: dict[tuple[str, str, int | None], str] = {}
    scaling = {}
    for parameter, tail in tails.items():
        rank = pattern_value(config.rank_pattern, f"{layer}.{parameter}", config.r)
        alpha = pattern_value(config.alpha_pattern, f"{layer}.{parameter}", config.lora_alpha)
        inner, outer = sizes[parameter][::-1] if swapped else sizes[parameter]
        for side, size in (("lora_A", (e * rank, inner)), ("lora_B", (outer, e * rank))):
            expected[f"{tail}{side}.weight"] = size
            place[parameter, side, None] = keys.get(f"{tail}{side}.weight", "")
        scaling[parameter] = scale(config, rank, alpha)
    return expected, _Place(place, scaling, swapped)


def _projections(place: _Place, weights: Mapping[str, Tensor], shape: MoEShape) -> dict[str, Fused]:
    parts = {}
    for name, scaling in place.scaling.items():
        if (name, "lora_A", None) in place.keys:
            a, b = (weights[place.keys[name, side, None]] for side in ("lora_A", "lora_B"))
            a, b = unpack(a, b, shape.num_experts, place.swapped)
        else:
            a, b = (
                torch.stack([weights[place.keys[name, side, n]] for n in range(shape.num_experts)])
                for side in ("lora_A", "lora_B")
            )
        parts[name] = Fused(a, b, scaling)
    if set(parts) <= {"gate_up_proj", "down_proj"} and set(parts) != set(PROJECTIONS):
        return split(parts.get("gate_up_proj"), parts.get("down_proj"), shape)
    return parts


def _per_expert(experts: Mapping[str, ExpertLora], layout: CheckpointLayout) -> dict[str, Tensor]:
    tensors = {}
    for name, lora in experts.items():
        for key, stack in lora.tensors.items():
            projection, side = key.split(".")
            for e in range(len(stack)):
                where = layout.to_disk(f"{PREFIX}{name}.{e}.{layout.projections[projection]}")
                tensors[f"{where}.{side}.weight"] = stack[e].clone()
    return tensors


def _fused(experts: Mapping[str, ExpertLora]) -> dict[str, Tensor]:
    tensors = {}
    for name, lora in experts.items():
        for parameter, pair in fuse(lora.tensors).items():
            inside = "base_layer." if parameter == "gate_up_proj" else ""
            for side, tensor in zip("AB", pair, strict=True):
                tensors[f"{PREFIX}{name}.{inside}lora_{side}.weight"] = tensor
    return tensors


def _metadata(source: str, hub: Mapping[str, Any]) -> dict[str, str]:
    """Of a local file; peft keeps none of its own there."""
    path = Path(source, hub.get("subfolder") or "", WEIGHTS)
    if not path.is_file():
        return {}
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def _check_written(
    path: Path, config_path: Path, tensors: Mapping[str, Tensor], experts: Mapping[str, ExpertLora], layout: Any
) -> None:
    """Reads back names, shapes and configuration as a reader would, before the files take their place."""
    with safe_open(path, "pt") as file:
        found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    expected = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    odd = sorted(k for k in {*found, *expected} if found.get(k) != expected.get(k))
    if odd:
        raise KTError(
            f"{path}: {len(odd)} tensors are not as they were written, e.g. {odd[0]}: {found.get(odd[0])}, expected "
            f"{expected.get(odd[0])}. Is the disk full? The adapter was not saved."
        )
    config = LoraConfig(**readable(json.loads(config_path.read_text(encoding="utf-8"))))
    shapes = {name: _shape(lora) for name, lora in experts.items()}
    places, _ = _places({layout.to_module(k): v for k, v in found.items()}, config, shapes, layout, str(path))
    lost = sorted(set(experts) - set(places))
    if lost:
        raise KTError(f"{path}: the expert LoRA of {len(lost)} layers is not there, e.g. {lost[0]}. Save it again.")
    for name, place in places.items():
        if any(not math.isclose(s, experts[name].scaling) for s in place.scaling.values()):
            raise KTError(f"{config_path}: expert LoRA is scaled by {place.scaling}, not {experts[name].scaling}.")


def _shape(lora: ExpertLora) -> MoEShape:
    e, _, h = lora.tensors[LORA_NAMES[0]].shape
    return MoEShape(e, h, lora.tensors[LORA_NAMES[1]].shape[1], 1, lora.rank)
