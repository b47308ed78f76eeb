"""`ktmoe verify`: all sections in turn, each in a process of its own, then one table, one page and one file.

A section that a signal kills has failed; the others go on.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jinja2
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import ktmoe
from ktmoe.types import KTError
from ktmoe.verify import environment, plots, results


SECTIONS = ("accuracy", "weights", "traps", "soak", "placement", "throughput")
# As `python -m`, but Ctrl-C ends it at once: a section has nothing to say then, and this process answers for it.
_SECTION = """
import runpy, signal
signal.signal(signal.SIGINT, signal.SIG_DFL)
runpy.run_module("ktmoe.verify.{}", run_name="__main__", alter_sys=True)
"""


def verify(
    output: Path,
    model: str | None,
    rank: int,
    seed: int,
    soak_minutes: float,
    allow_unverified: bool,
    console: Console,
) -> int:
    """Runs everything and writes `report.html` and `report.json`.

    Args:
        output: the folder for them, made if it is not there.
        model: whose layer shapes to use, a folder or a hub name; None for those of released models. If its weights
            are there, every expert is measured on them.
        rank: LoRA rank for the model's shapes.
        seed: of everything that is drawn.
        soak_minutes: how long the soak run takes.
        allow_unverified: whether a host without a kernel is a success.
        console: where the tables go.

    Returns:
        The exit code: 0 if every section passed.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / "report.html").write_text("")  # whether it can be
        # An earlier run's results must not be taken for this one's.
        for name in ("report.html", *(f"{name}.json" for name in (*SECTIONS, "report"))):
            (output / name).unlink(missing_ok=True)
    except OSError as error:
        raise KTError(f"--output: cannot write to {output}: {error}") from error
    shapes = ["--model", model, "--rank", str(rank)] if model else []
    options: dict[str, list[str]] = {
        "accuracy": ["--seed", str(seed), *shapes],
        **({"weights": ["--model", model, "--seed", str(seed)]} if model and results.has_weights(model) else {}),
        "traps": [],
        "soak": ["--minutes", str(soak_minutes), "--seed", str(seed)],
        "placement": [],
        "throughput": shapes,
    }
    host = environment.describe()
    console.print(_table("Environment", ("", ""), [(name, escape(value)) for name, value in host.items()]))
    found = [_run(name, options[name], output, console) for name in options]
    verdict = overall(found)
    console.print(_table("Verdict", ("section", "verdict", ""), [_row(s) for s in found]))
    result = {
        "ktmoe": ktmoe.__version__,
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": model,
        "verdict": verdict,
        "environment": host,
        "sections": {s["section"]: s for s in found},
    }
    (output / "report.json").write_text(json.dumps(result, indent=1) + "\n")
    (output / "report.html").write_text(page(result), encoding="utf-8")
    words = {
        "pass": f"kernel verified on this host: {host['kernel']}",
        "not verified": f"kernel NOT verified on this host: {host['kernel'].removeprefix('none: ')}",
        "fail": "verification FAILED",
    }
    console.print(words[verdict], style=f"bold {results.COLOURS[verdict]}", markup=False, highlight=False)
    console.print(f"report: {output / 'report.html'}, {output / 'report.json'}", markup=False, highlight=False)
    return int(verdict == "fail" or (verdict == "not verified" and not allow_unverified))


def overall(sections: Sequence[dict[str, Any]]) -> str:
    """The worst of the sections' verdicts."""
    verdicts = {s["verdict"] for s in sections}
    return next(v for v in ("fail", "not verified", "pass") if v in verdicts)


def page(result: dict[str, Any]) -> str:
    """The report as one HTML page that needs nothing else: plots are inline SVG."""
    here = jinja2.FileSystemLoader(Path(__file__).parent)
    template = jinja2.Environment(loader=here, autoescape=True, undefined=jinja2.StrictUndefined)
    return template.get_template("report.html.jinja").render(**result, plots=plots.draw(result["sections"]))


def _run(name: str, options: list[str], output: Path, console: Console) -> dict[str, Any]:
    """One section; it writes `output/<name>.json`, or did not live to."""
    console.rule(name)
    section = [sys.executable, "-c", _SECTION.format(name), "--output", str(output), "--allow-unverified"]
    code = _wait([*section, *options])
    if code in (0, 1):  # what `results.end` returns
        with contextlib.suppress(OSError, ValueError):
            return json.loads((output / f"{name}.json").read_text())
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    summary = f"{name}: its process {how} before it was done"
    console.print(summary, style="red", markup=False)
    return {"section": name, "verdict": "fail", "summary": summary, "problems": [summary], "data": {}}


def _wait(command: Sequence[str]) -> int:
    """Runs a section with a folder of its own for what it leaves when it is killed."""
    # What it has started may take a moment longer to die.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as own:
        return subprocess.run(command, env=os.environ | {"TMPDIR": own}).returncode


def _row(section: dict[str, Any]) -> tuple[str, str, str]:
    verdict = section["verdict"]
    return section["section"], f"[{results.COLOURS[verdict]}]{verdict}[/]", escape(section["summary"])


def _table(title: str, columns: Sequence[str], rows: Any) -> Table:
    table = Table(*columns, title=title, show_header=any(columns))
    for row in rows:
        table.add_row(*row)
    return table
