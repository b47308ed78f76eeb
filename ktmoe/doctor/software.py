"""Checks of what is installed, by the packages' metadata: importing them all would take many seconds."""

from __future__ import annotations

import platform
import sys
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from ktmoe.doctor.finding import Finding, Status
from ktmoe.tested import PAIRS, VERSIONS


_READS_EXPERTS = Version("0.20")  # stock peft that reads adapters of routed experts on transformers 5
# What LLaMA-Factory imports when it trains; its own metadata is not followed (requirements/llamafactory.txt).
_TRAINING = ("trl", "accelerate", "datasets", "omegaconf")


def installed(name: str) -> str:
    """The version of a package without its local part, "" if it is not there."""
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return ""


def python() -> Finding:
    """LLaMA-Factory and the kernel's wheels want newer ones than ktmoe."""
    what = f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    if sys.version_info < (3, 11):
        return Finding("Python", f"{what}: too old for LLaMA-Factory and kt-kernel", Status.NOTE, "use Python 3.11")
    return Finding("Python", what)


def libraries() -> Iterator[Finding]:
    """torch, transformers and peft: each in ktmoe's range, and the last two with one another."""
    ranges = _ranges()
    for name in ("torch", "transformers", "peft"):
        found = installed(name)
        if not found:
            yield Finding(name, "is missing", Status.PROBLEM, f"pip install {name}=={VERSIONS[name]}")
        elif not ranges[name].contains(found, prereleases=True):
            what = f"{found}; ktmoe needs {ranges[name]}"
            yield Finding(name, what, Status.PROBLEM, f"pip install {name}=={VERSIONS[name]}")
        else:
            yield Finding(name, found)
    transformers, peft = installed("transformers"), installed("peft")
    if transformers and peft:
        yield _pair(transformers, peft)


def _ranges() -> dict[str, SpecifierSet]:
    """What ktmoe asks for, by its own metadata; any version where it is run from a folder without being installed."""
    try:
        found = [Requirement(text) for text in requires("ktmoe") or ()]
    except PackageNotFoundError:
        found = []
    return defaultdict(SpecifierSet, {r.name: r.specifier for r in found if r.marker is None})


def _pair(transformers: str, peft: str) -> Finding:
    name, both = "together", f"transformers {transformers} with peft {peft}"
    usual = f"pip install transformers=={VERSIONS['transformers']} peft=={VERSIONS['peft']}"
    if Version(transformers) >= Version("5") and Version(peft) < _READS_EXPERTS:
        what = f"{both}: trains, but stock peft before {_READS_EXPERTS} does not read adapters of routed experts"
        return Finding(name, what, Status.NOTE, usual)
    if (transformers, peft) in PAIRS:
        return Finding(name, f"{both}: tested")
    newest = max(Version(t) for t, _ in PAIRS), max(Version(p) for _, p in PAIRS)
    if Version(transformers) > newest[0] or Version(peft) > newest[1]:
        return Finding(name, f"{both}: newer than what was tested", Status.NOTE, usual)
    return Finding(name, f"{both}: within the tested ranges, not this very pair")


def llamafactory() -> Iterator[Finding]:
    """LLaMA-Factory, in the one version that ktmoe knows the places of, and what it imports."""
    found, tested = installed("llamafactory"), VERSIONS["llamafactory"]
    remedy = f"pip install --no-deps llamafactory=={tested}"
    if not found:
        yield Finding("LLaMA-Factory", "is missing: ktmoe train, chat and export do not run", Status.NOTE, remedy)
        return
    if found != tested:
        yield Finding("LLaMA-Factory", f"{found}; use_kt was tested with {tested}", Status.PROBLEM, remedy)
    else:
        yield Finding("LLaMA-Factory", found)
    for name in _TRAINING:
        if not installed(name):
            pin = f"{name}=={VERSIONS[name]}" if name in VERSIONS else name
            yield Finding(name, "is missing: LLaMA-Factory imports it", Status.PROBLEM, f"pip install {pin}")
