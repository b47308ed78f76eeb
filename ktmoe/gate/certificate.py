"""What the contract gate leaves behind on this machine: a file that says what passed, where, and with which code."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ktmoe_reference
import torch

from ktmoe.backends import Plan, kt
from ktmoe.kept import cpu_model, host, read
from ktmoe.types import MoEShape


def subject(plan: Plan, shape: MoEShape) -> dict[str, Any]:
    """Everything that a certificate speaks of. Any difference asks for a new gate."""
    return {
        "shape": asdict(shape),
        "plan": what_runs(plan),
        "extension": _extension_hash(),
        "variant": kt.variant(),
        "cpu": cpu_model(),
        "host": host(),
        "code": _code_hash(),
        "torch": torch.__version__,
    }


def what_runs(plan: Plan) -> dict[str, Any]:
    """A plan as JSON has it, without the reasons for it, and without what concerns torch alone."""
    found = {k: v for k, v in asdict(plan).items() if k not in ("reasons", "torch_packing")}
    return found | {"nodes": list(plan.nodes)}


def exists(about: dict[str, Any]) -> bool:
    """Whether this machine has a certificate for exactly this, as it was written."""
    return read(about) is not None


@functools.cache
def _extension_hash() -> str:
    path = kt.extension_path()
    return hashlib.sha256(path.read_bytes()).hexdigest() if path else ""


@functools.cache
def _code_hash() -> str:
    """Of ktmoe's and the reference's sources: what passed is this code, not a version number."""
    found = hashlib.sha256()
    for package in (Path(__file__).parent.parent, Path(ktmoe_reference.__file__).parent):
        for path in sorted(package.rglob("*.py")):
            found.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()
