"""LoRA fine-tuning of mixture-of-experts models whose experts live in host memory and run on the CPU.

`docs/` explains; `ktmoe train config.yaml` is the short way through LLaMA-Factory.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from ktmoe.adapters import get_peft_model, load_adapter
    from ktmoe.config import KTConfig
    from ktmoe.convert import merge_adapter
    from ktmoe.errors import KernelError, KTError
    from ktmoe.experts import MoEExperts
    from ktmoe.models import attach, detach, load_model
    from ktmoe.stored import BlockFP8, GroupInt4
    from ktmoe.training_log import TrainingLog
    from ktmoe.types import ExpertWeights

__version__ = "0.1.0.dev0"

_HOME = {
    "BlockFP8": "stored",
    "ExpertWeights": "types",
    "GroupInt4": "stored",
    "KTConfig": "config",
    "KTError": "errors",
    "KernelError": "errors",
    "MoEExperts": "experts",
    "TrainingLog": "training_log",
    "attach": "models",
    "detach": "models",
    "get_peft_model": "adapters",
    "load_adapter": "adapters",
    "load_model": "models",
    "merge_adapter": "convert",
}

__all__ = [
    "BlockFP8",
    "ExpertWeights",
    "GroupInt4",
    "KTConfig",
    "KTError",
    "KernelError",
    "MoEExperts",
    "TrainingLog",
    "attach",
    "detach",
    "get_peft_model",
    "load_adapter",
    "load_model",
    "merge_adapter",
]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for: the gate's child process needs no transformers."""
    if name in _HOME:
        return getattr(importlib.import_module(f"ktmoe.{_HOME[name]}"), name)
    raise AttributeError(f"module 'ktmoe' has no attribute {name!r}")
