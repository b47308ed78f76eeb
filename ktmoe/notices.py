"""What users are told while things go on: once each."""

from __future__ import annotations

import warnings


_said: set[str] = set()


def say_once(message: str) -> None:
    """Warns, once per process and message."""
    if message not in _said:
        _said.add(message)
        warnings.warn(message, stacklevel=3)
