"""Adapters: LoRA of routed experts in peft, in memory and on disk."""

from ktmoe.adapters.beside import EXPERTS_FILE
from ktmoe.adapters.config import PREFIX, scale
from ktmoe.adapters.files import Adapter, read_adapter
from ktmoe.adapters.guard import our_own, refuse_expert_adapter, unwatch, watch
from ktmoe.adapters.layer import LoraExperts
from ktmoe.adapters.layout import checkpoint_layout
from ktmoe.adapters.model import get_peft_model, load_adapter
from ktmoe.adapters.rollback import all_or_nothing
from ktmoe.adapters.targets import EXPERTS_TARGET, check_lora_config, reach, routers


__all__ = [
    "EXPERTS_FILE",
    "EXPERTS_TARGET",
    "PREFIX",
    "Adapter",
    "LoraExperts",
    "all_or_nothing",
    "check_lora_config",
    "checkpoint_layout",
    "get_peft_model",
    "load_adapter",
    "our_own",
    "reach",
    "read_adapter",
    "refuse_expert_adapter",
    "routers",
    "scale",
    "unwatch",
    "watch",
]
