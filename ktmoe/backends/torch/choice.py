"""How the torch backend computes on this host: in which dtype, and with how many copies of the weights."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable

import torch

from ktmoe import memory
from ktmoe.backends.torch.backend import TorchBackend
from ktmoe.backends.torch.products import FromSource, Packed, Products
from ktmoe.kept import cpu_model, host, read, write
from ktmoe.notices import say_once
from ktmoe.types import ExpertWeights, MoEShape, device_of


_COPIES = {"both": 2.0, "forward": 1.0, "off": 0.0}  # of the weights in bf16
_RESERVE = 0.25  # of the memory: what `auto` leaves free for activations and everything else
_MARGIN = 1.1  # bf16 takes half the memory: fp32 has to be clearly faster
_ROWS = 64  # of a usual product


def build(weights: ExpertWeights, shape: MoEShape, packing: str = "auto") -> TorchBackend:
    """A backend that trains fast on this host. What was chosen and what it costs is said once.

    Args:
        weights: frozen; stay the caller's, and are read at every step unless both copies are made.
        shape: what to build for.
        packing: `kt_torch_packing`.
    """
    if device_of(weights.gate_proj).type != "cpu":
        return TorchBackend(weights, shape)
    size = weights.num_experts * 3 * shape.hidden_size * shape.intermediate_size * torch.bfloat16.itemsize
    if why_not := why_not_bf16(packed=packing != "off"):
        unused = f" kt_torch_packing: {packing} is of no use here." if packing in ("both", "forward") else ""
        say_once(f"ktmoe: torch computes the routed experts in float32, cast expert by expert: {why_not}.{unused}")
        return TorchBackend(weights, shape, torch.float32)
    if packing == "auto":
        packing = _affordable(size)
    if packing == "off":
        say_once("ktmoe: torch computes the routed experts in bfloat16, straight from the weights (no copy).")
        return TorchBackend(weights, shape)
    what = "forward and backward" if packing == "both" else "the forward"
    say_once(
        f"ktmoe: torch computes the routed experts in bfloat16; oneDNN packs their weights for {what}, "
        f"{_COPIES[packing]} x their size ({_COPIES[packing] * size / 2**30:.2f} GiB a layer; kt_torch_packing)."
    )
    return TorchBackend(weights, shape, products=Packed(weights, _ROWS, packing == "both"))


def call_bytes(shape: MoEShape, tokens: int) -> tuple[int, int]:
    """What one layer keeps of a call until its backward, and what all layers share while one of them computes.

    In bf16, with rows spread as routers do: the busiest expert has twice the mean.

    Args:
        shape: of the layer.
        tokens: of the call.
    """
    s, rows = shape, tokens * shape.top_k + 16 * min(shape.num_experts, tokens * shape.top_k)  # padded to 32 each
    busiest = 2 * rows // s.num_experts
    scratch = busiest * (2 * (2 * s.hidden_size + 7 * s.intermediate_size) + 4 * (s.hidden_size + s.intermediate_size))
    lora = 4 * 3 * s.rank * s.num_experts * (s.hidden_size + s.intermediate_size)
    return 4 * rows * s.intermediate_size, 2 * rows * s.hidden_size + scratch + lora


def copied_bytes(shape: MoEShape, packing: str) -> int:
    """Of one layer's packed copies, where they are asked for; `auto` makes those that fit."""
    if packing == "auto" or (packing != "off" and why_not_bf16(packed=True)):
        return 0
    return int(_COPIES[packing] * 6 * shape.num_experts * shape.hidden_size * shape.intermediate_size)


def _affordable(size: int) -> str:
    """The most copies of a layer of `size` bytes that leave enough memory free."""
    room = memory.available() - _RESERVE * memory.total()
    return next(p for p, copies in _COPIES.items() if not copies or copies * size < room)


@functools.cache
def why_not_bf16(packed: bool) -> str:
    """Why fp32 products with weights cast at every use are the better choice here, "" if bf16 products are.

    CPUs multiply bf16 at 0.01 to 16 times the speed of fp32, and their instruction sets do not tell. So, where oneDNN
    does it at all, the products of one expert are timed, once on a machine: a run that is resumed computes as before.

    Args:
        packed: whether bf16 products have packed weights.
    """
    forced = {name: os.environ.get(name) for name in ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")}
    about = {"cpu": cpu_model(), "host": host(), "torch": torch.__version__, "packed": packed, **forced}
    held = read(about, "torch")
    if held is None:
        write(about, "torch", why_not=(why_not := _compared(packed)))
        return why_not
    return str(held["why_not"])


def _compared(packed: bool) -> str:
    """See `why_not_bf16`; a few tenths of a second."""
    if not torch.backends.mkldnn.is_available():
        return "this torch has no oneDNN"
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this CPU has no instructions for bfloat16"
    g = torch.Generator().manual_seed(0)  # a run's own random numbers are the same with and without a measurement
    matrix = torch.randn(2, 1024, 2048, generator=g).to(torch.bfloat16)
    weights = ExpertWeights(matrix[:1], matrix[1:], matrix[:1].mT.contiguous())
    bf16: Products = Packed(weights, _ROWS, backward=True) if packed else FromSource(weights)
    times = []
    for products, dtype in ((bf16, torch.bfloat16), (FromSource(weights), torch.float32)):
        x, out = torch.randn(_ROWS, 2048, generator=g).to(dtype), torch.empty(_ROWS, 2048, dtype=dtype)
        times.append(_fastest(functools.partial(products.gate_up, 0, x, out, False)))
        times[-1] += _fastest(functools.partial(products.gate_up_backward, 0, x, out, False))
    half, full = times
    if half <= _MARGIN * full:
        return ""
    return f"{_ROWS} rows take {1e3 * full:.1f} ms so, {1e3 * half:.1f} ms in bfloat16 on this CPU"


def _fastest(run: Callable[[], object]) -> float:
    """Seconds of the best of a few runs after one to warm up."""
    run()
    found = []
    for _ in range(4):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found)
