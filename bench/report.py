"""What was measured as a table, a JSON file and plots."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


PACKAGES = ("torch", "transformers", "peft", "kt-kernel")


def machine() -> dict[str, Any]:
    """Where and on what it was measured: CPU, cores, packages, commit."""
    cpu = next((s for s in Path("/proc/cpuinfo").read_text().splitlines() if s.startswith("model name")), "")
    here = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=here).stdout.strip()
    about = {"cpu": cpu.partition(": ")[2], "cores": os.cpu_count(), "python": platform.python_version()}
    return about | {"commit": commit, **{name: version(name) for name in PACKAGES}}


def label(row: dict[str, Any]) -> str:
    """A contestant's name, with its kernel threads."""
    return row["contestant"] + (f", {row['threads']} thr." if row["threads"] else "")


def show(rows: list[dict[str, Any]]) -> None:
    """One table for one kind of layer."""
    if not rows:
        return
    s, rates = rows[0]["shape"], rows[0]["rates"]
    sizes = f"E {s['num_experts']}, k {s['top_k']}, H {s['hidden_size']}, I {s['intermediate_size']}"
    host = "GEMM {gemm:.0f} GFLOP/s (fp32 {gemm_fp32:.0f}), memory {memory:.1f} GB/s"
    host = host.format(**{key: rate / 1e9 for key, rate in rates.items()})
    table = Table(title=f"{rows[0]['row']}: {sizes}, {rows[0]['tokens']} tokens, r = {s['rank']}; {host}")
    for column in ("", "load", "peak", "forward", "fwd + bwd", "of roofline", "/ bare best", "bwd/fwd", "LoRA/fwd"):
        table.add_column(column, justify="right" if column else "left")
    table.add_column("ckpt/plain", justify="right")
    table.add_column("over bare", justify="right")
    bare = min((r["seconds"]["bare_both"] for r in rows if "bare_both" in r["seconds"]), default=None)
    for row in rows:
        t = row["seconds"]

        def ratio(a: str, b: str, less: float = 0.0, t: dict[str, float] = t) -> str:
            return f"{t[a] / t[b] - less:.2f}" if a in t and b in t else ""

        table.add_row(
            label(row),
            f"{row['load']:.1f} s",
            f"{row['peak_bytes'] / 1e9:.2f} GB",
            f"{1e3 * t['forward']:.1f} ms",
            f"{1e3 * t['both']:.1f} ms",
            f"{t['fraction']:.2f}",
            f"{bare / t['both']:.2f}" if bare else "",
            f"{t['both'] / t['forward'] - 1:.2f}",
            ratio("forward", "forward_without_lora", 1.0),
            ratio("checkpointed", "both"),
            ratio("both", "bare_both", 1.0),
        )
    Console(width=150).print(table)


def write(out: Path, data: dict[str, Any]) -> None:
    """`layers.json`, `layers.svg`, and a plot for every sweep."""
    from layers import ROWS, SWEEPS

    out.mkdir(parents=True, exist_ok=True)
    (out / "layers.json").write_text(json.dumps(data, indent=1))
    rows = data["rows"]
    _bars([r for r in rows if r["row"] in ROWS], out / "layers.svg")
    for sweep, wanted in SWEEPS.items():
        names = [name for name, _ in wanted]
        _lines([r for r in rows if r["row"] in names], sweep, out / f"{sweep}.svg")


def _best(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By contestant, the bare kernel among them: seconds at its best thread count."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        t = row["seconds"]
        mine = {row["contestant"]: t["both"]} | ({"bare kernel": t["bare_both"]} if "bare_both" in t else {})
        for name, both in mine.items():
            if name not in found or both < found[name]["both"]:
                found[name] = {"both": both, "fraction": t["roofline"] / both}
    return found


def _bars(rows: list[dict[str, Any]], path: Path) -> None:
    """By layer: time of each contestant as a multiple of the fastest, and its fraction of the roofline."""
    from matplotlib.figure import Figure

    layers = list(dict.fromkeys(r["row"] for r in rows))
    if not layers:
        return
    best = {layer: _best(r for r in rows if r["row"] == layer) for layer in layers}
    names = list(dict.fromkeys(name for found in best.values() for name in found))
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        at = [i + number * width for i, layer in enumerate(layers) if name in best[layer]]
        mine = [best[layer][name] for layer in layers if name in best[layer]]
        least = [min(v["both"] for v in best[layer].values()) for layer in layers if name in best[layer]]
        left.bar(at, [m["both"] / b for m, b in zip(mine, least, strict=True)], width, label=name)
        right.bar(at, [m["fraction"] for m in mine], width)
    for axes, title in ((left, "forward + backward, times the fastest"), (right, "fraction of the GEMM roofline")):
        axes.set_xticks([i + 0.4 for i in range(len(layers))], layers)
        axes.set_title(title, fontsize=10)
    left.set_yscale("log")
    figure.legend(loc="outside lower center", ncols=len(names), frameon=False)
    figure.savefig(path)


def _lines(rows: list[dict[str, Any]], sweep: str, path: Path) -> None:
    """Time against tokens, or against experts."""
    from matplotlib.figure import Figure

    if not rows:
        return
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    found: dict[str, list[tuple[int, float]]] = {}
    for row in dict.fromkeys(r["row"] for r in rows):
        of_row = [r for r in rows if r["row"] == row]
        size = of_row[0]["tokens"] if sweep == "tokens" else of_row[0]["shape"]["num_experts"]
        for name, times in _best(of_row).items():
            found.setdefault(name, []).append((size, 1e3 * times["both"]))
    for name, points in found.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel=sweep, ylabel="forward + backward, ms")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)
