"""Some experts of every layer on the device beside the CPU, the others on the CPU, as one backend."""

from ktmoe.split.backend import SplitBackend, split
from ktmoe.split.choice import check_device, device_bytes, left_on_cpu, on_device


__all__ = ["SplitBackend", "check_device", "device_bytes", "left_on_cpu", "on_device", "split"]
