"""Adapters: LoRA of routed experts in peft, in memory and on disk."""

from ktmoe.adapters.config import PREFIX, scale
from ktmoe.adapters.files import Adapter, read_adapter
from ktmoe.adapters.layer import LoraExperts
from ktmoe.adapters.layout import checkpoint_layout
from ktmoe.adapters.model import get_peft_model, load_adapter
from ktmoe.adapters.targets import EXPERTS_TARGET, check_lora_config, routers


__all__ = [
    "EXPERTS_TARGET",
    "PREFIX",
    "Adapter",
    "LoraExperts",
    "check_lora_config",
    "checkpoint_layout",
    "get_peft_model",
    "load_adapter",
    "read_adapter",
    "routers",
    "scale",
]
