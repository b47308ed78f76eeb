"""`python -m ktmoe.verify.soak`: fine-tunes a small model for a while and shows that nothing leaks and nothing drifts.

It trains, evaluates, saves and loads adapters, detaches and attaches. Meanwhile memory, threads and file descriptors
are sampled, and a layer with a fixed adapter computes the same batches again: its answers must be the same to the bit.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ktmoe.backends import KERNEL_BACKENDS, kt
from ktmoe.verify import results, usage
from ktmoe.verify.growth import Trend, late_rise, trend
from ktmoe.verify.tuning import Probe, Tuning


MIB = 2**20
COLUMNS = ("seconds", "step", "saves", "rss", "uss", "private", "threads", "descriptors", "unchanged")
JUDGED = {"rss": "resident memory", "private": "private memory"}
EVENTS = ("evaluations", "saves", "attachments")
SETTLED = 20  # steps that memory needs at the start, also where a busy machine makes few of them
ENOUGH = 20  # samples to judge by
# Bytes that memory may grow by in the judged part of a run. Clean runs of a minute were sure to grow by 0.18 MiB at
# most, where a busy machine made 100 steps of them; a leak of 1 KiB per step needs some 300 steps to be found.
ALLOWED = 3 * MIB // 16
PER_SAVE = 32 * 1024  # more for each adapter saved and loaded: safetensors 0.8.0 keeps two integers per tensor read


@dataclass
class Run:
    """What one backend did.

    Attributes:
        backend: its name.
        samples: by the names of `COLUMNS`; memory in bytes.
        events: how often each of `EVENTS` happened.
        warm: the step by which each of them had happened twice and memory had settled; 0 if that never was.
        tokens: trained on.
        losses: of the first and of the last step.
        problems: what was wrong, as sentences.
        judged: the first judged sample.
        trends: of `rss` and `private` over the judged samples, per step.
        limit: bytes that they may grow by.
    """

    backend: str
    samples: dict[str, array[float]] = field(default_factory=lambda: {name: array("d") for name in COLUMNS})
    events: Counter[str] = field(default_factory=Counter)
    warm: int = 0
    tokens: int = 0
    losses: tuple[float, float] = (0.0, 0.0)
    problems: list[str] = field(default_factory=list)
    judged: int = 0
    trends: dict[str, Trend] = field(default_factory=dict)
    limit: float = 0.0

    @property
    def steps(self) -> int:
        """Steps at the last sample."""
        return int(self.samples["step"][-1])


def run(backend: str, seconds: float, seed: int, watch: Callable[[Run], None]) -> Run:
    """Trains on one backend.

    Args:
        backend: as `kt_backend`.
        seconds: how long, after loading.
        seed: of model, data and probe.
        watch: called after every sample.

    Returns:
        The run, judged.

    Raises:
        KernelError: the kernel failed a check.
    """
    found = Run(backend)
    with tempfile.TemporaryDirectory() as folder, usage.steady():
        tuning = Tuning(backend, seed, Path(folder))
        probe = Probe(tuning.config, seed)
        process, start, due = psutil.Process(), time.monotonic(), 0.0
        while (now := time.monotonic() - start) < seconds:
            loss = tuning.step()
            found.losses = (found.losses[0] or loss, loss)
            _events(found, tuning, max(6 * now / seconds, now / 60))
            if now >= due:
                # At least 120 samples, and no more than 1,000: they take memory too.
                due = now + max(seconds / 1000, min(1.0, seconds / 120))
                values = (now, tuning.steps, found.events["saves"], *usage.measure(process), probe.unchanged)
                for name, value in zip(COLUMNS, values, strict=True):
                    found.samples[name].append(value)
                watch(found)
            if not math.isfinite(loss):
                found.problems.append(f"step {tuning.steps}: the loss is {loss}")
                break
        found.tokens = tuning.tokens
        found.problems += [*tuning.mismatches[:3], *usage.outside_of_the_mask()]
    judge(found)
    return found


def judge(found: Run) -> None:
    """Fits the trends and adds what is wrong to `problems`.

    The first fifth of the samples is warm-up, and more if something had not happened twice by then.
    """
    step, saves = found.samples["step"], found.samples["saves"]
    changed = [int(s) for s, same in zip(step, found.samples["unchanged"], strict=True) if not same]
    if changed:
        found.problems.append(
            f"outputs of the fixed probe: other bits in {len(changed)} samples, from step {changed[0]}"
        )
    late = [i for i, s in enumerate(step) if found.warm and s > found.warm and i >= len(step) / 5]
    if len(late) < ENOUGH:
        found.problems.append(f"too short to judge: {len(late)} samples after warm-up, expected at least {ENOUGH}")
        return
    first = found.judged = late[0]
    found.limit = ALLOWED + PER_SAVE * (saves[-1] - saves[first])
    for name, label in JUDGED.items():
        line = found.trends[name] = trend(step[first:], found.samples[name][first:])
        if line.sure_growth > found.limit:
            found.problems.append(
                f"{label} grew by at least {line.sure_growth / MIB:.2f} MiB in {line.span:,.0f} steps (allowed: "
                f"{found.limit / MIB:.2f}), {line.slope / 1024:.2f} +- {line.margin / 1024:.2f} KiB per step"
            )
    for name, label in (("threads", "threads"), ("descriptors", "open file descriptors")):
        counts = found.samples[name][first:]
        if late_rise(counts) > 0:
            found.problems.append(
                f"{label}: up to {max(counts):.0f} at the end, {late_rise(counts):.0f} more than early"
            )


def _events(found: Run, tuning: Tuning, saves: float) -> None:
    """What is due after a step: everything twice in the first ten, then `saves` so far, the others by steps."""
    wanted = {"evaluations": tuning.steps / 10, "saves": saves, "attachments": tuning.steps / 50}
    for name in EVENTS:
        if found.events[name] >= max(int(wanted[name]), min(2, tuning.steps // 5)):
            continue
        found.events[name] += 1
        if name == "evaluations":
            tuning.evaluate()
        elif name == "saves":
            tuning.save_and_load()
        else:
            tuning.reattach(new=found.events[name] % 2 == 0)
    if not found.warm and tuning.steps >= SETTLED and all(found.events[name] >= 2 for name in EVENTS):
        found.warm = tuning.steps


def table(runs: list[Run]) -> Table:
    """One column per backend."""
    out = Table(title=f"Soak; kernel: {kt.variant()}", caption="memory: level, growth per 1,000 steps +- 95 %")
    out.add_column("")
    for r in runs:
        out.add_column(r.backend, justify="right")
    out.add_row("steps / tokens", *(f"{r.steps:,} / {r.tokens:,}" for r in runs))
    out.add_row("loss, first and last", *(f"{r.losses[0]:.3f}, {r.losses[1]:.3f}" for r in runs))
    for name in EVENTS:
        out.add_row(name, *(str(r.events[name]) for r in runs))
    for name in ("rss", "uss", "private"):
        out.add_row(f"{name}, MiB", *(_memory_cell(r, name) for r in runs))
    out.add_row("growth allowed, MiB in all", *(f"{r.limit / MIB:.2f}" for r in runs))
    for name in ("threads", "descriptors"):
        out.add_row(name, *(f"{min(r.samples[name]):.0f} to {max(r.samples[name]):.0f}" for r in runs))
    out.add_row("outputs", *("bitwise equal" if all(r.samples["unchanged"]) else "[red]CHANGED[/]" for r in runs))
    out.add_row("verdict", *("[red]FAIL[/]" if r.problems else "[green]pass[/]" for r in runs))
    return out


def _memory_cell(r: Run, name: str) -> str:
    level = f"{r.samples[name][-1] / MIB:.1f}"
    line = r.trends.get(name)
    return f"{level}, {1000 * line.slope / MIB:+.3f} +- {1000 * line.margin / MIB:.3f}" if line else level


def draw(runs: list[Run], path: Path) -> None:
    """A picture of memory over steps with the fitted lines; the warm-up is grey."""
    from matplotlib.figure import Figure  # slow to import; without pyplot it draws files, whatever the backend

    figure = Figure(figsize=(6 * len(runs), 3.6), layout="constrained")
    for axis, r in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs, strict=True):
        step = r.samples["step"]
        for (name, label), colour in zip(JUDGED.items(), ("tab:blue", "tab:orange"), strict=True):
            base = r.samples[name][r.judged]
            rise = [(v - base) / MIB for v in r.samples[name]]
            axis.plot(step, rise, ".", ms=3, color=colour, label=f"{label}, from {base / MIB:.1f} MiB")
            if line := r.trends.get(name):
                ends = [step[r.judged], step[-1]]
                middle = sum(step[r.judged :]) / len(step[r.judged :])
                fit = [(line.level - base + line.slope * (x - middle)) / MIB for x in ends]
                axis.plot(ends, fit, color=colour, lw=1)
        axis.axvspan(step[0], step[r.judged], color="0.9")
        rises = [(v - r.samples[name][r.judged]) / MIB for name in JUDGED for v in r.samples[name][r.judged :]]
        around = (min(rises) - ALLOWED / MIB, max(rises) + ALLOWED / MIB)  # the warm-up's rise would hide the others
        axis.set(title=r.backend, xlabel="steps", ylabel="memory, MiB", ylim=around)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=120)


@contextmanager
def _progress(console: Console, seconds: float) -> Iterator[Callable[[Run], None]]:
    """A bar over all backends' time; where the output is no terminal, a line every 30 seconds."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task, done, said, last = bar.add_task("Soak", total=seconds), 0.0, -math.inf, ("", 0.0)

        def watch(r: Run) -> None:
            nonlocal done, said, last
            now = r.samples["seconds"][-1]
            done += now - last[1] if last[0] == r.backend else now
            last = (r.backend, now)
            text = f"{r.backend}, step {r.steps:,}, USS {r.samples['uss'][-1] / MIB:.1f} MiB"
            bar.update(task, completed=done, description=text)
            if not console.is_terminal and time.monotonic() - said >= 30:
                said = time.monotonic()
                console.print(f"{done:.0f} of {seconds:.0f} s: {text}", highlight=False)

        yield watch


