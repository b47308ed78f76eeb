"""Models of transformers: their routed experts, found, read from disk and replaced."""

from ktmoe.models.arguments import model_configuration
from ktmoe.models.attached import moe_layers, unwrapped_layers
from ktmoe.models.attaching import attach, detach
from ktmoe.models.families import expert_modules, find, names_on_disk
from ktmoe.models.loading import (
    check_headers,
    forget_stored,
    load_model,
    stream,
    without_experts,
)
from ktmoe.models.native import native_class, native_config
from ktmoe.models.rest_in_bits import check_installed, linear_routers, with_skipped
from ktmoe.models.skeleton import check_model, expert_shapes, experts_in, layers_of, make_skeleton
from ktmoe.models.startup import bf16_is_slow, summary


__all__ = [
    "attach",
    "bf16_is_slow",
    "check_headers",
    "check_installed",
    "check_model",
    "detach",
    "expert_modules",
    "expert_shapes",
    "experts_in",
    "find",
    "forget_stored",
    "layers_of",
    "linear_routers",
    "load_model",
    "make_skeleton",
    "model_configuration",
    "moe_layers",
    "names_on_disk",
    "native_class",
    "native_config",
    "stream",
    "summary",
    "unwrapped_layers",
    "with_skipped",
    "without_experts",
]
