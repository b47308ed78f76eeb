"""kt_kernel's SFT operators as a backend: the only module that imports kt_kernel and that knows its traps.

The extension takes raw pointers and checks nothing. Facts about it were measured on kt-kernel 0.7.2 (`docs/kernel.md`
lists the traps K1 to K26 by number; the numbers in the comments here refer to that list).
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from ktmoe_reference import LORA_NAMES
from torch import Tensor

from ktmoe.backends.torch import TorchBackend
from ktmoe.interface import STATELESS, Backend
from ktmoe.types import PROJECTIONS, ExpertWeights, Gradients, Inputs, KTError, MoEShape


_CLASSES = {"AMXBF16": "AMXBF16_SFT_MOE", "AMXInt8": "AMXInt8_SFT_MOE"}
_GRANULE = {"AMXBF16": 32, "AMXInt8": 64}  # K2: H and I / TP must be multiples
_MAX_RANK = 128  # the largest rank ever checked against a reference
_MAX_TP = 4  # K17: the merge of five and more parts sums only the first four
_LAYER_IDS = itertools.count(1)  # K10: the extension's owner check is global to the process
_TICKETS = itertools.count(STATELESS + 1)


@functools.cache
def _extension() -> tuple[Any, str]:
    """The extension module and its CPU variant, or None and the reason why there is none."""
    try:
        with _quiet():
            import kt_kernel
        extension = kt_kernel.kt_kernel_ext
        variant = str(kt_kernel.__cpu_variant__)
    except Exception as error:  # a wheel for another CPU or libc fails in many ways: all mean "not here"
        return None, f"kt_kernel cannot be imported ({type(error).__name__}: {error})"
    missing = [name for name in ("MOESFTConfig", *_CLASSES.values()) if not hasattr(extension.moe, name)]
    if missing:
        return None, f"kt_kernel's {variant} variant, the one for this CPU, has no {', '.join(missing)}"
    return extension, variant


def available() -> bool:
    """Whether this CPU and this installation have the SFT classes."""
    return _extension()[0] is not None


def variant() -> str:
    """The CPU variant of the extension (`amx`, `avx512_bf16`), or why there is none."""
    return _extension()[1]


def extension_path() -> Path | None:
    """The extension's file, whose hash a gate certificate names."""
    extension = _extension()[0]
    return Path(extension.__file__) if extension else None


def valid_tp(kind: str, shape: MoEShape, wanted: int) -> int:
    """The largest number of parts up to `wanted` that divides I into granules (K17, K18)."""
    fits = [t for t in range(1, min(wanted, _MAX_TP) + 1) if shape.intermediate_size % (t * _GRANULE[kind]) == 0]
    return max(fits, default=1)


def check_shape(kind: str, shape: MoEShape) -> None:
    """Refuses shapes on which the extension crashes.

    Raises:
        KTError: names the size, what is needed and the remedy.
    """
    granule = _GRANULE[kind]
    for name in ("hidden_size", "intermediate_size"):
        if getattr(shape, name) % granule:
            other = " AMXBF16 needs multiples of 32 only, and" if kind == "AMXInt8" else ""
            raise KTError(
                f"{name}: the model has {getattr(shape, name)}; kt_backend: {kind} needs a multiple of {granule}."
                f"{other} kt_backend: torch takes any size."
            )
    if shape.rank > _MAX_RANK:
        raise KTError(
            f"r (lora_rank): got {shape.rank}; kt_backend: {kind} takes 1 to {_MAX_RANK}. Use a smaller rank or "
            "kt_backend: torch."
        )


