"""The training log: where a step's time goes, how near the experts come to this machine, which of them have tokens."""

from __future__ import annotations

import statistics
import sys
import time
from contextlib import ExitStack
from typing import Any

import psutil
import torch
from tqdm import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler

from ktmoe import recording
from ktmoe.experts import MoEExperts
from ktmoe.recording import Record


_GB = 1e9
_FEW_ROWS = 24  # an expert's products are small below: oneDNN reached half of its rate with 16 rows


class TrainingLog(TrainerCallback):
    """Adds ktmoe's figures to whatever the Trainer logs, and says at the end what would help most.

    For `transformers.Trainer` and TRL: `Trainer(..., callbacks=[ktmoe.TrainingLog()])`; `ktmoe train` adds it itself.
    The figures are of the steps since the last line, evaluation, saving and loading of data left out:

    - `tokens_per_second`: tokens that this process has trained on, padding included.
    - `experts_forward`, `experts_recompute`, `experts_backward`, `outside_experts`: seconds a step. Recompute is what
      gradient checkpointing runs again; it is next to nothing where forwards are retained.
    - `experts_gflops`, `experts_of_gemm`: the experts' products with frozen weights, a second, and as a part of what a
      large product reaches on this machine. LoRA's own are left out.
    - `host_memory_gb`: resident memory of the process.
    - `expert_imbalance`: tokens of the busiest expert over the mean, a mean over layers. `experts_without_tokens`: in
      all layers.

    Examples:
        >>> callback = ktmoe.TrainingLog()
        >>> isinstance(callback, transformers.TrainerCallback)
        True
    """

    def __init__(self) -> None:
        """Nothing is measured before training begins."""
        self._since, self._all = _Span(), _Span()
        self._step = ExitStack()
        self._began = 0.0
        self._rate = 0.0  # operations a second of a large product; 0: there is nothing to log

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Measures what a large product reaches here, and finds its place in the Trainer."""
        layers = [m for m in model.modules() if isinstance(m, MoEExperts)] if model is not None else []
        if not layers:
            return
        self._rate = _gemm_rate(layers[0].compute_dtype)
        _come_first(self)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step begins; of accumulated ones the first part."""
        self._step.close()
        if self._rate:
            self._step.enter_context(recording.into(self._since.record))
            self._step.enter_context(recording.into(self._all.record))
            self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step has ended, optimizer included."""
        self._step.close()
        if self._rate:
            for span in (self._since, self._all):
                span.seconds += time.perf_counter() - self._began
                span.steps += 1

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Adds the figures to a line of the training loss."""
        if not self._since.steps or logs is None or "loss" not in logs:
            return
        figures = self._since.figures(self._rate)
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)
        self._since = _Span()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Says where the time went, and what would help."""
        self._step.close()
        if self._all.steps and state.is_local_process_zero:
            tqdm.write(f"ktmoe: {self._all.summary(self._rate)} {_advice(self._all, self._rate)}")  # not into a bar


class _Span:
    """Some steps."""

    def __init__(self) -> None:
        self.record, self.seconds, self.steps = Record(), 0.0, 0

    @property
    def tokens(self) -> int:
        return max(self.record.trained.values(), default=0)

    @property
    def experts(self) -> float:
        """Seconds in experts."""
        return self.record.forward + self.record.recomputed + self.record.backward

    @property
    def rows(self) -> float:
        """Rows of one expert in one step, on average over those that have any."""
        counts = [c[c > 0].float().mean().item() for c in self.record.tokens.values() if c.any()]
        return statistics.fmean(counts) / self.steps if counts else 0.0

    def figures(self, rate: float) -> dict[str, float]:
        r, gflops = self.record, self.record.operations / max(self.experts, 1e-9)
        busiest = [(c.max() / c.float().mean()).item() for c in r.tokens.values() if c.any()]
        found = {
            "tokens_per_second": self.tokens / self.seconds,
            "experts_forward": r.forward / self.steps,
            "experts_recompute": r.recomputed / self.steps,
            "experts_backward": r.backward / self.steps,
            "outside_experts": (self.seconds - self.experts) / self.steps,
            "experts_gflops": gflops / 1e9,
            "experts_of_gemm": gflops / rate,
            "host_memory_gb": psutil.Process().memory_info().rss / _GB,
            "expert_imbalance": statistics.fmean(busiest) if busiest else 0.0,
        }
        without = sum(int((c == 0).sum()) for c in r.tokens.values())
        return {name: float(f"{value:.4g}") for name, value in found.items()} | {"experts_without_tokens": without}

    def summary(self, rate: float) -> str:
        f = self.figures(rate)
        parts = {
            name: self.steps * f[f"experts_{name}"] / self.seconds for name in ("forward", "recompute", "backward")
        }
        shown = ", ".join(f"{name} {part:.0%}" for name, part in parts.items())
        return (
            f"{self.tokens} tokens in {self.steps} steps, {f['tokens_per_second']:.4g} a second. "
            f"{self.experts / self.seconds:.0%} of the time in routed experts ({shown}), at {f['experts_gflops']:.0f} "
            f"GFLOP/s, {f['experts_of_gemm']:.0%} of what a large product reaches here."
        )


def _advice(span: _Span, rate: float) -> str:
    """The one thing that would help most, by what it could win."""
    near = span.record.operations / max(span.experts, 1e-9) / rate
    if span.record.recomputed > 0.1 * span.seconds:
        return (
            "Most to win: kt_cpu_activation: retain (is memory short?), or gradient checkpointing switched off: its "
            "recompute ran the experts again."
        )
    if span.experts < 0.5 * span.seconds:
        return "Most to win: outside of the experts (attention, head, optimizer; a GPU for them, if there is one)."
    if near < 0.5 and span.rows < _FEW_ROWS:
        return (
            f"Most to win: per_device_train_batch_size, or packing: an expert has {span.rows:.0f} tokens a step on "
            "average, too few for large products."
        )
    return "Nothing stands out."


def _gemm_rate(dtype: torch.dtype) -> float:
    """Operations a second of a large product."""
    a = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)).to(dtype)  # not the run's own numbers
    times = []
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2 * 1024**3 / statistics.median(times)


def _come_first(callback: TrainerCallback) -> None:
    """Moves a callback to the front, where the Trainer's own loggers are: they pass on what they find in a line.

    A Trainer hands itself to no callback. Its list of them is that of the CallbackHandler two frames up, which is
    iterating over it: moving the current one to the front leaves out nobody.
    """
    handler = sys._getframe(2).f_locals.get("self")
    if isinstance(handler, CallbackHandler) and callback in handler.callbacks:
        handler.callbacks.remove(callback)
        handler.callbacks.insert(0, callback)
