"""A stand-in for torchaudio, which LLaMA-Factory imports at its top and needs for audio data alone."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from ktmoe.types import KTError


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise KTError(
            f"torchaudio.{name}: torchaudio is not installed. Audio data need it: install the build for your torch."
        )


@contextmanager
def torchaudio_stand_in() -> Iterator[None]:
    """Within it `import torchaudio` succeeds. Nothing is done where torchaudio is installed.

    It is taken away again afterwards, so that nobody else finds a torchaudio that is none; modules that imported it
    keep it.
    """
    if "torchaudio" in sys.modules or importlib.util.find_spec("torchaudio") is not None:
        yield
        return
    from transformers.utils import import_utils

    import_utils.is_torchaudio_available()  # remembers the true answer
    module = _StandIn("torchaudio")
    module.__spec__ = ModuleSpec("torchaudio", None)  # find_spec raises without one
    sys.modules["torchaudio"] = module
    try:
        yield
    finally:
        sys.modules.pop("torchaudio", None)
