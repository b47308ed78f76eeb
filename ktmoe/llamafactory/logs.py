"""LLaMA-Factory's log, and ktmoe's warnings in it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any


def logger() -> Any:
    from llamafactory.extras import logging

    return logging.get_logger("llamafactory.ktmoe")  # below its root logger, whose format and level hold


@contextlib.contextmanager
def warnings_to_log() -> Iterator[None]:
    """ktmoe's own warnings go where LLaMA-Factory's go."""
    with warnings.catch_warnings():
        shown = warnings.showwarning

        def show(message: Any, *args: Any, **kwargs: Any) -> None:
            if str(message).startswith("ktmoe: "):
                logger().warning_rank0_once(str(message))
            else:
                shown(message, *args, **kwargs)

        warnings.showwarning = show
        yield
