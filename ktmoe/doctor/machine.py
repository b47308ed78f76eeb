"""Checks of the machine: CPU, cores, memory, disk. Nothing heavy is imported for them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ktmoe import memory
from ktmoe.cgroups import ROOT, text
from ktmoe.cores import cores, in_words, numa_nodes, quota, usable_cores
from ktmoe.doctor.finding import Finding, Status
from ktmoe.kept import cache_folder


_GIB = 2**30
_LITTLE_MEMORY = 4 * _GIB  # Python with torch and transformers takes one or two of them
_LITTLE_DISK = _GIB


def cpu(root: Path = ROOT) -> Finding:
    """Which instructions the kernel could use."""
    lines = dict(line.split(":", 1) for line in text(root / "proc/cpuinfo").splitlines() if ":" in line)
    facts = {name.strip(): value.strip() for name, value in lines.items()}
    model, flags = facts.get("model name", "unknown CPU"), set(facts.get("flags", "").split())
    if "amx_bf16" in flags:
        return Finding("CPU", f"{model}, with AMX")
    if "avx512_bf16" in flags:
        return Finding("CPU", f"{model}, with AVX512-BF16, without AMX")
    return Finding(
        "CPU",
        f"{model}, with neither AMX nor AVX512-BF16: the torch backend runs the experts",
        Status.NOTE,
        "faster on an Intel Xeon with AMX (Sapphire Rapids or later), or a CPU with AVX512-BF16 (AMD Zen 4 or later)",
    )


def cores_to_use(root: Path = ROOT) -> Finding:
    """Which cores are this process's own."""
    own, limit, nodes = cores(root), quota(root), numa_nodes(root)
    logical = sum(len(core) for core in own)
    usable = usable_cores(root)
    what = f"{usable} usable: {len(own)} physical in the affinity mask ({logical} logical), NUMA {in_words(nodes)}"
    if limit is not None and limit < len(own):
        what += f", a quota of {limit:g} CPUs"
        return Finding("cores", what, Status.NOTE, "more with a larger CPU limit of the container or job")
    return Finding("cores", what)


def threads(root: Path = ROOT) -> Finding:
    """Whether a launcher's setting keeps torch from the cores."""
    given, usable = os.environ.get("OMP_NUM_THREADS"), usable_cores(root)
    if given is None or not given.isdigit() or int(given) == usable:
        return Finding("threads", "OMP_NUM_THREADS is not set" if given is None else f"OMP_NUM_THREADS is {given}")
    effect = "torch leaves cores idle" if int(given) < usable else "torch's threads wait for one another"
    what = f"OMP_NUM_THREADS is {given} for {usable} cores: {effect}"
    return Finding("threads", what, Status.NOTE, f"export OMP_NUM_THREADS={usable}")


def host_memory(root: Path = ROOT) -> Finding:
    """What is free, in the container or job too."""
    free, most = memory.available(root), memory.total(root)
    what = f"{free / _GIB:.1f} of {most / _GIB:.1f} GiB free"
    if free < _LITTLE_MEMORY:
        remedy = "end other programs, or raise the memory limit of the container or job"
        return Finding("memory", f"{what}: too little to load a model", Status.PROBLEM, remedy)
    return Finding("memory", what)


def caches() -> Iterator[Finding]:
    """Whether what is found out here, and what comes from the hub, can be kept."""
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    hub = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")
    yield _folder("ktmoe cache", cache_folder(), "KTMOE_CACHE_DIR", "checks run again in every process")
    yield _folder("hub cache", hub, "HF_HOME", "models cannot be downloaded")


def _folder(name: str, folder: Path, variable: str, without: str) -> Finding:
    there = next(f for f in (folder, *folder.parents) if f.exists())
    shown = str(folder).replace(str(Path.home()), "~", 1)  # it is pasted into issues
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        what = f"{shown} cannot be written to ({error.strerror}): {without}"
        return Finding(name, what, Status.PROBLEM, f"export {variable}=/a/folder/that/is/writable")
    free = shutil.disk_usage(there).free
    what = f"{shown}, {free / _GIB:.1f} GiB free"
    if free < _LITTLE_DISK:
        return Finding(name, what, Status.PROBLEM, f"export {variable}=/a/folder/on/a/larger/disk")
    return Finding(name, what)
