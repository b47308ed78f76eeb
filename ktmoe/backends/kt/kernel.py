"""kt_kernel's SFT operators as a backend: the module that knows their traps.

The extension takes raw pointers and checks nothing. Facts about it were measured on kt-kernel 0.7.2 (`docs/kernel.md`
lists the traps K1 to K34 by number; the numbers in the comments here refer to that list).
"""

from __future__ import annotations

import functools
import itertools
import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ktmoe.backends.kt import lora, sizes
from ktmoe.backends.kt.emptying import make_room
from ktmoe.backends.kt.extension import Host, quiet, version
from ktmoe.backends.kt.formats import FORMATS, ones
from ktmoe.backends.kt.objects import KernelObject, contiguous, create
from ktmoe.backends.kt.packed import PackedLayer
from ktmoe.backends.kt.staging import staging
from ktmoe.backends.torch import TorchBackend
from ktmoe.interface import STATELESS, Backend, Int8
from ktmoe.types import PROJECTIONS, ExpertWeights, Gradients, Inputs, KTError, MoEShape


_TICKETS = itertools.count(STATELESS + 1)


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
        nodes: Sequence[int] = (),
        max_len: int = 4096,
        share_backward: bool = True,
        packed: PackedLayer | None = None,
        torch_threads: int = 1,
    ) -> None:
        """Packs the weights, or loads them packed.

        Args:
            kind: AMXBF16, AMXInt8 (quantised from the bf16 weights here, or loaded quantised), AMXFP8 or AMXInt4
                (of weights that are stored so).
            weights: stays the source of the exact recompute of tokens that the kernel cannot do.
            shape: what to build for.
            scaling: alpha / r of the LoRA that is usual; a call with another one is rescaled.
            threads: of all pools together.
            tp: parts of the intermediate dimension, each in a pool of its own.
            nodes: ids of the NUMA nodes that the pools are on, in turn; by default those of the process's mask.
            max_len: tokens per kernel call, rounded up to 32; longer calls run in chunks (K1).
            share_backward: one repacked weight buffer for all layers instead of one each.
            packed: these weights as AMXInt8 on disk. A backward copy of the layer's own is still made from `weights`.
            torch_threads: for what torch copies and looks at here. The kernel's threads spin on their cores for 50 ms
                after a task, and those of torch would wait for such a core for a scheduler's tick or more.

        Raises:
            KTError: no SFT classes on this host, a shape that they cannot take, or packed weights that are damaged or
                of another layer.
        """
        sizes.check_shape(kind, shape)
        sizes.check_tp(kind, shape, tp)
        if packed is not None:
            assert kind == "AMXInt8"
            packed.check(shape, tp, version())
        self.name, self.shape, self.weights, self.scaling = kind, shape, weights, scaling
        self.threads = torch_threads
        self.max_len = -(-max_len // 32) * 32
        self.int8 = Int8(requantised=share_backward, tp=tp) if kind == "AMXInt8" else None
        self._host = Host.get(threads, tp, nodes)
        self._cached = STATELESS  # the ticket whose activations the kernel holds
        self._disk = packed
        made = self._pack(share_backward)
        self._made: KernelObject | None = made
        self.scaling = made.scaling  # that an object that was there already was built for; so is its rank
        # K22: also when nobody calls `close`. INT8 with a backward copy of its own is the one that cannot be reloaded.
        reloadable = share_backward or FORMATS[kind].reloads_own_backward
        idle = self._host.idle[self._key(share_backward)] if reloadable else self._host.condemned
        self._release = weakref.finalize(self, idle.append, made)
        self._release.atexit = False

    def _key(self, share_backward: bool) -> tuple[Any, ...]:
        return self.name, replace(self.shape, rank=1), share_backward, self._disk is not None

    def _pack(self, share_backward: bool) -> KernelObject:
        """Loads the weights into a kernel object: that of a layer that is gone, or a new one."""
        idle = self._host.idle[self._key(share_backward)]
        fits = [made for made in idle if made.serves(self.shape, self.max_len)]
        closest = min(fits, key=lambda m: (m.shape.rank, m.scaling != self.scaling, m.max_len), default=None)
        self.reloaded = closest is not None
        with self._host.lock, ExitStack() as held:
            if closest is None or closest.empty:
                with quiet():
                    make_room()
            sources = self._sources(share_backward, held)
            held.enter_context(quiet())
            packed = closest or self._create(share_backward, sources)
            self._copy_scales(packed)
            packed.load([sources[p] for p in PROJECTIONS] if self.reloaded and self._disk is None else None)
            if self.reloaded:
                idle.remove(packed)
                if share_backward:
                    self._take_backward_buffer_over()
        return packed

    def _copy_scales(self, made: KernelObject) -> None:
        """To where the object was built to read them, for this load as for the first (K34)."""
        for projection, scales in zip(PROJECTIONS, made.scales, strict=False):
            for mine, theirs in zip(scales, getattr(self.weights, projection).scales, strict=True):
                mine.copy_(theirs)

    def _sources(self, share_backward: bool, held: ExitStack) -> dict[str, Any]:
        """What the kernel loads from: settings that point to memory of one layer, which lives as long as `held`.

        The kernel's own buffers are copies of it.
        """
        sources: dict[str, Any] = {}
        if self._disk is not None:
            d, tp = self._disk, self._host.tp
            stage = staging(d.num_experts, d.hidden_size, d.intermediate_size, tp, d.size)
            held.enter_context(stage.holding(d))
            sources |= stage.pointers(d)
        if self._disk is None or not share_backward:  # a backward copy of its own is quantised from the transpose
            stacks = {p: getattr(self.weights, p) for p in PROJECTIONS}
            kind = FORMATS[self.name]
            tensors = {p: contiguous(s.matrices if kind.stored else s, kind.dtype) for p, s in stacks.items()}
            held.callback(tensors.clear)
            sources |= {p: t.data_ptr() for p, t in tensors.items()}
        return sources

    def _create(self, share_backward: bool, sources: dict[str, Any]) -> KernelObject:
        shape = replace(self.shape, rank=FORMATS[self.name].rank or self.shape.rank)
        return create(self.name, self._host, shape, self.max_len, self.scaling, share_backward, sources)

    def forward(self, inputs: Inputs, *, save: bool) -> tuple[Tensor, int]:
        """See `Backend.forward`."""
        with self._running():
            self._refresh(inputs)
            if len(inputs.hidden_states) <= self.max_len:
                out = self._forward(inputs, save)
                return out, self._cached if save else STATELESS
            return torch.cat([self._forward(chunk, False) for chunk in self._chunks(inputs)]), STATELESS

    def backward(self, ticket: int, inputs: Inputs, grad_output: Tensor) -> Gradients:
        """See `Backend.backward`."""
        with self._running():
            # The LoRA of cached activations is the kernel's own copy of it, as it was in their forward.
            if ticket == STATELESS or ticket != self._cached:
                self._refresh(inputs)
            grads = self._backward(ticket, inputs, grad_output)
            sound = _sound_rows(inputs, grad_output, grads)
            if sound.all():
                return grads
            # Those tokens are computed in fp32 from the source weights, and the others again without them.
            good, bad = sound.nonzero().squeeze(-1), (~sound).nonzero().squeeze(-1)
            grads = Gradients(grads.hidden_states, grads.top_k_weights, None)
            self._refresh(inputs)
            rest = self._backward(STATELESS, inputs.rows(good), grad_output[good].contiguous())
            grads.merge_rows(good, rest)
            grads.lora = rest.lora
            grads.merge_rows(bad, self._exact_backward(inputs.rows(bad), grad_output[bad]))
            return grads

    def holds(self, ticket: int) -> bool:
        """See `Backend.holds`. A ticket of a call in chunks numbers nothing: its backward runs every chunk anyway."""
        return ticket in (STATELESS, self._cached)

    def close(self) -> None:
        """Gives the kernel object to the next layer of the same kind: destroyed, it would leak its weights (K22)."""
        if os.getpid() != self._host.pid:  # a forked child has a copy of an object that only its parent can use
            return
        with self._host.lock:
            self._made = None
            self._release()

    def condemn(self) -> None:
        """As `close`, for an object that computed something wrong: it is kept, since it would leak, and never used."""
        with self._host.lock:
            if held := self._release.detach():
                self._host.condemned += held[2]  # the object, which it would have been given on
            self._made = None

    def _take_backward_buffer_over(self) -> None:
        """K23: if a reloaded object was the last to fill the shared backward buffer, its old weights are in there."""
        other = _smallest_layer(self.name, self._host)
        one = Inputs(
            torch.ones(1, other.shape.hidden_size, dtype=torch.bfloat16),
            torch.zeros(1, 1, dtype=torch.int64),
            torch.ones(1, 1, dtype=torch.float32),
            None,
        )
        other.backward(STATELESS, one, one.hidden_states)

    def __reduce__(self) -> Any:
        """Refuses to be copied or pickled: the weights are in the kernel's own memory."""
        raise KTError(
            "Routed experts that run on the kernel can be neither copied nor pickled. Save the adapter instead, or "
            "detach the model first (ktmoe.detach)."
        )

    def _exact_backward(self, inputs: Inputs, grad_output: Tensor) -> Gradients:
        exact = Inputs(inputs.hidden_states.float(), inputs.top_k_index, inputs.top_k_weights, inputs.lora)
        # Made for the call: its workspaces are two experts in fp32, and go with it.
        with closing(TorchBackend(self.weights, self.shape, torch.float32)) as backend:
            grads = backend.backward(STATELESS, exact, grad_output.float())
        return Gradients(grads.hidden_states.to(self.compute_dtype), grads.top_k_weights, grads.lora)

    @contextmanager
    def _running(self) -> Iterator[None]:
        if os.getpid() != self._host.pid:
            raise KTError(
                "The routed experts were called in a forked process; the kernel's threads live in the parent only. "
                "Use dataloader workers for data alone, or start processes with the 'spawn' method."
            )
        with self._host.lock:  # the task queue takes one caller at a time (K26), and the cache belongs to one call
            if self._made is None:
                raise KTError(
                    "These experts were closed, or their model detached, and cannot compute any more. Run every "
                    "backward before that."
                )
            yield

    @property
    def built_for(self) -> MoEShape:
        """See `Backend.built_for`."""
        return self._object.shape

    @property
    def _object(self) -> KernelObject:
        assert self._made is not None  # `_running` has looked
        return self._made

    def _refresh(self, inputs: Inputs) -> None:
        """Copies the LoRA into the kernel's bf16 form. At every forward: optimizers need not tell (K11)."""
        self._cached = STATELESS  # whose activations are another LoRA's
        lora.fill(self._object.lora, inputs.lora, self.scaling)
        self._object.refresh_lora()

    def _chunks(self, inputs: Inputs) -> Iterator[Inputs]:
        for start in range(0, inputs.hidden_states.shape[0], self.max_len):
            yield inputs.rows(slice(start, start + self.max_len))

    def _forward(self, inputs: Inputs, save: bool) -> Tensor:
        x, index, weights = inputs.hidden_states, inputs.top_k_index, inputs.top_k_weights
        assert x.is_contiguous() and index.is_contiguous() and weights.is_contiguous()  # noqa: PT018  (K3)
        out = torch.empty_like(x)  # [T, H]
        if len(x):
            self._object.forward(x, index, weights, out, save)
        # A forward that saves nothing spoils the activations too: 39 % off in grad_input after an evaluation of fewer
        # tokens, and the LoRA gradients wrong if it ran with another LoRA. Any forward ends the older ticket.
        self._cached = next(_TICKETS) if save else STATELESS
        return out

    def _backward(self, ticket: int, inputs: Inputs, grad_output: Tensor) -> Gradients:
        """Backward of all rows, in chunks; LoRA gradients leave the kernel in bf16 and add up in fp32 (K13)."""
        grad_x = torch.empty_like(inputs.hidden_states)  # [T, H]
        grad_w = torch.empty_like(inputs.top_k_weights)  # [T, K]
        buffers = lora.gradient_buffers(self._object.shape)  # K14: never null, even without LoRA
        total: list[Tensor] | None = None
        start = 0
        for chunk in self._chunks(inputs):
            rows = slice(start, start := start + len(chunk.hidden_states))
            # K6, K7: the rows of the cached forward are those of this call, or the forward is run again.
            if ticket == STATELESS or ticket != self._cached:
                self._forward(chunk, True)
            lora.clear(buffers)
            self._cached = STATELESS  # the backward takes the activations off the cache, even if Ctrl-C comes
            self._object.backward(grad_output[rows], grad_x[rows], buffers, grad_w[rows])
            if inputs.lora is not None:
                parts = lora.take(buffers, inputs.lora, self.scaling)
                total = parts if total is None else [t.add_(p) for t, p in zip(total, parts, strict=True)]
        if inputs.lora is not None and total is None:  # no token at all
            total = [torch.zeros(s) for s in self.shape.lora_shapes(inputs.lora.rank).values()]
        return Gradients(grad_x, grad_w, total)


def _sound_rows(inputs: Inputs, grad_output: Tensor, grads: Gradients) -> Tensor:
    """[T] bool: the tokens that the kernel's backward is right for.

    K15, K16: a gate activation of -88.5 or less, or a NaN, leaves the token's row of grad_input NaN, and the LoRA
    gradients silently wrong but finite.
    """
    rows = [_finite_rows(t) for t in (grads.hidden_states, inputs.hidden_states, grad_output)]
    return rows[0] & rows[1] & rows[2] & inputs.top_k_weights.isfinite().all(-1)


def _finite_rows(rows: Tensor) -> Tensor:
    """[T] bool, of bf16 [T, H], by the bits of the exponent: ten times as fast as `isfinite` is in bf16."""
    return (rows.view(torch.int16) & 0x7FFF).amax(-1) < 0x7F80


@functools.cache
def _smallest_layer(kind: str, host: Host) -> KernelBackend:
    """A layer whose backward makes the shared backward buffer its own."""
    weights = ones(kind, host.tp)
    shape = MoEShape(weights.num_experts, weights.hidden_size, weights.intermediate_size, 1, 1)
    return KernelBackend(kind, weights, shape, threads=host.threads, tp=host.tp, nodes=host.nodes, max_len=32)
