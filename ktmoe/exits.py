"""How a command ends: what the user can mend is one message on stderr and exit code 2, never a traceback."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

from ktmoe.errors import KernelError, KTError


def run(command: Callable[[], None]) -> None:
    """Runs a command; what the user can mend becomes one message on stderr and exit code 2, Ctrl-C exit code 130.

    Raises:
        SystemExit: with the code.
    """
    try:
        command()
    except (KTError, KernelError) as error:  # a kernel that fails its checks: the message says what to use instead
        sys.last_type = type(error)  # as Python does for errors that end it: what is done at the end may ask
        print(f"ktmoe: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt as interrupt:  # a worker of torchrun's; elsewhere typer would do the same
        sys.last_type = type(interrupt)
        raise SystemExit(130) from None
    except subprocess.CalledProcessError as error:  # torchrun, whose worker has said why
        print(f"ktmoe: the training process ended with exit code {error.returncode}; see above.", file=sys.stderr)
        raise SystemExit(error.returncode) from None
