"""What torchrun starts in the place of LLaMA-Factory's own launcher file."""

from __future__ import annotations

import signal
import sys
from typing import NoReturn


def _interrupted(*_: object) -> NoReturn:
    """Ctrl-C, once: a terminal sends it to this process too, and then torchrun passes on what it got itself.

    The second one came while the first was unwound, or in Python's end, with a traceback or as "killed by a signal".
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.path.pop(0)  # this file's folder, which torchrun's Python puts first: its modules are no top-level ones

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not started in the background
        signal.signal(signal.SIGINT, _interrupted)

    from ktmoe.exits import run
    from ktmoe.llamafactory import install

    def train() -> None:
        """LLaMA-Factory's own training entry, after the patches."""
        install()
        from llamafactory.train.tuner import run_exp

        run_exp()

    run(train)
