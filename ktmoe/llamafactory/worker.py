"""What torchrun starts in the place of LLaMA-Factory's own launcher file."""

from __future__ import annotations

import sys


if __name__ == "__main__":
    sys.path.pop(0)  # this file's folder, which torchrun's Python puts first: its modules are no top-level ones

    from ktmoe.exits import run
    from ktmoe.llamafactory import install

    def train() -> None:
        """LLaMA-Factory's own training entry, after the patches."""
        install()
        from llamafactory.train.tuner import run_exp

        run_exp()

    run(train)
