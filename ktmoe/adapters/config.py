"""`adapter_config.json`: what it says of each module, and how it is written so that stock peft reads the file."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig

from ktmoe.adapters.fused import ExpertLora
from ktmoe.adapters.layout import PER_EXPERT, CheckpointLayout


PREFIX = "base_model.model."


@dataclass(frozen=True)
class ModuleLora:
    """LoRA of one module outside of the routed experts.

    Attributes:
        rank: r.
        alpha: lora_alpha.
        parameter: whether the file has it as LoRA of the parameter `weight` (`target_parameters`).
    """

    rank: int
    alpha: float
    parameter: bool


def target_parameters(config: LoraConfig) -> list[str]:
    """Parameters that have LoRA; peft before 0.17 has no word for it."""
    return list(getattr(config, "target_parameters", None) or ())


def scale(config: LoraConfig, rank: int, alpha: float) -> float:
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def short_names(modules: Iterable[str], names: Collection[str]) -> set[str]:
    """The modules by their last name where that names no other, else by their own: targets for peft."""
    modules = set(modules)
    found = set()
    for leaf in {m.rpartition(".")[2] for m in modules}:
        these = {m for m in modules if m.rpartition(".")[2] == leaf}
        found |= {leaf} if {n for n in names if n.rpartition(".")[2] == leaf} <= these else these
    return found


def patterns(values: Mapping[str, float], default: float, taken: Collection[str] = ()) -> dict[str, Any]:
    """`rank_pattern` or `alpha_pattern`: modules whose value is not the default, by last name where that will do.

    Args:
        values: by module name.
        default: of modules that no pattern matches.
        taken: last names that other modules have too.
    """
    found = {}
    for name, value in values.items():
        leaf = name.rpartition(".")[2]
        same = [v for n, v in values.items() if n.rpartition(".")[2] == leaf]
        if value != default:
            short = same.count(value) == len(same) and leaf not in taken
            found[re.escape(leaf if short else name)] = value
    return found


def pattern_value(found: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """What peft takes for a module: the first pattern that its name ends with, else the default."""
    return next((v for p, v in (found or {}).items() if re.match(rf"(.*\.)?({p})$", name)), default)


def modules_of(found: Mapping[str, tuple[int, ...]], config: LoraConfig) -> dict[str, ModuleLora]:
    """LoRA outside of the experts, from keys and shapes."""
    modules = {}
    for key, shape in found.items():
        name, lora, side = key.removeprefix(PREFIX).partition(".lora_")
        if lora and side in ("A.weight", "embedding_A"):
            weight = f"{name}.weight"
            parameter = any(weight == t or weight.endswith(f".{t}") for t in target_parameters(config))
            alpha = pattern_value(config.alpha_pattern, weight if parameter else name, config.lora_alpha)
            modules[name] = ModuleLora(shape[0], alpha, parameter)
    return modules


def readable(config: Mapping[str, Any]) -> dict[str, Any]:
    """What `modules_of` reads of a saved configuration; older peft has not all of it."""
    known = ("r", "lora_alpha", "alpha_pattern", "rank_pattern", "target_parameters")
    return {k: config[k] for k in known if config.get(k) is not None}


def saved_config(
    config: Mapping[str, Any],
    experts: Mapping[str, ExpertLora],
    modules: Mapping[str, ModuleLora],
    layout: CheckpointLayout,
    names: Collection[str],
) -> dict[str, Any]:
    """The configuration by which stock peft reads the file exactly.

    Its r and lora_alpha are the experts', since peft derives those of fused parameters from them; what has others is
    in the patterns. rsLoRA is written as plain LoRA of the same scale: fused ranks would have another one.
    """
    saved = dict(copy.deepcopy(config))
    rslora = bool(saved.get("use_rslora"))
    alphas = {n: m.alpha * math.sqrt(m.rank) if rslora else m.alpha for n, m in modules.items()}
    ranks: dict[str, float] = {n: m.rank for n, m in modules.items()}
    if rslora:
        saved["use_rslora"] = False
    if experts:
        one = next(iter(experts.values()))
        saved["r"], saved["lora_alpha"] = one.rank, _number(one.scaling * one.rank)
    elif rslora:
        saved["lora_alpha"] = _number(saved["lora_alpha"] * math.sqrt(saved["r"]))
    as_parameter = {n for n, m in modules.items() if m.parameter or n.rpartition(".")[2] in layout.remapped}
    targets = short_names(set(modules) - as_parameter, names)
    parameters = set()
    for leaf in {n.rpartition(".")[2] for n in as_parameter}:
        these = {n for n in as_parameter if n.rpartition(".")[2] == leaf}
        parents = {".".join(n.split(".")[-2:]) for n in these}
        others = {n for n in names if ".".join(n.split(".")[-2:]) in parents} - these
        parameters |= {f"{n}.weight" for n in (these if others else parents)}
    if experts and layout.adapter_format == PER_EXPERT:
        named = set(layout.projections.values())  # on disk they name shared experts and dense MLPs as well
        targets = {t for t in targets if t.rpartition(".")[2] not in named} | named
    elif experts:
        parameters |= {f"{n}.{p}" for n in short_names(experts, names) for p in ("gate_up_proj", "down_proj")}
    keys = {f"{n}.weight" if n in as_parameter else n: n for n in modules}
    taken = {*layout.projections.values(), "down_proj"} if experts else set()
    rank_pattern = patterns({key: ranks[n] for key, n in keys.items()}, saved["r"], taken)
    alpha_pattern = patterns({key: alphas[n] for key, n in keys.items()}, saved["lora_alpha"], taken)
    of_experts = {n: (e.rank, _number(e.scaling * e.rank)) for n, e in experts.items()}
    alike = len({*of_experts.values()}) == 1
    if alike and layout.adapter_format != PER_EXPERT:
        rank_pattern[r"experts\.gate_up_proj"] = 2 * saved["r"]
        alpha_pattern[r"experts\.gate_up_proj"] = 2 * saved["lora_alpha"]
    for name, (rank, alpha) in of_experts.items() if not alike else ():
        for key, times in _patterns_of_layer(name, layout):
            rank_pattern[key], alpha_pattern[key] = times * rank, times * alpha
    saved["target_modules"], saved["rank_pattern"] = sorted(targets), rank_pattern
    saved["alpha_pattern"] = {k: _number(v) for k, v in alpha_pattern.items()}
    if parameters:
        saved["target_parameters"] = sorted(parameters)
    if parameters or (experts and layout.stacked):
        saved["lora_dropout"] = 0.0  # peft has none on parameters, and refuses to load another value
    for narrowed in ("layers_to_transform", "layers_pattern", "exclude_modules"):  # the targets are exact
        if narrowed in saved:
            saved[narrowed] = None
    return saved


def _patterns_of_layer(name: str, layout: CheckpointLayout) -> list[tuple[str, int]]:
    """Patterns that reach one layer of routed experts in every form that it has to readers, and their factors."""
    anywhere = re.escape(name)
    for _, memory in layout.renames:
        anywhere = anywhere.replace(re.escape(memory), r"\.\w+\.")
    return [(rf"{anywhere}\.\d+\.\w+", 1), (rf"{anywhere}\.gate_up_proj", 2), (rf"{anywhere}\.down_proj", 1)]


def _number(value: float) -> float:
    return int(value) if value == int(value) else value
