"""What the tensors of a checkpoint are in a model, by transformers' own conversion rules."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ktmoe.types import PROJECTIONS, KTError


# Names on disk of gate, up and down, where transformers 4 has one module per expert under the checkpoint's names.
_SPELLINGS = {
    name: p for names in (PROJECTIONS, ("w1", "w3", "w2")) for p, name in zip(PROJECTIONS, names, strict=True)
}
_ONE_EXPERT = re.compile(r"^(?P<layer>.*)\.(?P<expert>\d+)\.(?P<name>\w+)\.weight$")
_NUMBER = re.compile(r"\.experts\.(\d+)\.")
# What a conversion rule may do to experts: stack one matrix per expert, put gate above up, turn old files round.
_STACKING, _TURNING, _NOTHING = {"MergeModulelist", "Concatenate"}, {"Transpose"}, {"Force16BytesAlignment"}


@dataclass(frozen=True)
class ExpertKey:
    """Where a tensor of a checkpoint belongs.

    Attributes:
        layer: module name of the routed experts.
        projection: gate_proj, up_proj, down_proj, or gate_up_proj for both in one.
        expert: its number, or None for a tensor that holds all of them.
        transposed: whether stacked ones are [E, in, out] instead of [E, out, in]; None where files of this family hold
            either.
    """

    layer: str
    projection: str
    expert: int | None
    transposed: bool | None = False


class CheckpointNames:
    """The rules of one model."""

    def __init__(self, model: nn.Module, layers: Iterable[str], others: Mapping[str, ExpertKey] | None = None) -> None:
        """Reads them from transformers.

        Args:
            model: with or without weights.
            layers: module names of its routed experts.
            others: tensors of theirs that have another name or orientation in the model (`Layer.disk_names`).
        """
        self._layers = set(layers)
        self._others = dict(others or {})
        self._prefix = str(getattr(model, "base_model_prefix", "") or "")
        self._renamings: list[Any] = []
        self._converters: list[Any] = []
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter
        except ImportError:  # transformers 4: names in memory are those on disk
            return
        for rule in get_model_conversion_mapping(model):
            (self._converters if isinstance(rule, WeightConverter) else self._renamings).append(rule)

    def place(self, key: str) -> ExpertKey | None:
        """What the tensor of this name is; None if it is no routed expert's.

        Raises:
            KTError: transformers would compute this family's experts from the file in a way that is not known here.
        """
        name = self._renamed(key)
        if "shared_expert" in name:
            return None
        # transformers too goes back to the name on disk where the renamed one is nothing: 5.5 renames a text model's
        # keys also where it is part of a larger one.
        return self._place(name) or (self._place(key) if name != key else None)

    def layer_of(self, key: str) -> str | None:
        """The routed experts that a tensor is named after, whether or not they have one of that name."""
        for name in (self._renamed(key), key):
            parts = name.split(".")
            for n in range(len(parts) - 1, 0, -1):
                if layer := self._layer(".".join(parts[:n])):
                    return layer
        return None

    def _place(self, name: str) -> ExpertKey | None:
        if other := self._with_prefix(name, self._others):
            return self._others[other]
        if "experts" not in name:
            return None
        for rule in self._converters:
            target, pattern = rule.rename_source_key(name)
            if pattern is not None:
                return self._converted(name, target, rule, pattern)
        one = _ONE_EXPERT.match(name)
        if one and one["name"] in _SPELLINGS and (layer := self._layer(one["layer"])):
            return ExpertKey(layer, _SPELLINGS[one["name"]], int(one["expert"]))
        return self._stacked(name)

    def parameter(self, key: str, among: Container[str]) -> str | None:
        """The parameter that a tensor outside the experts is read into, or None if it is not among those."""
        return self._with_prefix(self._renamed(key), among) or self._with_prefix(key, among)

    def _renamed(self, key: str) -> str:
        for rule in self._renamings:
            key, _ = rule.rename_source_key(key)
        return key

    def _converted(self, key: str, target: str, rule: Any, pattern: str) -> ExpertKey | None:
        stacked = self._stacked(target)
        if stacked is None:
            return None
        done = {type(operation).__name__ for operation in rule.operations} - _NOTHING
        if done <= _TURNING:
            return ExpertKey(stacked.layer, stacked.projection, None, transposed=None)
        number = _NUMBER.search(key)
        if not done <= _STACKING or number is None:
            raise KTError(
                f"{key}: transformers makes {target} of it by {', '.join(sorted(done))}, which is not read while "
                "streaming. Load the model with transformers and give it to ktmoe.attach."
            )
        part = list(rule.source_patterns).index(pattern)
        projection = PROJECTIONS[part] if stacked.projection == "gate_up_proj" else "down_proj"
        return ExpertKey(stacked.layer, projection, int(number[1]))

    def _stacked(self, name: str) -> ExpertKey | None:
        prefix, _, projection = name.rpartition(".")
        layer = self._layer(prefix)
        return ExpertKey(layer, projection, None) if layer and projection in ("gate_up_proj", "down_proj") else None

    def _layer(self, name: str) -> str | None:
        return self._with_prefix(name, self._layers)

    def _with_prefix(self, name: str, among: Container[str]) -> str | None:
        """The name, also where the checkpoint is of the model without its head, or the other way round."""
        candidates = (name, f"{self._prefix}.{name}", name.removeprefix(f"{self._prefix}."))
        return next((c for c in candidates if c in among), None)
