"""What a launcher has started, as far as its environment and torch say."""

from __future__ import annotations

import os

import torch.distributed as dist

from ktmoe.errors import KTError


_SHARDING = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}


def number() -> int:
    """The number of processes that train together."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    given = os.environ.get("WORLD_SIZE", "1")
    return int(given) if given.isdigit() else 1


def on_this_host() -> int:
    """How many of them the launcher has started here."""
    given = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return int(given) if given.isdigit() else 1


def check_sharding() -> None:
    """Refuses ways to divide a model over processes that are not built.

    Raises:
        KTError: names the variable.
    """
    for name, what in _SHARDING.items():
        if os.environ.get(name, "0").lower() in ("true", "y", "1"):
            raise KTError(
                f"{name}: got {os.environ[name]}; the routed experts do not run under {what} yet, but under DDP: "
                f"the Trainer's own way where there are several processes. Unset {name}."
            )


def check_launch() -> None:
    """Refuses what several processes cannot do, before anything is loaded.

    Raises:
        KTError: names the variable.
    """
    check_sharding()
    if number() > 1 and not (dist.is_available() and dist.is_initialized()):
        raise KTError(
            f"WORLD_SIZE: got {number()} processes that do not know of each other yet. Make the TrainingArguments or "
            "the Accelerator, or call torch.distributed.init_process_group, before the model is loaded."
        )