class _Host:
    """The process's one pool of kernel threads per (threads, TP). Tasks run one at a time."""

    _hosts: ClassVar[dict[tuple[int, int], _Host]] = {}

    def __init__(self, threads: int, tp: int) -> None:
        self.extension, why = _extension()
        if self.extension is None:
            raise KTError(f"kt_backend: {why}. Use kt_backend: torch or auto.")
        nodes = numa_nodes()
        pool = self.extension.WorkerPoolConfig()
        pool.subpool_count = tp
        pool.subpool_numa_map = [nodes[t % len(nodes)] for t in range(tp)]
        pool.subpool_thread_count = [max(1, threads // tp + (t < threads % tp)) for t in range(tp)]
        self.tp = tp
        self.pid = os.getpid()
        self.lock = threading.RLock()
        with _quiet():
            self.infer = self.extension.CPUInfer(pool)
        # Never destroyed: its destructor prints to stdout at interpreter exit, when nobody can redirect it any more.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.infer))

    @classmethod
    def get(cls, threads: int, tp: int) -> _Host:
        key = (threads, tp)
        host = cls._hosts.get(key)
        if host is None or host.pid != os.getpid():
            host = cls._hosts[key] = cls(threads, tp)
        return host

    def run(self, task: tuple[int, int]) -> None:
        self.infer.submit(task)
        self.infer.sync()


class KernelBackend(Backend):
    """One layer's experts packed into the kernel's own buffers.

    The kernel keeps the activations of exactly one saving forward (K8: its cache is one deep whatever its name says),
    so a ticket numbers the content of that cache, and a backward whose ticket is not there any more runs its forward
    again.
    """

    compute_dtype = torch.bfloat16

    def __init__(
        self,
        kind: str,
        weights: ExpertWeights,
        shape: MoEShape,
        *,
        scaling: float = 1.0,
        threads: int = 1,
        tp: int = 1,
        max_len: int = 4096,
        share_backward: bool = True,
    ) -> None:
        """Packs the weights.

        Args:
            kind: AMXBF16, or AMXInt8 (quantised from the bf16 weights here).
            weights: stays the source of the exact recompute of tokens that the kernel cannot do.
            shape: what to build for.
            scaling: alpha / r of the LoRA that is usual; a call with another one is rescaled.
            threads: of all pools together.
            tp: parts of the intermediate dimension, each in a pool of its own.
            max_len: tokens per kernel call, rounded up to 32; longer calls run in chunks (K1).
            share_backward: one repacked weight buffer for all layers instead of one each.

        Raises:
            KTError: no SFT classes on this host, or a shape that they cannot take.
        """
        check_shape(kind, shape)
        if valid_tp(kind, shape, tp) != tp:
            raise KTError(f"tensor parallelism: {tp} parts do not divide I = {shape.intermediate_size} for {kind}.")
        self.name, self.shape, self.weights, self.scaling = kind, shape, weights, scaling
        self.max_len = -(-max_len // 32) * 32
        self._host = _Host.get(threads, tp)
        self._exact = TorchBackend(weights, shape, torch.float32)
        # K11: gate_A and up_A are read live at every call, so these copies live as long as the kernel object.
        self._lora = [torch.zeros(s, dtype=torch.bfloat16) for s in shape.lora_shapes().values()]
        self._cached = STATELESS  # the ticket whose activations the kernel holds
        self._moe = self._build(share_backward)

    def _build(self, share_backward: bool) -> Any:
        extension, s = self._host.extension, self.shape
        c = extension.moe.MOESFTConfig(s.num_experts, s.top_k, s.hidden_size, s.intermediate_size)
        c.layer_idx = next(_LAYER_IDS)
        c.pool = self._host.infer.backend_
        c.max_len = self.max_len
        c.lora_rank = s.rank
        c.lora_alpha = float(self.scaling * s.rank)
        c.lora_dropout = 0.0  # K21: its masks differ between forward and recompute, and apply in evaluation
        c.max_cache_depth = 1  # K8
        c.share_cache_pool = False  # K9
        c.share_backward_bb = share_backward
        c.authoritative_optimizer_grads = True  # K12: every gradient is overwritten, inactive experts with zero
        # The packed buffers are copies, so the contiguous bf16 form of the source lives only until load_weights ends.
        packed = {p: _contiguous(getattr(self.weights, p)) for p in PROJECTIONS}
        for p, tensor in packed.items():
            setattr(c, p, tensor.data_ptr())
        for field, tensor in zip(_LORA_FIELDS, self._lora, strict=True):
            setattr(c, field, tensor.data_ptr())
        with self._host.lock, _quiet():
            moe = getattr(extension.moe, _CLASSES[self.name])(c)
            self._host.run(moe.load_weights_task())
        return moe

    def forward(self, inputs: Inputs, *, save: bool) -> tuple[Tensor, int]:
        """See `Backend.forward`."""
        with self._running():
            self._refresh(inputs)
            rows = inputs.hidden_states.shape[0]
            if rows <= self.max_len:
                out = self._forward(inputs, save)
                return out, self._cached if save else STATELESS
            return torch.cat([self._forward(chunk, False) for chunk in self._chunks(inputs)]), STATELESS

    def backward(self, ticket: int, inputs: Inputs, grad_output: Tensor) -> Gradients:
        """See `Backend.backward`."""
        with self._running():
            self._refresh(inputs)
            grads = self._backward(ticket, inputs, grad_output)
            # K15, K16: a gate activation below -88.5 or a NaN leaves its row of grad_input NaN, and the LoRA gradients
            # silently wrong but finite. Such tokens are computed in fp32 from the source, the others without them.
            sound = (
                grads.hidden_states.isfinite().all(-1)
                & inputs.hidden_states.isfinite().all(-1)
                & grad_output.isfinite().all(-1)
                & inputs.top_k_weights.isfinite().all(-1)
            )
            if sound.all():
                return grads
            good, bad = sound.nonzero().squeeze(-1), (~sound).nonzero().squeeze(-1)
            grads = Gradients(grads.hidden_states, grads.top_k_weights, None)
            rest = self._backward(STATELESS, inputs.rows(good), grad_output[good].contiguous())
            grads.merge_rows(good, rest)
            grads.lora = rest.lora
            grads.merge_rows(bad, self._exact_backward(inputs.rows(bad), grad_output[bad]))
            return grads

    def close(self) -> None:
        """Drops the kernel object. K22: the extension leaks its packed weights; only the process's end frees them."""
        with self._host.lock, _quiet():
            self._moe = None

    def _exact_backward(self, inputs: Inputs, grad_output: Tensor) -> Gradients:
        x = inputs.hidden_states.float()
        exact = Inputs(x, inputs.top_k_index, inputs.top_k_weights, inputs.lora)
        grads = self._exact.backward(STATELESS, exact, grad_output.float())
        return Gradients(grads.hidden_states.to(self.compute_dtype), grads.top_k_weights, grads.lora)

    @contextmanager
    def _running(self) -> Iterator[None]:
        if os.getpid() != self._host.pid:
            raise KTError(
                "The routed experts were called in a forked process; the kernel's threads live in the parent only. "
                "Use dataloader workers for data alone, or start processes with the 'spawn' method."
            )
        if self._moe is None:
            raise KTError("This backend was closed.")
        with self._host.lock:  # the task queue takes one caller at a time (K26), and the cache belongs to one call
            yield

    def _refresh(self, inputs: Inputs) -> None:
        """Copies the LoRA tensors into the kernel's bf16 form. At every call: optimizers need not tell (K11)."""
        for i, mine in enumerate(self._lora):
            if inputs.lora is None:
                mine.zero_()
                continue
            theirs = inputs.lora.tensors[LORA_NAMES[i]].detach()
            r = inputs.lora.rank
            is_b = LORA_NAMES[i].endswith("lora_B")
            if is_b and inputs.lora.scaling != self.scaling:
                theirs = theirs * (inputs.lora.scaling / self.scaling)
            if r == self.shape.rank:
                mine.copy_(theirs)
            else:  # a smaller rank: the rest is zero
                mine.zero_()
                (mine[..., :r] if is_b else mine[:, :r]).copy_(theirs)
        self._host.run(self._moe.update_lora_weights_task(*(t.data_ptr() for t in self._lora)))

    def _chunks(self, inputs: Inputs) -> Iterator[Inputs]:
        for start in range(0, inputs.hidden_states.shape[0], self.max_len):
            yield inputs.rows(slice(start, start + self.max_len))

    def _forward(self, inputs: Inputs, save: bool) -> Tensor:
        x, index, weights = inputs.hidden_states, inputs.top_k_index, inputs.top_k_weights
        assert x.is_contiguous() and index.is_contiguous() and weights.is_contiguous()  # noqa: PT018  (K3)
        out = torch.empty_like(x)  # [T, H]
        length = torch.tensor([x.shape[0]], dtype=torch.int32)  # read when the task runs: alive until sync
        if x.shape[0]:
            pointers = (index.data_ptr(), weights.data_ptr(), x.data_ptr(), out.data_ptr())
            self._host.run(self._moe.forward_sft_task(length.data_ptr(), self.shape.top_k, *pointers, save))
        # A forward that saves nothing spoils the activations too: 39 % off in grad_input after an evaluation of fewer
        # tokens, and the LoRA gradients wrong if it ran with another LoRA. Any forward ends the older ticket.
        self._cached = next(_TICKETS) if save else STATELESS
        return out

    def _backward(self, ticket: int, inputs: Inputs, grad_output: Tensor) -> Gradients:
        """Backward of all rows, in chunks; LoRA gradients leave the kernel in bf16 and add up in fp32 (K13)."""
        grad_x = torch.empty_like(inputs.hidden_states)  # [T, H]
        grad_w = torch.empty_like(inputs.top_k_weights)  # [T, K]
        total: list[Tensor] | None = None
        start = 0
        for chunk in self._chunks(inputs):
            rows = slice(start, start + chunk.hidden_states.shape[0])
            start = rows.stop
            # K6, K7: the rows of the cached forward are those of this call, or the forward is run again.
            if ticket == STATELESS or ticket != self._cached:
                self._forward(chunk, True)
            # K14: never null, even without LoRA. K28: zeroed here; at an address that it was given before, the kernel
            # takes the rows of idle experts for zero and leaves them as they are.
            grads = [torch.zeros_like(t) for t in self._lora]
            pointers = [t.data_ptr() for t in (grad_output[rows], grad_x[rows], *grads, grad_w[rows])]
            self._host.run(self._moe.backward_task(*pointers, 0, 0, 0, False, 1.0))
            self._cached = STATELESS  # the backward takes the activations off the cache
            if inputs.lora is not None:
                parts = [g.float() for g in grads]
                total = parts if total is None else [t.add_(p) for t, p in zip(total, parts, strict=True)]
        return Gradients(grad_x, grad_w, self._unpad(total, inputs))

    def _unpad(self, total: list[Tensor] | None, inputs: Inputs) -> list[Tensor] | None:
        """Takes the rank's padding off, and the chain rule through a rescaled B."""
        if inputs.lora is None:
            return None
        r, ratio = inputs.lora.rank, inputs.lora.scaling / self.scaling
        shapes = self.shape.lora_shapes()
        total = total or [torch.zeros(s) for s in shapes.values()]  # no token at all
        return [
            (t[..., :r] * ratio).contiguous() if name.endswith("lora_B") else t[:, :r].contiguous()
            for name, t in zip(shapes, total, strict=True)
        ]


_LORA_FIELDS = ("gate_lora_a", "gate_lora_b", "up_lora_a", "up_lora_b", "down_lora_a", "down_lora_b")


def _contiguous(stack: Any) -> Tensor:
    """[E, ...] bf16, contiguous (K3, K25): the held tensor itself where it is that already."""
    if isinstance(stack, Tensor):
        return stack.detach().to("cpu", torch.bfloat16).contiguous()
    return torch.stack([w.detach().to("cpu", torch.bfloat16) for w in stack])


def numa_nodes() -> list[int]:
    """Ids of the NUMA nodes that have memory, [0] where the system does not say."""
    names = sorted(Path("/sys/devices/system/node").glob("node[0-9]*"))
    return sorted(int(n.name.removeprefix("node")) for n in names) or [0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the extension's own printing off the user's stdout: it writes to file descriptor 1 from C++."""
    libc = ctypes.CDLL(None)
    sys.stdout.flush()
    libc.fflush(None)
    try:
        saved = os.dup(1)
    except OSError:  # no stdout at all: nothing to keep clean
        yield
        return
    devnull = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(devnull, 1)
        yield
    finally:
        libc.fflush(None)
        os.dup2(saved, 1)
        os.close(saved)
        os.close(devnull)
