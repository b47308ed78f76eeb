"""All checks in turn, as a table, a block to paste into an issue, or JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

import ktmoe
from ktmoe.doctor import machine, software
from ktmoe.doctor.finding import Finding, Status
from ktmoe.doctor.probe import Probe


_COLOURS = {Status.OK: "green", Status.NOTE: "yellow", Status.PROBLEM: "red"}


def diagnose() -> list[Finding]:
    """All findings, in the order of the table."""
    probe = Probe()
    return [
        machine.cpu(),
        machine.cores_to_use(),
        machine.threads(),
        machine.host_memory(),
        *machine.caches(),
        software.python(),
        *software.libraries(),
        *software.llamafactory(),
        *probe.findings(),
    ]


def doctor(as_json: bool, to: Console) -> int:
    """Says what was found.

    Args:
        as_json: as one JSON object on stdout instead of a table.
        to: the terminal.

    Returns:
        The exit code: 1 if there is a problem, else 0.
    """
    findings = diagnose()
    problems = sum(f.status is Status.PROBLEM for f in findings)
    if as_json:
        rows = [f.as_json() for f in findings]
        print(json.dumps({"ktmoe": ktmoe.__version__, "problems": problems, "findings": rows}, indent=1))
    else:
        to.print(_table(findings))
        for finding in findings:
            if finding.remedy:
                to.print(f"{finding.name}: {finding.remedy}", markup=False, highlight=False, soft_wrap=True)
        to.print("\nTo paste into an issue:\n", markup=False)
        to.print(_block(findings), markup=False, highlight=False, soft_wrap=True)
    return int(problems > 0)


def _table(findings: Sequence[Finding]) -> Table:
    out = Table(title=f"ktmoe {ktmoe.__version__}")
    out.add_column("")
    out.add_column("found")
    out.add_column("")
    for f in findings:
        colour = _COLOURS[f.status]
        out.add_row(escape(f.name), escape(f.what), f"[{colour}]{f.status.value}[/]")
    return out


def _block(findings: Sequence[Finding]) -> str:
    lines = [f"{'' if f.status is Status.OK else f'[{f.status.value}] '}{f.name}: {f.what}" for f in findings]
    return "\n".join(["```text", f"ktmoe {ktmoe.__version__}", *lines, "```"])
