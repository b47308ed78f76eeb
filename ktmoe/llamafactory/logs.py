"""LLaMA-Factory's log, and ktmoe's warnings and figures in it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from ktmoe.training_log import TrainingLog


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


def with_training_log(original: Callable[..., Any]) -> Callable[..., Any]:
    """Around LLaMA-Factory's training: a callback that is silent where no routed experts are ktmoe's."""

    def training(config: dict[str, Any]) -> Any:
        return original({**config, "callbacks": [TrainingLog(), *config["callbacks"]]})

    return training
