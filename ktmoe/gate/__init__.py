"""May this backend compute? The contract that every backend keeps, and the two checks that stand before the kernel."""

from ktmoe.gate import contract, distance
from ktmoe.gate.choice import Speed, bf16_bytes, contenders, settle, speed
from ktmoe.gate.gate import ensure_verified, probe
from ktmoe.gate.on_device import check_on_device


__all__ = [
    "Speed",
    "bf16_bytes",
    "check_on_device",
    "contenders",
    "contract",
    "distance",
    "ensure_verified",
    "probe",
    "settle",
    "speed",
]
