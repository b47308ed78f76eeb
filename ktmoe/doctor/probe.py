"""What only imports tell: the kernel of this CPU, and a GPU. In a process of its own, beside the other checks.

It takes the second or two that importing torch takes, and a variant of the kernel for another CPU ends it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

from ktmoe.doctor.finding import Finding, Status
from ktmoe.doctor.software import installed
from ktmoe.tested import VERSIONS


_PATIENCE = 60  # seconds
_SOURCE = """
import json, torch
from ktmoe.backends import TABLE, kt
gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print(json.dumps({
    "kernels": [name for name, row in TABLE.items() if row.is_kernel and not row.refuse_host()],
    "variant": kt.variant(), "cuda": torch.version.cuda,
    "gpus": [f"{g.name}, {g.total_memory / 2**30:.0f} GiB" for g in gpus],
}))
"""
_VARIANT = "KT_KERNEL_CPU_VARIANT"


class Probe:
    """Starts at once; `findings` waits for it."""

    def __init__(self) -> None:
        """Starts the process."""
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _SOURCE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def findings(self) -> list[Finding]:
        """On the kernel and the GPU."""
        try:
            out, err = self._process.communicate(timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            out, err = "", f"no answer within {_PATIENCE} s"
        if self._process.returncode != 0:
            why = (err.strip().splitlines() or [f"exit code {self._process.returncode}"])[-1]
            remedy = f"pip install --force-reinstall torch=={VERSIONS['torch']}"
            return [Finding("import", f"torch and ktmoe cannot be imported: {why}", Status.PROBLEM, remedy)]
        told = json.loads(out.strip().splitlines()[-1])
        return [kernel(told["kernels"], told["variant"]), gpu(told["gpus"], told["cuda"])]


def kernel(available: list[str], variant: str) -> Finding:
    """The kernel's finding, from what the process has said: the backends that this CPU can run, and its variant."""
    found, tested, forced = installed("kt-kernel"), VERSIONS["kt-kernel"], os.environ.get(_VARIANT)
    if not found:
        remedy = f"pip install --no-deps kt-kernel=={tested}"
        return Finding("kernel", "kt-kernel is missing: the torch backend runs the experts", Status.NOTE, remedy)
    if forced:
        what = f"kt-kernel {found}, {variant}" + ("" if available else "; the torch backend runs the experts")
        return Finding("kernel", f"{what} ({_VARIANT} is {forced})", Status.NOTE, f"unset {_VARIANT}")
    if not available:
        return Finding("kernel", f"{variant}; the torch backend runs the experts", Status.NOTE)
    if found != tested:
        what = f"kt-kernel {found}, variant {variant}: not the tested version"
        return Finding("kernel", what, Status.NOTE, f"pip install --no-deps kt-kernel=={tested}")
    return Finding("kernel", f"kt-kernel {found}, variant {variant}: {', '.join(available)}")


def gpu(names: list[str], cuda: str | None) -> Finding:
    """The GPU's finding, from what the process has said."""
    if names:
        return Finding("GPU", "; ".join(names))
    what = "none: attention and everything else run on the CPU too"
    return Finding("GPU", f"{what} (torch for CUDA {cuda})" if cuda else what, Status.NOTE)
