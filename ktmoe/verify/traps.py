"""`python -m ktmoe.verify.traps`: every trap of the kernel, stepped into on purpose, with ktmoe's guards in place.

The probes run in a process of their own. One that dies of a signal is reported as such, and the rest run in the next.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator

from rich.progress import track
from rich.table import Table

from ktmoe.backends import KERNEL_BACKENDS, kt
from ktmoe.verify import results
from ktmoe.verify.probes import TRAPS


_START = 300  # seconds for a process to import everything
_TIMEOUT = 300  # seconds for one probe; each takes about a tenth of one


def run(name: str) -> Iterator[tuple[int, list[str]]]:
    """Runs every probe with one kernel backend.

    Yields:
        The trap's number and what was found wrong, in order.
    """
    todo = sorted(TRAPS)
    while todo:
        command = [sys.executable, "-m", "ktmoe.verify.traps", "--child", name, *map(str, todo)]
        with (
            tempfile.TemporaryFile("w+") as stderr,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as child,
        ):
            lines = _lines(child)
            next(lines, None)  # it has started
            for line in lines:
                yield todo.pop(0), json.loads(line)
            if todo:  # it ended in the middle of a probe
                stderr.seek(0)
                said = " ".join(stderr.read().split()[-40:])
                how = f"killed by signal {-child.returncode}" if child.returncode < 0 else f"exit {child.returncode}"
                yield todo.pop(0), [f"the process ended: {how}. {said}"]


def _lines(child: subprocess.Popen[str]) -> Iterator[str]:
    """What a child prints. What hangs in the kernel holds the GIL, so its parent has to end it."""
    assert child.stdout is not None
    for seconds in itertools.chain([_START], itertools.repeat(_TIMEOUT)):
        timer = threading.Timer(seconds, child.kill)
        timer.start()
        line = child.stdout.readline()
        timer.cancel()
        if not line:
            child.wait()
            return
        yield line


def _child(name: str, numbers: list[int]) -> None:
    with os.fdopen(os.dup(1), "w") as answers, open(os.devnull, "w") as devnull:
        os.dup2(devnull.fileno(), 1)  # the extension prints to stdout
        print("started", file=answers, flush=True)
        for number in numbers:
            try:
                problems = TRAPS[number].probe(name)
            except Exception as error:
                problems = [f"{type(error).__name__}: {error}"]
            print(json.dumps(problems), file=answers, flush=True)


def table(found: dict[str, dict[int, list[str]]]) -> Table:
    """One row per trap, one column per backend."""
    out = Table(title=f"Traps of the kernel ({kt.variant()}), with ktmoe's guards")
    for column in ("trap", "without a guard", *found):
        out.add_column(column)
    for number, trap in sorted(TRAPS.items()):
        cells = ("[red]NOT HELD[/]" if rows[number] else "[green]held[/]" for rows in found.values())
        out.add_row(f"K{number}", trap.effect, *cells)
    return out


def main(argv: list[str] | None = None) -> int:
    """Runs all, prints the table, and returns 0 only if the kernel was there and every trap is held."""
    parser = argparse.ArgumentParser(prog="ktmoe.verify.traps", description=__doc__)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    results.add_arguments(parser)
    args = parser.parse_args(argv)
    if args.child:
        _child(args.child[0], [int(n) for n in args.child[1:]])
        return 0
    console = results.console()
    if not kt.available():
        return results.end(console, args, "traps", (), [], {})
    found: dict[str, dict[int, list[str]]] = {}
    for name in KERNEL_BACKENDS:
        steps = track(run(name), f"Traps, {name}", len(TRAPS), console=console, disable=not console.is_terminal)
        found[name] = dict(steps)
    console.print(table(found))
    problems = [f"{name}, K{n}: {p}" for name, rows in found.items() for n, ps in rows.items() for p in ps]
    traps = [
        {"number": n, "effect": t.effect, "problems": {b: rows[n] for b, rows in found.items()}}
        for n, t in sorted(TRAPS.items())
    ]
    return results.end(console, args, "traps", found, problems, {"traps": traps})


if __name__ == "__main__":
    raise SystemExit(main())
