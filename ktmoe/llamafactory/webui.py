"""LLaMA-Factory's own page in the browser, whose trainings are run by `ktmoe train`."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Sequence
from typing import Any

from ktmoe.llamafactory.patches import install, replace
from ktmoe.types import KTError


_THEIRS = "llamafactory-cli"


def serve() -> None:
    """Serves the page until it is stopped. LLaMA-Factory's own variables say where, GRADIO_SERVER_PORT among them.

    Raises:
        KTError: gradio is not installed.
    """
    install()
    if importlib.util.find_spec("gradio") is None:
        raise KTError(
            "webui: needs gradio, which LLaMA-Factory's page is made with: pip install 'gradio>=4.38,<=5.50'."
        )
    from llamafactory.webui import interface, runner

    replace(runner, "Popen", _started_by_ktmoe)
    replace(runner, "gen_cmd", _shown_as_ktmoe)
    interface.run_web_ui()


def _started_by_ktmoe(original: Any) -> Any:
    """The page starts each training as a process."""

    @functools.wraps(original)
    def start(command: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        if command[0] == _THEIRS:
            command = [sys.executable, "-m", "ktmoe.cli", *command[1:]]
        return original(command, *args, **kwargs)

    return start


def _shown_as_ktmoe(original: Any) -> Any:
    """The command that it shows as a preview."""

    def shown(args: dict[str, Any]) -> str:
        return str(original(args)).replace(_THEIRS, "ktmoe")

    return shown
