"""What users are told while things go on: once each."""

from __future__ import annotations

import warnings


_said: set[str] = set()


def say_once(message: str, about: str = "") -> None:
    """Warns, once per process and message.

    Args:
        message: for the user.
        about: what it is about, where the message has a figure in it that is another one each time.
    """
    if (about or message) not in _said:
        _said.add(about or message)
        warnings.warn(message, stacklevel=3)
