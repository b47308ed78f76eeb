"""Models of transformers: their routed experts, found, read from disk and replaced."""

from ktmoe.models.attaching import (
    attach,
    check_model,
    detach,
    expert_shapes,
    experts_in,
    moe_layers,
    summary,
    unwrapped_layers,
)
from ktmoe.models.families import find, names_on_disk
from ktmoe.models.loading import forget_fp8, load_model, stream, without_experts
from ktmoe.models.native import native_class, native_config


__all__ = [
    "attach",
    "check_model",
    "detach",
    "expert_shapes",
    "experts_in",
    "find",
    "forget_fp8",
    "load_model",
    "moe_layers",
    "names_on_disk",
    "native_class",
    "native_config",
    "stream",
    "summary",
    "unwrapped_layers",
    "without_experts",
]
