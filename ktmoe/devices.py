"""The device beside the CPU, if torch has one: which it is, and its free memory."""

from __future__ import annotations

from typing import Any

import torch

from ktmoe import memory


def accelerator() -> torch.device | None:
    """The current one of this process (launchers give each a device of its own), or None."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    api: Any = getattr(torch, "accelerator", None)  # torch 2.6
    found = api.current_accelerator() if api is not None and api.is_available() else None
    # Apple's shares the host's memory: nothing is gained by experts there.
    return None if found is None or found.type == "mps" else torch.device(found.type, api.current_device_index())


def free(device: torch.device) -> int:
    """Bytes of a device that are free; of the CPU, what this process can have without swapping."""
    if device.type == "cpu":
        return memory.available()
    return int(torch.get_device_module(device).mem_get_info(device)[0])
