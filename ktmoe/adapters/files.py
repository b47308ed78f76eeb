"""Adapters on disk: what peft reads, and nothing that only ktmoe would understand.

Expert LoRA is six stacked tensors a layer in memory. On disk it is what peft writes for one `nn.Linear` per expert,
`...experts.{e}.gate_proj.lora_A.weight` [r, in], which serving engines read too; for families whose experts peft fuses
without knowing that format, it is peft's format for stacked parameters (`ktmoe.fused_lora`).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftType, load_peft_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ktmoe.adapters.beside import EXPERTS_FILE, folder_of, read_forked
from ktmoe.adapters.config import (
    PREFIX,
    ModuleLora,
    modules_of,
    pattern_value,
    scale,
    target_parameters,
)
from ktmoe.adapters.fused import ExpertLora, Fused, split, unite, unpack
from ktmoe.adapters.layout import CheckpointLayout
from ktmoe.types import PROJECTIONS, KTError, MoEShape


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_EXPERT_KEY = re.compile(r"\.experts\.(\d+|base_layer|lora_)")
DROPOUT = "lora_dropout"  # in the file's metadata, where the configuration must say 0 for peft to read it


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


def read_adapter(
    source: str,
    shapes: Mapping[str, MoEShape],
    layout: CheckpointLayout,
    config: LoraConfig | None = None,
    **hub: Any,
) -> Adapter:
    """Reads an adapter of any format whole; what does not fit the experts is refused here.

    Args:
        source: a directory, or a name on the hub.
        shapes: of the model's routed experts, by module name; their rank is not read.
        layout: how this family's files name experts.
        config: in the place of the one on disk.
        **hub: `subfolder`, `revision` ... as peft takes them.

    Raises:
        KTError: no adapter, not LoRA, damaged, trained numbers that nothing reads, or expert keys that are missing, of
            a wrong shape or of another model.
    """
    hub = {k: v for k, v in hub.items() if v is not None}
    config = copy.deepcopy(config) or read_config(source, **hub)
    if config.peft_type != PeftType.LORA:
        raise KTError(f"{source}: got {config.peft_type}; the routed experts take LoRA adapters only.")
    forked = read_forked(folder_of(source, hub), config, shapes)
    try:
        weights = load_peft_weights(source, device="cpu", **hub)
    except (ValueError, OSError, TypeError, SafetensorError, EOFError) as error:
        raise KTError(f"{source}: no adapter that peft can read ({error}).") from error
    weights = _once({layout.to_module(k): v for k, v in weights.items()}, source)
    shown = {k: tuple(v.shape) for k, v in weights.items()}
    stacks, rest = places(shown, config, shapes, layout, source, promised=not forked)
    if forked and stacks:
        raise KTError(f"{source}: expert LoRA in {WEIGHTS} and in {EXPERTS_FILE}. Move the stale one elsewhere.")
    found = {name: (_projections(place, weights, shapes[name]), shapes[name]) for name, place in stacks.items()}
    if trained := _metadata(source, hub).get(DROPOUT):
        config.lora_dropout = float(trained)
    modules = modules_of({k: shown[k] for k in rest}, config)
    return Adapter(source, config, forked or unite(found), modules, {k: weights[k] for k in rest})


def read_config(source: str, **hub: Any) -> PeftConfig:
    """The configuration of a saved adapter, of whatever kind.

    Raises:
        KTError: there is none that peft can read.
    """
    try:
        return PeftConfig.from_pretrained(source, **{k: v for k, v in hub.items() if v is not None})
    except (ValueError, OSError, TypeError, KeyError) as error:
        raise KTError(f"{source}: no adapter that peft can read ({error}).") from error


def has_experts(keys: Collection[str]) -> bool:
    """Whether some of an adapter's keys are routed experts'."""
    return any(_EXPERT_KEY.search(key) for key in keys)


def _once(weights: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Without the second copy that peft writes of a module trained whole whose vocabulary was resized."""
    for key in [k for k in weights if ".modules_to_save." in k]:
        plain = key.replace(".modules_to_save.", ".")
        copied = weights.pop(key)
        if not torch.equal(weights.setdefault(plain, copied), copied):
            raise KTError(f"{source}: {plain} and {key} differ, and only one can be right. Save the adapter again.")
    return weights


@dataclass(frozen=True)
class Place:
    """The keys of one layer's expert LoRA in a file.

    Attributes:
        keys: per-expert: (projection, side, expert) -> key; fused: (parameter, side, None) -> key.
        scaling: per projection or parameter.
        swapped: the fused tensors of peft before 0.19.
    """

    keys: dict[tuple[str, str, int | None], str]
    scaling: dict[str, float]
    swapped: bool = False


def places(
    found: Mapping[str, tuple[int, ...]],
    config: LoraConfig,
    shapes: Mapping[str, MoEShape],
    layout: CheckpointLayout,
    source: str,
    promised: bool = True,
) -> tuple[dict[str, Place], list[str]]:
    """Where each layer's expert LoRA is in a file, and the other keys. From names and shapes alone.

    `promised`: expert LoRA that the configuration names has to be in this file.

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
    found_places = {}
    for layer, keys in of.items():
        make = _fused_place if all(re.fullmatch(r"(base_layer\.)?lora_[AB]\.weight", k) for k in keys) else _per_place
        expected, found_places[layer] = make(layer, keys, found, config, shapes[layer], layout)
        for tail, size in expected.items():
            key = f"{PREFIX}{layer}.{tail}"
            if tail not in keys:
                missing.append(key)
            elif found[key] != size:
                wrong.append(f"{key} is {found[key]}, expected {size}")
        left += [key for tail, key in keys.items() if tail not in expected]
    if promised and not of and _names_experts(config):
        missing = [f"{PREFIX}{layer}.*" for layer in shapes]
    if missing or wrong or left:
        shown = [f"{len(b)} {what}, e.g. {b[0]}" for b, what in
                 ((missing, "missing"), (wrong, "of a wrong shape"), (left, "not expected")) if b]  # fmt: skip
        raise KTError(f"{source}: expert LoRA does not fit this model: {'; '.join(shown)}.")
    return found_places, rest


def _names_experts(config: LoraConfig) -> bool:
    """Whether a configuration, as peft writes it before `write_experts`, promises expert LoRA."""
    targets = config.target_modules
    return not isinstance(targets, str) and any(t.rpartition(".")[2] == "experts" for t in targets or ())


def _per_place(
    layer: str, keys: Mapping[str, str], found: Any, config: LoraConfig, shape: MoEShape, layout: CheckpointLayout
) -> tuple[dict[str, tuple[int, ...]], Place]:
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
    return expected, Place(place, dict.fromkeys(PROJECTIONS, scale(config, rank, alpha)))


def _fused_place(
    layer: str, keys: Mapping[str, str], found: Any, config: LoraConfig, shape: MoEShape, layout: CheckpointLayout
) -> tuple[dict[str, tuple[int, ...]], Place]:
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
    return expected, Place(place, scaling, swapped)


def _projections(place: Place, weights: Mapping[str, Tensor], shape: MoEShape) -> dict[str, Fused]:
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


def _metadata(source: str, hub: Mapping[str, Any]) -> dict[str, str]:
    """Of a local file; peft keeps none of its own there."""
    path = Path(source, hub.get("subfolder") or "", WEIGHTS)
    if not path.is_file():
        return {}
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})
