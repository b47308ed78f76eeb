"""What the verification ran on: CPU, memory, versions, and which kernel."""

from __future__ import annotations

import importlib.util
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from ktmoe.backends import kt
from ktmoe.cores import numa_nodes, usable_cores


_PACKAGES = ("ktmoe", "kt-kernel", "torch", "transformers", "peft", "accelerate", "llamafactory", "trl", "numpy")
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8")


def describe() -> dict[str, str]:
    """Names and values for people; nothing that tells whose machine it is."""
    cpu, flags = platform.processor() or platform.machine(), set[str]()
    if Path("/proc/cpuinfo").exists():
        lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
        fields = {name.strip(): value.strip() for name, _, value in lines}
        cpu, flags = fields.get("model name", cpu), set(fields.get("flags", "").split())
    found = {
        "CPU": cpu,
        "instruction sets": ", ".join(f for f in _FLAGS if f in flags) or "unknown",
        "cores": f"{psutil.cpu_count(logical=False)} physical, {usable_cores()} usable by this process",
        "NUMA nodes": str(len(numa_nodes())),
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "kernel": kt.variant() if kt.available() else f"none: {kt.variant()}",
    }
    return found | {package: _version(package) for package in _PACKAGES}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        module = package.replace("-", "_")
        return "run from its sources" if importlib.util.find_spec(module) else "not installed"
