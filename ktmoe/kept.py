"""What was found out on this machine and holds until something changes: signed files in the user's cache directory."""

from __future__ import annotations

import functools
import hashlib
import hmac
import json
import os
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import platformdirs

from ktmoe.notices import say_once


def read(about: dict[str, Any], kind: str = "gate") -> dict[str, Any] | None:
    """What was written about exactly this on this machine, or None.

    Args:
        about: the subject.
        kind: the folder: gate for certificates, speed and torch for measurements.
    """
    try:
        found = json.loads(_path(about, kind).read_text())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or found.get("subject") != about:
        return None
    whole = hmac.compare_digest(str(found.pop("signature", "")), _signature(found))
    return found if whole else None


def write(about: dict[str, Any], kind: str = "gate", **results: Any) -> None:
    """Atomically: a file is whole or absent. A read-only cache costs a check per process, not a failure."""
    path = _path(about, kind)
    when = datetime.now(timezone.utc).isoformat(timespec="seconds")
    content: dict[str, Any] = {"subject": about, "passed": when, **results}
    content["signature"] = _signature(content)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(content, sort_keys=True, indent=1))
        part.replace(path)
    except OSError as error:
        say_once(
            f"ktmoe: what was found out about this machine cannot be kept ({error}); the next process does it again."
        )


def _path(about: dict[str, Any], kind: str = "gate") -> Path:
    return cache_folder() / kind / f"{hashlib.sha256(_canonical(about)).hexdigest()[:32]}.json"


def cache_folder() -> Path:
    """Where all of it is: `KTMOE_CACHE_DIR`, or `ktmoe` in the user's cache directory."""
    return Path(os.environ.get("KTMOE_CACHE_DIR") or platformdirs.user_cache_dir("ktmoe"))


def _canonical(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True).encode()


def _signature(content: dict[str, Any]) -> str:
    """Against slips, not against attackers: an edited file, or one of another machine, does not carry it."""
    return hmac.new(_machine(), _canonical(content), hashlib.sha256).hexdigest()


def host() -> str:
    """This machine, or this container. Home directories are shared between the nodes of a cluster; CPUs are not."""
    return hashlib.sha256(_machine()).hexdigest()[:16]


@functools.cache
def _machine() -> bytes:
    try:
        machine = Path("/etc/machine-id").read_text().strip()
    except OSError:
        machine = ""
    return f"{machine} {platform.node()}".encode()


@functools.cache
def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    keys = ("model name", "cpu family", "model", "stepping", "microcode")
    return "; ".join(sorted({line.replace("\t", "") for line in lines if line.split("\t")[0].strip() in keys}))
