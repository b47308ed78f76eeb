"""Where the time of a training step goes: seconds by part of the model, in forward, recompute and backward.

Hooks tell when a part begins and ends; what lies between belongs to the part that began last. In the backward pass
those of tensors do: the gradient of what a part gave is its beginning, that of what it took its end. A forward in the
backward pass is gradient checkpointing's recompute.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback


PARTS = {"self_attn": "attention", "gate": "router", "experts": "experts", "lm_head": "head"}  # by a module's name
REST = "norms, residuals"
ORDER = ("experts", "attention", REST, "head", "loss", "router", "optimizer")
PASSES = ("forward", "recompute", "backward")


class StepProfile(TrainerCallback):
    """As a callback of a Trainer. `seconds` has one dict for every step, keyed by `part, pass`."""

    def __init__(self) -> None:
        """Hooks nothing before training begins."""
        self.seconds: list[dict[str, float]] = []
        self._open: list[tuple[str, str]] = []
        self._since = 0.0
        self._found: defaultdict[str, float] = defaultdict(float)

    def on_train_begin(self, *_: Any, model: Any, **__: Any) -> None:
        """Hooks the model's parts, and its loss."""
        for name, module in model.named_modules():
            if part := PARTS.get(name.rpartition(".")[2]):
                self._hook(module, part)
        base = model.get_base_model()
        given = base.loss_function

        def loss_function(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            began = self._begin("loss", (logits,))
            loss = given(logits, *args, **kwargs)
            self._end("loss", began, (loss,))
            return loss

        base.loss_function = loss_function

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Starts the clock."""
        self._found.clear()
        self._open, self._since = [], time.perf_counter()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Where the optimizer begins."""
        self._enter("optimizer", "backward")

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Where the step ends."""
        self._count()
        self.seconds.append(dict(self._found))

    def _hook(self, module: nn.Module, part: str) -> None:
        passes = []

        def before(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            passes.append(self._begin(part, (*args, *kwargs.values())))

        def after(_: nn.Module, args: Any, out: Any) -> None:
            self._end(part, passes.pop(), out if isinstance(out, tuple) else (out,))

        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after)

    def _begin(self, part: str, taken: Sequence[Any]) -> str:
        which = _pass()
        self._enter(part, which)
        for tensor in _trained(taken)[:1]:
            tensor.register_hook(lambda _: self._leave(part, "backward"))
        return which

    def _end(self, part: str, which: str, given: Sequence[Any]) -> None:
        self._leave(part, which)
        for tensor in _trained(given)[:1]:
            tensor.register_hook(lambda _: self._enter(part, "backward"))

    def _enter(self, part: str, which: str) -> None:
        self._count()
        self._open.append((part, which))

    def _leave(self, part: str, which: str) -> None:
        self._count()
        if (part, which) in self._open:
            self._open.remove((part, which))

    def _count(self) -> None:
        now = time.perf_counter()
        part, which = self._open[-1] if self._open else (REST, "backward" if _in_backward() else "forward")
        self._found[f"{part}, {which}"] += now - self._since
        self._since = now


def medians(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of several steps, each part for itself."""
    names = {name for step in steps for name in step}
    return {name: statistics.median(step.get(name, 0.0) for step in steps) for name in sorted(names)}


def draw(profiles: dict[str, dict[str, float]], title: str, path: Path) -> None:
    """One bar for each contestant, by part; the passes of a part side by side in shades of its colour."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.1 + 0.7 * len(profiles)), layout="constrained")
    axes = figure.subplots()
    for at, profile in enumerate(profiles.values()):
        left = 0.0
        for number, part in enumerate(ORDER):
            for which, alpha in zip(PASSES, (0.55, 0.8, 1.0), strict=True):
                width = profile.get(f"{part}, {which}", 0.0)
                label = part if at == 0 and which == "backward" else None
                axes.barh(
                    at, width, left=left, color=f"C{number}", alpha=alpha, label=label, edgecolor="white", lw=0.4
                )
                left += width
    axes.set_yticks(range(len(profiles)), list(profiles))
    axes.invert_yaxis()
    axes.set_xlabel("seconds of one step; light to dark: forward, recompute, backward")
    axes.set_title(title, fontsize=10)
    axes.legend(ncols=len(ORDER), loc="upper center", bbox_to_anchor=(0.5, -0.32), frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    with mpl.rc_context({"svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})


def _trained(values: Sequence[Any]) -> list[Tensor]:
    return [v for v in values if isinstance(v, Tensor) and v.requires_grad]


def _pass() -> str:
    return "recompute" if _in_backward() else "forward"


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
