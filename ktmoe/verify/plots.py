"""The report's plots, as SVG texts."""

from __future__ import annotations

import io
import statistics
from typing import Any


def draw(sections: dict[str, dict[str, Any]]) -> dict[str, str]:
    """By section, the SVG of what it measured; sections without data have none.

    Args:
        sections: results as in `report.json`.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update(
        {
            "svg.fonttype": "none",
            "font.size": 9,
            "axes.spines.top": False,
            "text.parse_math": False,
            "axes.spines.right": False,
        }
    )
    artists = {"accuracy": _accuracy, "soak": _soak, "throughput": _throughput}
    return {name: _svg(artist(sections[name]["data"])) for name, artist in artists.items() if sections[name]["data"]}


def _svg(figure: Any) -> str:
    from matplotlib import pyplot

    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :]


def _accuracy(data: dict[str, Any]) -> Any:
    """Error of every expert, tensor by tensor, against the limit."""
    from matplotlib import pyplot

    runs = data["runs"]
    names = list(dict.fromkeys(r["shape_name"] for r in runs))
    backends = list(dict.fromkeys(r["backend"] for r in runs))
    figure, axes = pyplot.subplots(
        len(names), len(backends), figsize=(3.6 * len(backends), 2.6 * len(names)), squeeze=False, layout="constrained"
    )
    for run in runs:
        axis = axes[names.index(run["shape_name"])][backends.index(run["backend"])]
        tensors: dict[str, list[tuple[int, float]]] = {}
        for row in run["rows"]:
            if row["expert"] is not None and row["error"] is not None:
                tensors.setdefault(row["name"], []).append((row["expert"], 100 * row["error"]))
        for tensor, points in tensors.items():
            axis.plot(*zip(*points, strict=True), ".", markersize=4, label=tensor)
        for key, style in (("forward", "--"), ("backward", ":")):
            axis.axhline(100 * run["limits"][key], color="black", lw=0.8, ls=style, label=f"limit {key}")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set(title=f"{run['backend']}, {run['shape_name']}", xlabel="expert", ylabel="error, %", ylim=(0, None))
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=7, frameon=False)
    return figure


def _soak(data: dict[str, Any]) -> Any:
    """Resident and private memory over time."""
    from matplotlib import pyplot

    runs = data["runs"]
    figure, axes = pyplot.subplots(1, len(runs), figsize=(4.8 * len(runs), 2.8), squeeze=False, layout="constrained")
    for axis, run in zip(axes[0], runs, strict=True):
        for key in ("rss", "private"):
            axis.plot(run["samples"]["seconds"], [b / 2**20 for b in run["samples"][key]], label=key, lw=1)
        axis.set(title=run["backend"], xlabel="seconds", ylabel="MiB", ylim=(0, None))
        axis.legend(frameon=False)
    return figure


def _throughput(data: dict[str, Any]) -> Any:
    """Median tokens per second, forward and backward apart."""
    from matplotlib import pyplot

    runs = data["runs"]
    figure, axes = pyplot.subplots(1, len(runs), figsize=(4.8 * len(runs), 2.8), squeeze=False, layout="constrained")
    for axis, run in zip(axes[0], runs, strict=True):
        names = list(run["seconds"])
        for offset, kind in ((-0.2, "forward"), (0.2, "backward")):
            speed = [data["tokens"] / statistics.median(run["seconds"][n][kind]) for n in names]
            axis.bar([i + offset for i in range(len(names))], speed, 0.38, label=kind)
        axis.set(title=run["shape_name"], ylabel="tokens/s")
        axis.set_xticks(range(len(names)), names)
        axis.legend(frameon=False)
    return figure
