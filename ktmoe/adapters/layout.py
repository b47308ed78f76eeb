"""How a family's files name the routed experts, and which adapter format stock peft reads for it."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import peft
import transformers
from torch.torch_version import TorchVersion

from ktmoe.types import PROJECTIONS


PER_EXPERT, FUSED = "per-expert", "fused"
# transformers 4 has no table of these: the families whose experts are w1, w3, w2.
_W_FAMILIES = ("mixtral", "minimax", "phimoe")
# What peft's table calls the two naming schemes that it fuses on transformers 5.
_MAPPED = ("mixtral", "qwen2_moe")
# Families whose experts were stacked in another form before this release of transformers.
_FUSED_BEFORE = {
    "granitemoe": "5.7",
    "granitemoehybrid": "5.7",
    "granitemoeshared": "5.7",
    "qwen3_vl_moe": "5.0",
    "qwen3_vl_moe_text": "5.0",
}


@dataclass(frozen=True)
class CheckpointLayout:
    """Names on disk against names in memory, for the installed transformers and peft.

    Attributes:
        projections: our projection -> the family's, e.g. gate_proj -> w1.
        renames: (on disk, in memory) parts of a key, e.g. (".block_sparse_moe.", ".mlp.").
        adapter_format: PER_EXPERT, or FUSED for families whose per-expert LoRA peft would ignore without a word.
        stacked: whether transformers holds the experts as stacked parameters (transformers 5).
        unreadable: why the installed peft reads neither format, and what does; "" if it reads them.
    """

    projections: dict[str, str] = field(default_factory=lambda: {p: p for p in PROJECTIONS})
    renames: tuple[tuple[str, str], ...] = ()
    adapter_format: str = PER_EXPERT
    stacked: bool = False
    unreadable: str = ""

    @property
    def remapped(self) -> tuple[str, ...]:
        """Last parts of module names that stock peft takes for the routed experts' or the router's, wherever they are.

        LoRA on other modules of such names is read rightly only if `target_parameters` names their weights.
        """
        return ("gate", *self.projections.values()) if self.stacked and self.adapter_format == PER_EXPERT else ()

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
    projections = {p: p for p in PROJECTIONS}
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:  # transformers 4 keeps one nn.Linear per expert under the checkpoint's own names
        if model_type in _W_FAMILIES:
            projections = dict(zip(PROJECTIONS, ("w1", "w3", "w2"), strict=True))
        return CheckpointLayout(projections, unreadable=_unreadable(model_type))
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
    form = PER_EXPERT if _mapped(model_type) else FUSED
    return CheckpointLayout(projections, tuple(renames), form, True, _unreadable(model_type))


def _mapped(model_type: str | None) -> bool:
    """Whether peft's own table has this family: it leaves the others' per-expert LoRA alone without a word.

    Where the installed peft has no table yet, transformers' own, which peft's is made of, tells what a later one does.
    """
    from transformers import conversion_mapping

    try:
        from peft.utils import transformers_weight_conversion as table
    except ImportError:  # before 0.19
        table = conversion_mapping
    patterns = getattr(table, "_MODEL_TO_CONVERSION_PATTERN", {})
    return model_type == "mixtral" or patterns.get(model_type) in getattr(table, "_MOE_TARGET_MODULE_MAPPING", _MAPPED)


def _unreadable(model_type: str | None) -> str:
    """Why stock peft does not read a family's expert LoRA on the installed releases, and what does."""
    here = f"on transformers {transformers.__version__}"
    release = TorchVersion(transformers.__version__)
    if model_type in _FUSED_BEFORE and release < _FUSED_BEFORE[model_type]:
        return (
            f"stock peft does not read LoRA of this family's routed experts {here}, where they have another form. "
            "Load the adapter with ktmoe.load_adapter, merge it with `ktmoe merge`, or use transformers "
            f"{_FUSED_BEFORE[model_type]} or later with peft 0.20 or later."
        )
    if release < "5" or TorchVersion(peft.__version__) >= "0.20":
        return ""
    return (
        f"peft {peft.__version__} does not read LoRA of routed experts {here}: it fails or ignores them. Load the "
        "adapter with ktmoe.load_adapter, merge it with `ktmoe merge`, or use peft 0.20 or later."
    )
