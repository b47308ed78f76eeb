"""How many processes a launcher has started for this run: one, so far."""

from __future__ import annotations

import os

import torch

from ktmoe.types import KTError


def check_one_process() -> None:
    """Refuses to be one of several: each would hold all experts and run them on all cores.

    Raises:
        KTError: before anything is loaded; says how to start.
    """
    given = os.environ.get("WORLD_SIZE", "1")
    size = int(given) if given.isdigit() else 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        size = max(size, torch.distributed.get_world_size())
    if size > 1:
        raise KTError(
            f"WORLD_SIZE: got {size} processes; the routed experts run in one process so far, which uses every core "
            "and one GPU if there is one. Start with plain python, torchrun --nproc_per_node 1, or accelerate launch "
            "--num_processes 1."
        )
