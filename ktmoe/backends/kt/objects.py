"""Objects of the extension: how each one is set up, and the tensors that it points to."""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ktmoe.backends.kt.extension import Host
from ktmoe.backends.kt.formats import FORMATS
from ktmoe.backends.kt.lora import gradient_buffers
from ktmoe.backends.kt.sizes import packed_bytes
from ktmoe.types import PROJECTIONS, KTError, MoEShape


_LAYER_IDS = itertools.count(1)  # K10: the extension's owner check is global to the process
# The same for every object. The expert map (K20) and the experts on a GPU (K19) are never set.
_SETTINGS = {
    "lora_dropout": 0.0,  # K21: its masks differ between forward and recompute, and apply in evaluation
    "share_cache_pool": False,  # K9
    "authoritative_optimizer_grads": True,  # K12: every gradient is overwritten, inactive experts with zero
}
_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # takes no memory until it is written
_LIVE = ("gate_proj.lora_A", "up_proj.lora_A")  # LoRA that a backward reads again (K11)
_LORA_FIELDS = ("gate_lora_a", "gate_lora_b", "up_lora_a", "up_lora_b", "down_lora_a", "down_lora_b")


@dataclass(eq=False)
class KernelObject:
    """A kernel object with weights in its own buffers, and the LoRA tensors that it points to.

    K11, K34: addresses that it was built with are read as long as it lives, those of LoRA at every call and those of
    block scales at every load. What is always written just before it is read is one memory for all objects of a host.
    """

    moe: Any
    host: Host
    lora: list[Tensor]
    scales: tuple[Tensor, ...]  # of gate, up and down, for a load; those of all objects of these sizes
    shape: MoEShape
    scaling: float
    max_len: int
    nbytes: int  # of its packed weights
    from_disk: bool
    cache_depth: int
    empty: bool = True
    waiting: int = 0  # tokens of a saving forward whose backward has not come
    lost: int = 0  # calls that were interrupted: what they saved may lie in the cache for ever
    rows: int = 0  # the most tokens of a call so far: its activations have memory for as many

    def load(self, pointers: Sequence[int] | None) -> None:
        """Packs weights. The caller holds the host's lock, and has filled `scales`, or what is read from disk.

        Args:
            pointers: to gate, up and down, [E, out, in] as the format has them; None: what it was built with.
        """
        if pointers is not None:
            with self.host.awake():
                self.moe.set_base_weight_pointers(*pointers)
        self.host.run(self.moe.load_weights_task())
        self.empty = False

    def refresh_lora(self) -> None:
        """Has the kernel read `lora` (K11). The caller holds the host's lock."""
        self.host.run(self.moe.update_lora_weights_task(*(t.data_ptr() for t in self.lora)))

    def forward(self, x: Tensor, index: Tensor, weights: Tensor, out: Tensor, save: bool) -> None:
        """Into `out`, from contiguous tensors (K3). The caller holds the host's lock."""
        self.rows = max(self.rows, len(x))
        if save and self.cache_depth > 1:
            self._take_off_waiting()
        length = torch.tensor([len(x)], dtype=torch.int32)  # read when the task runs: alive until its end
        pointers = (index.data_ptr(), weights.data_ptr(), x.data_ptr(), out.data_ptr())
        self._run(self.moe.forward_sft_task(length.data_ptr(), self.shape.top_k, *pointers, save))
        self.waiting = len(x) if save else self.waiting

    def backward(self, grad_output: Tensor, grad_x: Tensor, lora: Sequence[Tensor], grad_weights: Tensor) -> None:
        """Of the last saving forward, into the others. The caller holds the host's lock."""
        self.waiting = 0
        pointers = [t.data_ptr() for t in (grad_output, grad_x, *lora, grad_weights)]
        self._run(self.moe.backward_task(*pointers, 0, 0, 0, False, 1.0))

    def _run(self, task: tuple[int, int]) -> None:
        """Ctrl-C may come before the task or after it, and nobody can tell."""
        self.lost += 1
        self.host.run(task)
        self.lost -= 1

    def _take_off_waiting(self) -> None:
        """K32: a backward that nobody looks at takes the activations of an abandoned forward off the cache."""
        if self.lost > self.cache_depth - 4:
            raise KTError(f"The routed experts were interrupted {self.lost} times. Start a new process.")
        if self.waiting:
            grad, nowhere = torch.zeros(2, self.waiting, self.shape.hidden_size, dtype=torch.bfloat16)
            weights = torch.empty(self.waiting, self.shape.top_k)
            self.backward(grad, nowhere, gradient_buffers(self.shape), weights)

    def clear(self) -> None:
        """Zeros in all its buffers: weights, LoRA, and the activations of as many tokens as it ever had.

        What an object loads from disk comes through memory that reads as zeros by now.
        """
        s = self.shape
        with mmap.mmap(-1, 2 * s.num_experts * s.hidden_size * s.intermediate_size, flags=_PRIVATE) as zeros:
            held = ctypes.c_char.from_buffer(zeros)
            for scales in self.scales:
                scales.zero_()
            self.load(None if self.from_disk else [ctypes.addressof(held)] * 3)
            del held
        for tensor in self.lora:
            tensor.zero_()
        self.refresh_lora()
        if self.rows:
            x, out = torch.zeros(2, self.rows, s.hidden_size, dtype=torch.bfloat16)
            index = torch.arange(self.rows * s.top_k).remainder_(s.num_experts).view(-1, s.top_k)
            weights = torch.zeros(index.shape)
            self.forward(x, index, weights, out, save=True)
            self.backward(x, out, gradient_buffers(s), weights.clone())
        self.empty = True

    def serves(self, shape: MoEShape, max_len: int) -> bool:
        """Whether another layer of these sizes can have it: a smaller rank is padded, fewer tokens fit."""
        return (
            replace(self.shape, rank=shape.rank) == shape and self.shape.rank >= shape.rank and self.max_len >= max_len
        )


