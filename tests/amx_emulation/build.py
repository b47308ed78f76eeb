"""Builds the emulation of AMX with the system's compiler, and gives the environment that loads it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path


_HERE = Path(__file__).parent
_FLAGS = ("-O2", "-Wall", "-Wextra", "-Werror")


def missing() -> str:
    """Why nothing can be built here, or ""."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return f"AMX is emulated on Linux on x86-64 only, this is {platform.system()} on {platform.machine()}"
    if "avx512_bf16" not in cpu_flags():
        return "kt_kernel's AMX binary needs AVX512-BF16 beside AMX, and only AMX is emulated"
    return "" if shutil.which("cc") else "no C compiler (cc) to build the emulation of AMX with"


def cpu_flags() -> set[str]:
    """What Linux says the CPU has; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def library(directory: Path) -> Path | None:
    """Builds the library to preload; None where it cannot be built (`missing` says why)."""
    return _compile(directory / "libamx_emulation.so", "amx_emulation.c", "-shared", "-fPIC", "-fvisibility=hidden")


def checker(directory: Path) -> Path | None:
    """Builds the program that holds single instructions to plain C arithmetic; None as for `library`."""
    return _compile(directory / "check_instructions", "check_instructions.c", "-pthread")


def environment(lib: Path) -> dict[str, str]:
    """What a process must find in its environment to run kt_kernel's AMX binary on the emulation."""
    preload = " ".join(filter(None, (str(lib), os.environ.get("LD_PRELOAD"))))
    return {"LD_PRELOAD": preload, "KT_KERNEL_CPU_VARIANT": "amx"}


def _compile(target: Path, source: str, *flags: str) -> Path | None:
    if missing():
        return None
    subprocess.run(["cc", *_FLAGS, *flags, str(_HERE / source), "-o", str(target), "-ldl", "-lm"], check=True)
    return target
