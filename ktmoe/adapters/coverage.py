"""What peft's names and patterns mean to one layer of routed experts.

They are asked as if each expert had one nn.Linear per projection, `...experts.{e}.gate_proj`. Shorter names mean all
that is under them: `...experts`, `...experts.{e}`, `...experts.gate_proj`. One LoRA of one rank covers a whole layer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig
from peft.tuners import tuners_utils

from ktmoe.adapters.config import pattern_value
from ktmoe.experts import checked_scaling
from ktmoe.types import KTError


_EXCLUDED: Any = getattr(tuners_utils, "_ExcludedModule", ())  # peft before 0.14 excludes nothing
_FUSED = ("gate_up_proj", "down_proj")  # parameters of transformers 5's experts


@dataclass(frozen=True)
class ExpertNames:
    """One layer of routed experts, as its modules would be called.

    Attributes:
        name: of the module that holds them all.
        count: E.
        projections: gate, up and down as the family's files call them.
        stacked: whether transformers holds them as stacked parameters.
    """

    name: str
    count: int
    projections: tuple[str, ...]
    stacked: bool

    def each(self) -> Iterable[tuple[int, str, tuple[str, ...]]]:
        """Every projection of every expert, with the names that mean it besides the layer's own."""
        for projection in self.projections:
            for e in range(self.count):
                names = (f"{self.name}.{e}.{projection}", f"{self.name}.{e}", f"{self.name}.{projection}")
                yield e, projection, names


def covers(asked: LoraConfig, layer: ExpertNames, got: str) -> bool:
    """Whether a configuration reaches a layer of routed experts.

    Args:
        asked: with targets that peft's matching takes.
        layer: the experts.
        got: the targets as the user wrote them, for the message.

    Raises:
        KTError: it reaches a part of them.
    """
    check, asked = tuners_utils.check_target_module_exists, _narrowed(asked, layer)
    own = check(asked, layer.name)
    if isinstance(own, _EXCLUDED):
        return False
    reached, excluded = set(), False
    for e, projection, names in layer.each():
        found = [check(asked, name) for name in names]
        if any(isinstance(f, _EXCLUDED) for f in found):
            excluded = True
        elif own or any(found):
            reached.add((e, projection))
    if len(reached) == len(layer.projections) * layer.count:
        return True
    if not reached and (excluded or not check(asked, f"{layer.name}.{_FUSED[0]}")):
        return False
    experts, projections = sorted({e for e, _ in reached}), [p for p in layer.projections if (0, p) in reached]
    if len(experts) < layer.count:
        part = f"{len(experts)} of the {layer.count} experts" if experts else f"{_FUSED[0]}, which is no module here,"
    elif len(reached) == len(projections) * layer.count:
        part = ", ".join(projections)
    else:
        part = "some of their projections"
    raise KTError(
        f"target_modules: got {got}; LoRA on the routed experts covers {', '.join(layer.projections)} together, for "
        f"all experts of a layer; this reaches {part} of {layer.name} alone. Name all three, or 'experts', or none of "
        "them."
    )


def _narrowed(asked: LoraConfig, layer: ExpertNames) -> LoraConfig:
    """The configuration with those of its targets that can mean a part of this layer.

    peft compares each name with each target: 20 s for DeepSeek-V3, whose 'all-linear' are 1,650 names.
    """
    if not isinstance(asked.target_modules, (list, set, tuple)):
        return asked
    names = {layer.name, f"{layer.name}.{_FUSED[0]}", *(name for *_, names in layer.each() for name in names)}
    words = [name.split(".") for name in names]
    meant = {".".join(parts[at:]) for parts in words for at in range(len(parts))}
    found = copy.copy(asked)
    found.target_modules = meant.intersection(asked.target_modules)
    return found


def rank_and_alpha(config: LoraConfig, layer: ExpertNames) -> tuple[int, float]:
    """What r, lora_alpha and their patterns mean to a layer of routed experts.

    Raises:
        KTError: they differ among its experts or projections, or are no rank and no alpha.
    """
    rank = _one(config.rank_pattern, config.r, "rank_pattern", layer)
    alpha = _one(config.alpha_pattern, config.lora_alpha, "alpha_pattern", layer)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise KTError(f"r: got {rank!r} for {layer.name}; expected a whole number of at least 1.")
    checked_scaling(alpha, 1)
    return rank, alpha


def value_of(pattern: Mapping[str, Any] | None, names: Iterable[str], default: Any) -> Any:
    """What peft takes for a module that goes by several names: of the first pattern that matches one."""
    names = tuple(names)
    return next((v for key, v in (pattern or {}).items() if any(_matches(key, n) for n in names)), default)


def check_saved(config: LoraConfig, layer: ExpertNames) -> None:
    """Refuses to train routed experts in full.

    Raises:
        KTError: modules_to_save means them too.
    """
    parts = f"{layer.name}.0".split(".")
    around = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
    for saved in config.modules_to_save or ():
        hit = next(
            (n for n in (*around, *(f"{around[-1]}.{p}" for p in layer.projections)) if n.endswith(saved)), None
        )
        if hit is not None:  # peft compares so
            raise KTError(
                f"modules_to_save: got {saved!r}, which means {hit}, and routed experts' own weights are frozen. Name "
                "modules outside of them, by longer names if need be; experts get LoRA by target_modules."
            )


def check_parameters(targets: Iterable[str], layer: ExpertNames, others: Iterable[str]) -> None:
    """Refuses LoRA of the experts' parameters, which has another form than that of their projections.

    Args:
        targets: target_parameters.
        layer: the experts.
        others: names of the model's parameters outside of routed experts.

    Raises:
        KTError: names the target.
    """
    single = [f"0.{p}.weight" for p in layer.projections]
    real, unreal = (_FUSED, single) if layer.stacked else (single, _FUSED)
    for target in targets:
        means = any(ends(f"{layer.name}.{p}", target) for p in real)
        seems = any(ends(f"{layer.name}.{p}", target) for p in unreal) and not any(ends(n, target) for n in others)
        if means or seems:
            raise KTError(
                f"target_parameters: got {target!r}; the routed experts ({layer.name}) are no parameters here. Write "
                "target_modules: experts."
            )


def ends(name: str, target: str) -> bool:
    """Whether peft takes a target in a list for that name."""
    return name == target or name.endswith(f".{target}")


def _one(pattern: Mapping[str, Any] | None, default: Any, option: str, layer: ExpertNames) -> Any:
    if not pattern:
        return default
    found: dict[Any, str] = {}
    for e, projection, names in layer.each():
        found.setdefault(value_of(pattern, (layer.name, *names), default), f"{e}.{projection}")
    fused = [k for k in pattern if any(_matches(k, f"{layer.name}.{p}") for p in _FUSED)]
    known = [n for _, _, names in layer.each() for n in (layer.name, *names)] if fused else ()
    unknown = next((k for k in fused if not any(_matches(k, n) for n in known)), None)
    if len(found) == 1 and unknown is None:
        return next(iter(found))
    differing = ", ".join(f"{value} for {where}" for value, where in found.items()) if unknown is None else unknown
    raise KTError(
        f"{option}: got {dict(pattern)}; the experts of a layer and their projections share one value, but this "
        f"differs in {layer.name}: {differing}. Write it for 'experts', or for modules outside of them."
    )


def _matches(pattern: str, name: str) -> bool:
    return bool(pattern_value({pattern: True}, name, False))
