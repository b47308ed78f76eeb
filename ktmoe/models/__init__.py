"""Models of transformers: their routed experts, found, read from disk and replaced."""

from ktmoe.models.arguments import model_configuration
from ktmoe.models.attaching import (
    attach,
    check_model,
    detach,
    expert_shapes,
    experts_in,
    moe_layers,
    skeleton,
    summary,
    unwrapped_layers,
)
from ktmoe.models.families import find, names_on_disk
from ktmoe.models.loading import check_headers, forget_fp8, load_model, stream, without_experts
from ktmoe.models.native import native_class, native_config


__all__ = [
    "attach",
    "check_headers",
    "check_model",
    "detach",
    "expert_shapes",
    "experts_in",
    "find",
    "forget_fp8",
    "load_model",
    "model_configuration",
    "moe_layers",
    "names_on_disk",
    "native_class",
    "native_config",
    "skeleton",
    "stream",
    "summary",
    "unwrapped_layers",
    "without_experts",
]
