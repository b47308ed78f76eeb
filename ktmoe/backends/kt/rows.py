"""The kernel's rows in the table of backends, one for each of its formats."""

from __future__ import annotations

import math
from functools import partial

from ktmoe.backends.kt import extension, kernel, sizes
from ktmoe.backends.kt.formats import FORMATS
from ktmoe.backends.kt.packed import PackedLayer
from ktmoe.backends.row import Limits, Memory, Plan, Row
from ktmoe.cores import usable_cores
from ktmoe.types import ExpertWeights, KTError, MoEShape


_TORCH_THREADS = 8  # beside the kernel's, at most: they copy, which memory bounds


def _build(
    plan: Plan, weights: ExpertWeights, shape: MoEShape, scaling: float, packed: PackedLayer | None
) -> kernel.KernelBackend:
    return kernel.KernelBackend(
        plan.backend,
        weights,
        shape,
        scaling=scaling,
        threads=plan.threads or usable_cores(),
        tp=plan.tp,
        nodes=plan.nodes,
        max_len=plan.max_len,
        share_backward=plan.share_backward,
        packed=packed,
        torch_threads=max(1, min(usable_cores() - (plan.threads or usable_cores()), _TORCH_THREADS)),
    )


def _refuse_shape(name: str, shape: MoEShape) -> str:
    try:
        sizes.check_shape(name, shape)
    except KTError as error:
        return str(error)
    return ""


def _memory(plan: Plan, shape: MoEShape) -> Memory:
    size = sizes.packed_bytes(plan.backend, shape)
    return Memory(size, once=size) if plan.share_backward else Memory(2 * size)


def _activations(plan: Plan, shape: MoEShape, tokens: int) -> Memory:
    """An object keeps what its longest call took, for as long as it lives."""
    n, s = min(tokens, plan.max_len), shape
    rows = n * s.top_k
    kept = 2 * (n * s.hidden_size + 3 * rows * s.intermediate_size) + rows * (4 * s.rank + 2 * s.hidden_size)
    lora = sum(math.prod(size) for size in s.lora_shapes().values())
    return Memory(kept + 2 * lora, once=2 * lora + 4 * rows * (s.hidden_size + s.intermediate_size))


def _row(name: str, required: Limits, expected: Limits, aimed_at: Limits, takes_packed: bool = False) -> Row:
    return Row(
        name,
        _build,
        required,
        expected,
        aimed_at,
        describe=lambda: f"kt_kernel ({extension.variant()})",
        refuse_shape=partial(_refuse_shape, name),
        refuse_host=partial(extension.why_not, name),
        largest_tp=partial(sizes.valid_tp, name),
        is_kernel=True,
        takes_packed=takes_packed,
        memory=_memory,
        activations=_activations,
        stored=FORMATS[name].stored,
        own_backward=FORMATS[name].own_backward,
        rank=FORMATS[name].rank,
    )


# By the arithmetic that each has INT8 is held as closely as BF16, on weights with outliers too.
_REQUIRED = Limits(0.02, 0.03, 0.005)
BF16 = _row("AMXBF16", _REQUIRED, Limits(0.01, 0.015, 0.005), Limits(0.05, 0.10, 0.005))
INT8 = _row("AMXInt8", _REQUIRED, Limits(0.01, 0.012, 0.005), Limits(0.15, 0.25, 0.01), takes_packed=True)
FP8 = _row("AMXFP8", _REQUIRED, Limits(0.01, 0.015, 0.005), Limits(0.05, 0.10, 0.005))
# Its sums are rounded more coarsely (1.1 % of the output). That shows where few numbers are compared: a gradient of
# eight tokens was 3.1 % off in one case of a thousand.
INT4 = _row("AMXInt4", Limits(0.02, 0.04, 0.01), Limits(0.02, 0.02, 0.01), Limits(0.05, 0.10, 0.01))
