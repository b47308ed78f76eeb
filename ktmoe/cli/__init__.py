"""The command line: every command of `ktmoe`, its arguments and its help."""

# Commands are registered in this order, which is that of the help.
from ktmoe.cli import training, planning, machine, converting  # noqa: I001, F401
from ktmoe.cli.root import app


__all__ = ["app", "main"]


def main() -> None:
    """The console script `ktmoe`."""
    app(prog_name="ktmoe")