def create(
    kind: str,
    host: Host,
    shape: MoEShape,
    max_len: int,
    scaling: float,
    share_backward: bool,
    sources: dict[str, Any],
) -> KernelObject:
    """A kernel object with nothing loaded. The caller holds the host's lock.

    Args:
        kind: one of `FORMATS`.
        host: whose threads it computes with.
        shape: what to build for.
        max_len: tokens per call, a multiple of 32.
        scaling: alpha / r.
        share_backward: one repacked weight buffer for all layers instead of one each.
        sources: settings that say where its weights come from, or go to.
    """
    lora = [_lora_tensor(host, name, size) for name, size in shape.lora_shapes().items()]
    moe = host.extension.moe
    c = moe.MOESFTConfig(shape.num_experts, shape.top_k, shape.hidden_size, shape.intermediate_size)
    c.layer_idx = next(_LAYER_IDS)
    c.pool = host.infer.backend_
    c.max_len = max_len
    c.lora_rank = shape.rank
    c.lora_alpha = float(scaling * shape.rank)
    c.share_backward_bb = share_backward
    c.max_cache_depth = FORMATS[kind].cache_depth  # K8, K32
    fields = dict(zip(_LORA_FIELDS, (t.data_ptr() for t in lora), strict=True))
    scales = _scales(kind, host, shape.num_experts, shape.hidden_size, shape.intermediate_size)
    fields |= {f"{p.removesuffix('_proj')}_scale": t.data_ptr() for p, t in zip(PROJECTIONS, scales, strict=False)}
    for name, value in (_SETTINGS | sources | fields).items():
        setattr(c, name, value)
    for name, value in FORMATS[kind].quantisation.items():
        setattr(c.quant_config, name, value)
    nbytes = packed_bytes(kind, shape) * (1 if share_backward else 2)
    with host.awake():
        made = getattr(moe, FORMATS[kind].extension_class)(c)
    from_disk, depth = "gate_projs" in sources, FORMATS[kind].cache_depth
    return KernelObject(made, host, lora, scales, shape, scaling, max_len, nbytes, from_disk, depth)


def _lora_tensor(host: Host, name: str, size: tuple[int, ...]) -> Tensor:
    """Zeros: memory of the object's own where a backward reads it, which may come long after the forward."""
    if name in _LIVE:
        return torch.zeros(size, dtype=torch.bfloat16)
    return _shared_lora_tensor(host, name, size)


@functools.cache
def _shared_lora_tensor(host: Host, name: str, size: tuple[int, ...]) -> Tensor:
    """down_B is read by the forward that follows a refresh, the other three by the refresh alone (measured)."""
    return torch.zeros(size, dtype=torch.bfloat16)


@functools.cache
def _scales(kind: str, host: Host, e: int, h: int, i: int) -> tuple[Tensor, ...]:
    """Memory for the block scales of gate, up and down: [E, out / rows, in / columns] each.

    The extension copies them when it loads, one object at a time on a host: one memory is enough for all. INT4's are
    an eighth of what its layers take.
    """
    if (block := FORMATS[kind].scale_block) is None:
        return ()
    sizes = ((e, n // block[0], m // block[1]) for n, m in ((i, h), (i, h), (h, i)))
    return tuple(torch.ones(size, dtype=FORMATS[kind].scale_dtype) for size in sizes)


def contiguous(stack: Any, dtype: torch.dtype) -> Tensor:
    """[E, ...] of a dtype, contiguous (K3, K25): the held tensor itself where it is that already.

    A copy is a mapping of its own. In malloc's heap the holes that the copies leave between the packed layers add up:
    a third of the experts' size in BF16, more in INT8.
    """
    if isinstance(stack, Tensor):
        held = stack.detach()
        if held.dtype == dtype and held.device.type == "cpu" and held.is_contiguous() and not held.is_neg():
            return held
    shape = (len(stack), *stack[0].shape)
    memory = mmap.mmap(-1, dtype.itemsize * math.prod(shape))
    copy = torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)
    for e, matrix in enumerate(stack):
        copy[e].copy_(matrix.detach())
    return copy
