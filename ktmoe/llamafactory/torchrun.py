"""LLaMA-Factory's launcher starts whatever `torchrun` comes first on PATH, and cuts the arguments at spaces."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any


_WORKER = "ktmoe-worker"  # stands in the launcher's command where the worker's file and its arguments go


def use_own(launcher: Any) -> None:
    """Has the launcher start this Python's torchrun, and ktmoe's worker: stock ones would know nothing of ktmoe.

    Args:
        launcher: the module `llamafactory.launcher`.
    """
    launcher.__file__ = _WORKER
    launcher.subprocess = SimpleNamespace(run=_run)


def _run(command: Sequence[str], **kwargs: Any) -> Any:
    options = command[1 : command.index(_WORKER)]
    worker = str(Path(__file__).with_name("worker.py"))
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", *options, worker, *sys.argv[1:]], **kwargs)