def _data(r: Run) -> dict[str, Any]:
    """Plain JSON."""
    return {
        "backend": r.backend,
        "steps": r.steps,
        "tokens": r.tokens,
        "losses": [loss if math.isfinite(loss) else None for loss in r.losses],
        "events": dict(r.events),
        "judged_from": r.judged,
        "limit": r.limit,
        "trends": {name: vars(line) for name, line in r.trends.items()},
        "problems": r.problems,
        "samples": {name: list(values) for name, values in r.samples.items()},
    }


def main(argv: list[str] | None = None) -> int:
    """Runs all, prints the table, writes results and plot, and returns 0 only if the kernel ran and nothing grew."""
    parser = argparse.ArgumentParser(prog="ktmoe.verify.soak", description=__doc__)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=3.0, help="for all backends together (default: 3)")
    length.add_argument("--hours", type=float, help="the same, for a night")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--backend", action="append", choices=("torch", *KERNEL_BACKENDS), help="may be repeated (default: all here)"
    )
    results.add_arguments(parser)
    parser.set_defaults(output=Path("ktmoe-verify"))
    args = parser.parse_args(argv)
    seconds = 3600 * args.hours if args.hours is not None else 60 * args.minutes
    if not 0 < seconds < math.inf:
        parser.error(f"--minutes, --hours: got {seconds / 60} minutes; expected more than 0.")
    here = ("torch", *KERNEL_BACKENDS) if kt.available() else ("torch",)
    names = [n for n in dict.fromkeys(args.backend or KERNEL_BACKENDS) if n in here] or ["torch"]
    console = results.console()
    with _progress(console, seconds) as watch:
        runs = [run(name, seconds / len(names), args.seed, watch) for name in names]
    console.print(table(runs))
    problems = [f"{r.backend}: {p}" for r in runs for p in r.problems]
    args.output.mkdir(parents=True, exist_ok=True)
    draw(runs, args.output / "soak.png")
    data = {"seed": args.seed, "seconds": seconds, "runs": [_data(r) for r in runs]}
    steps, tokens = sum(r.steps for r in runs), sum(r.tokens for r in runs)
    summary = (
        f"soak passed: {', '.join(names)}: {steps:,} steps, {tokens:,} tokens; memory, threads and file descriptors "
        "do not grow, outputs bitwise the same"
    )
    return results.end(console, args, "soak", names, problems, data, summary)


if __name__ == "__main__":
    raise SystemExit(main())
