"""How a family's checkpoints name the routed experts, read from transformers' own conversion table."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

from ktmoe.types import PROJECTIONS


@dataclass(frozen=True)
class CheckpointLayout:
    """Names on disk against names in memory.

    Attributes:
        projections: our projection -> the family's, e.g. gate_proj -> w1.
        renames: (on disk, in memory) parts of a key, e.g. (".block_sparse_moe.", ".mlp.").
        peft_reads: whether the installed peft puts per-expert LoRA onto this family's experts.
    """

    projections: dict[str, str] = field(default_factory=lambda: {p: p for p in PROJECTIONS})
    renames: tuple[tuple[str, str], ...] = ()
    peft_reads: bool = False

    def to_disk(self, key: str) -> str:
        """A key under an experts module, as the family's checkpoints write it."""
        for disk, memory in self.renames:
            key = key.replace(memory, disk)
        return key

    def to_module(self, key: str) -> str:
        """The same key, in any adapter file, as this model's modules are named."""
        for disk, memory in self.renames:
            key = key.replace(disk, memory)
        return key


@functools.cache
def checkpoint_layout(model_type: str | None) -> CheckpointLayout:
    """The layout of one transformers model type; gate_proj, up_proj, down_proj where no table knows it."""
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:  # transformers 4 keeps one nn.Linear per expert under the checkpoint's own names
        return CheckpointLayout()
    projections = {p: p for p in PROJECTIONS}
    renames = []
    for entry in get_checkpoint_conversion_mapping(model_type) or ():
        target = entry.target_patterns[0]
        sources = [s.removesuffix(".weight").rsplit(".", 1)[-1] for s in entry.source_patterns]
        if isinstance(entry, WeightConverter) and target.endswith("experts.gate_up_proj") and len(sources) == 2:
            projections["gate_proj"], projections["up_proj"] = sources
        elif isinstance(entry, WeightConverter) and target.endswith("experts.down_proj") and len(sources) == 1:
            projections["down_proj"] = sources[0]
        elif len(entry.source_patterns) == 1 and entry.source_patterns[0] == ".block_sparse_moe.":
            renames.append((entry.source_patterns[0], target))
    return CheckpointLayout(projections, tuple(renames), _peft_reads(model_type))


def _peft_reads(model_type: str | None) -> bool:
    """Whether peft's own table has this family: it leaves the others' experts alone without a word."""
    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:  # peft before 0.19 knows one nn.Linear per expert only: transformers 5 has none
        return False
    base = getattr(conversion, "_MODEL_TO_CONVERSION_PATTERN", {}).get(model_type)
    return base in getattr(conversion, "_MOE_TARGET_MODULE_MAPPING", {})
