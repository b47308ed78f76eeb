"""The contract: a drawn case, the specification's answer to it, and how far a backend may be from that.

A backend that computes in 8 bits is judged by what 8 bits mean. How far that is from the exact formula is the format's
own distance: reported, and no verdict on a kernel.

The gate on the user's machine, `nox -s accuracy` and the tests all measure with these functions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from ktmoe_reference import (
    LORA_NAMES,
    experts_forward,
    int8_experts_forward,
    pack_int4,
    quantize_fp8,
    quantize_int4,
)
from torch import Tensor

from ktmoe.backends import Limits, Row
from ktmoe.interface import Backend, Int8
from ktmoe.stored import BlockFP8, GroupInt4, Stored
from ktmoe.types import PROJECTIONS, ExpertWeights, Gradients, Inputs, Lora, MoEShape, Stack
from ktmoe.validation import make_inputs


@dataclass(frozen=True)
class Case:
    """One call with its output gradient. Every active expert has tokens of its own, the last expert has none."""

    shape: MoEShape
    weights: ExpertWeights
    lora: Lora
    hidden_states: Tensor  # [T, H]
    top_k_index: Tensor  # [T, K]
    top_k_weights: Tensor  # [T, K]
    grad_output: Tensor  # [T, H]

    @property
    def active(self) -> range:
        """Experts that have tokens."""
        return range(self.shape.num_experts - 1)


@dataclass(frozen=True)
class Measurement:
    """How far one tensor is from the specification's.

    Attributes:
        name: output, hidden_states, top_k_weights, or one of `LORA_NAMES` (gradients but for the first).
        expert: over this expert alone, or None.
        token: over this token alone, the worst one, or None.
        error: mean |x - ref| / mean |ref|.
        projection: <x, ref> / <ref, ref>: 1 but for rounding; a wrong scale or a missing part moves it.
    """

    name: str
    expert: int | None
    error: float
    projection: float
    token: int | None = None

    @property
    def label(self) -> str:
        """For tables and messages."""
        parts = (f"{n} {at}" for n, at in (("expert", self.expert), ("token", self.token)) if at is not None)
        return ", ".join((self.name, *parts))


# INT8 from the exact formula on drawn weights, which have no outliers: the format's distance, not the kernel's error.
DRAWN_INT8 = Limits(0.035, 0.04, 0.01)
ROUNDING_FLOOR = 0.002  # half a bf16 ulp, relative
# Numbers drawn for one tensor; a larger one repeats them, which is ten times faster. A prime, so that rows start at
# different places in the sequence: no two rows, and no two experts, are alike.
_POOL = 4_194_301


def draw_case(shape: MoEShape, tokens: int, seed: int, stored: str = "") -> Case:
    """Draws weights, non-zero LoRA and a routing in which every expert but the last can be told apart.

    Args:
        shape: sizes; at least two experts.
        tokens: tokens with random experts, besides two per expert that are routed to it alone.
        seed: of everything.
        stored: the format that the weights are held in, as `ExpertWeights.stored`.

    Returns:
        LoRA, activations and, unless they are stored otherwise, weights in bf16, so that no backend is charged for the
        rounding of its inputs.
    """
    g = torch.Generator().manual_seed(seed)
    e, h, i, k = shape.num_experts, shape.hidden_size, shape.intermediate_size, shape.top_k

    def randn(*size: int, scale: float = 1.0) -> Tensor:
        n = math.prod(size)
        drawn = torch.randn(min(n, _POOL), generator=g).mul_(scale).to(torch.bfloat16)
        return drawn.repeat(-(-n // _POOL))[:n].view(size) if n > _POOL else drawn.view(size)

    drawn = randn(e, i, h, scale=h**-0.5), randn(e, i, h, scale=h**-0.5), randn(e, h, i, scale=i**-0.5)
    weights = ExpertWeights(*(as_stored(t, stored) for t in drawn))
    lora = {
        # A as trained ones are, B such that LoRA moves the output by a fair part of the base's
        name: randn(*size, scale=size[2] ** -0.5 if name.endswith("lora_A") else 0.3 * size[2] ** -0.5)
        for name, size in shape.lora_shapes().items()
    }
    alone = torch.full((2 * (e - 1), k), -1)
    alone[:, 0] = torch.arange(e - 1).repeat_interleave(2)
    mixed = torch.rand(tokens, max(e - 1, k), generator=g).argsort(-1)[:, :k] % max(e - 1, 1)
    index = torch.cat([alone, mixed])
    index = index[torch.randperm(len(index), generator=g)]
    routing = torch.rand(len(index), k, generator=g) * 0.9 + 0.1
    return Case(shape, weights, Lora(lora, 2.0), randn(len(index), h), index, routing, randn(len(index), h))


def fitting(row: Row, shape: MoEShape) -> MoEShape:
    """A shape, its sizes doubled and its rank halved until a backend takes it."""
    while row.refuse_shape(replace(shape, rank=1)) and shape.hidden_size < 4096:
        shape = replace(shape, hidden_size=2 * shape.hidden_size, intermediate_size=2 * shape.intermediate_size)
    while row.refuse_shape(shape) and shape.rank > 1:
        shape = replace(shape, rank=shape.rank // 2)
    return shape


def as_stored(matrices: Tensor, stored: str) -> Stack:
    """[E, out, in] quantised matrix by matrix into a format, as `ExpertWeights.stored` names it; "" leaves it."""
    if not stored:
        return matrices
    found = [quantize_fp8(m) if stored == "fp8" else quantize_int4(m) for m in matrices]
    numbers, scales = [q for q, _ in found], [scale for _, scale in found]
    return BlockFP8(numbers, scales) if stored == "fp8" else GroupInt4([pack_int4(q) for q in numbers], scales)


def _exact(stack: Stack) -> Stack:
    return stack.exact() if isinstance(stack, Stored) else stack


def specification(
    case: Case, dtype: torch.dtype = torch.float64, int8: Int8 | None = None
) -> tuple[Tensor, Gradients]:
    """The reference's answer, by default in fp64: output [T, H] and all gradients.

    Args:
        case: the layer and the call.
        dtype: what sums and products are computed in.
        int8: to answer in that 8-bit arithmetic instead of exactly.
    """
    leaves = [case.hidden_states, case.top_k_weights, *case.lora]
    x, w, *lora = (t.detach().to(dtype).requires_grad_() for t in leaves)
    projections = [_exact(getattr(case.weights, p)) for p in PROJECTIONS]
    tensors = dict(zip(LORA_NAMES, lora, strict=True))
    forward: Any = functools.partial(int8_experts_forward, **asdict(int8)) if int8 else experts_forward
    with torch.enable_grad():
        out = forward(x, case.top_k_index, w, *projections, tensors, case.lora.scaling)
        grads = torch.autograd.grad(out, [x, w, *lora], case.grad_output.to(dtype))
    return out.detach(), Gradients(grads[0], grads[1], list(grads[2:]))


def _inputs(backend: Backend, case: Case) -> Inputs:
    call = case.hidden_states, case.top_k_index, case.top_k_weights, case.lora
    return make_inputs(*call, backend.shape, backend.compute_dtype)


def answer(backend: Backend, case: Case) -> tuple[Tensor, Gradients]:
    """A backend's output and gradients for the same case."""
    inputs = _inputs(backend, case)
    out, ticket = backend.forward(inputs, save=True)
    return out, backend.backward(ticket, inputs, case.grad_output.to(backend.compute_dtype))


def measure(case: Case, got: tuple[Tensor, Gradients], expected: tuple[Tensor, Gradients]) -> list[Measurement]:
    """Compares all tensors, as wholes and per expert. Anything not finite measures as infinitely wrong."""
    rows = [
        _measurement("output", None, got[0], expected[0]),
        _measurement("hidden_states", None, got[1].hidden_states, expected[1].hidden_states),
        _measurement("top_k_weights", None, got[1].top_k_weights, expected[1].top_k_weights),
    ]
    rows.append(_worst_token("output", got[0], expected[0]))
    rows.append(_worst_token("hidden_states", got[1].hidden_states, expected[1].hidden_states))
    alone = (case.top_k_index >= 0).sum(-1) == 1  # [T]
    for e in case.active:
        tokens = (alone & (case.top_k_index[:, 0] == e)).nonzero().squeeze(-1)
        if len(tokens):
            mine, theirs = got[1].hidden_states[tokens], expected[1].hidden_states[tokens]
            rows.append(_measurement("output", e, got[0][tokens], expected[0][tokens]))
            rows.append(_measurement("hidden_states", e, mine, theirs))
    assert got[1].lora is not None
    assert expected[1].lora is not None
    for name, lora, theirs in zip(LORA_NAMES, got[1].lora, expected[1].lora, strict=True):
        rows.append(_measurement(name, None, lora, theirs))
        rows.extend(_measurement(name, e, lora[e], theirs[e]) for e in range(case.shape.num_experts))
    return rows


def violations(
    rows: Iterable[Measurement], limits: Limits, same_precision: Iterable[Measurement] | None = None
) -> list[str]:
    """What breaks the contract, as sentences; empty if nothing does.

    Args:
        rows: of the backend under test.
        limits: absolute ones.
        same_precision: rows of a plain torch computation in the same precision; no error may be more than twice its
            counterpart plus a rounding floor.
    """
    found = []
    baseline = {(m.name, m.expert): m.error for m in same_precision or () if m.token is None}
    for m in rows:
        limit = limits.forward if m.name == "output" else limits.backward
        if m.token is not None:
            limit *= 2  # the worst of many single rows, not a mean
        elif (m.name, m.expert) in baseline:
            limit = min(limit, 2 * baseline[m.name, m.expert] + ROUNDING_FLOOR)
        # One expert's activations are those of two tokens: of 1,000 sound cases a few are beyond the plain limit, by
        # up to a fifth.
        spread = limits.projection * (2 if m.expert is not None and m.name not in LORA_NAMES else 1)
        if not m.error <= limit:
            found.append(f"{m.label}: relative error {m.error:.4g}, limit {limit:.4g}")
        elif not abs(m.projection - 1) <= spread and m.name != "top_k_weights":
            found.append(f"{m.label}: projection on the reference {m.projection:.4f}, limit 1 +- {spread}")
    return found


def judge(backend: Backend, case: Case, limits: Limits) -> list[str]:
    """The gate's decision on one case: limits, and for BF16 the ratio to a torch computation in the same precision.

    INT8 is compared with its own arithmetic, the others with the exact formula.

    Then once more with so few tokens that the kernel multiplies row by row instead of in blocks: its own choice for up
    to 4 E / K tokens. Few numbers scatter, so the limits alone hold there, not the projection. Each of these calls
    comes after one that differs in one thing: nothing that was kept of that one may answer it.

    The reference computes in fp32 here: its own error is a thousand times below any limit, and a user waits for it.

    Returns:
        What breaks the contract, as sentences.
    """
    expected = specification(case, torch.float32, backend.int8)
    rows = measure(case, answer(backend, case), expected)
    found = violations(rows, limits, baseline(backend.name, case, expected))
    few = first_rows(case, max(1, 4 * case.shape.num_experts // case.shape.top_k))
    expected = specification(few, torch.float32, backend.int8)
    loose = replace(limits, projection=float("inf"))
    for what, other in _nearly(few).items():
        backend.forward(_inputs(backend, other), save=True)
        problems = violations(measure(few, answer(backend, few), expected), loose)
        found += [f"{p} ({len(few.hidden_states)} tokens, after a call with other {what})" for p in problems]
    return found


def _nearly(case: Case) -> dict[str, Case]:
    """The same call but for one thing, by that thing's name."""
    index, lora = case.top_k_index, case.lora
    tensors = {name: t * 2 if name.endswith("lora_B") else t for name, t in lora.tensors.items()}
    return {
        "hidden states": replace(case, hidden_states=case.hidden_states.neg()),
        "experts": replace(case, top_k_index=torch.where(index < 0, -1, (index + 1) % case.shape.num_experts)),
        "routing weights": replace(case, top_k_weights=case.top_k_weights * 2),
        "LoRA": replace(case, lora=replace(lora, tensors=tensors)),
        "LoRA scale": replace(case, lora=replace(lora, scaling=2 * lora.scaling)),
    }


def first_rows(case: Case, tokens: int) -> Case:
    """The same layer, called with the first tokens alone."""
    names = ("hidden_states", "top_k_index", "top_k_weights", "grad_output")
    return replace(case, **{name: getattr(case, name)[:tokens].clone() for name in names})


def baseline(name: str, case: Case, expected: tuple[Tensor, Gradients]) -> list[Measurement] | None:
    """The rows of a plain torch computation in a backend's precision: bf16, or None for those that torch has not."""
    if name not in ("AMXBF16", "AMXFP8"):
        return None
    return measure(case, specification(case, torch.bfloat16), expected)


def reduced(shape: MoEShape) -> MoEShape:
    """The same layer with just enough experts for one to be idle: what an expert computes does not depend on E.

    A multiple of four of them: INT4's kernel does not take any number (K33).
    """
    return replace(shape, num_experts=min(shape.num_experts, -(-(shape.top_k + 2) // 4) * 4))


def _worst_token(name: str, got: Tensor, expected: Tensor) -> Measurement:
    """One row that nobody wrote may weigh too little to show in the whole."""
    error = (got.double() - expected).abs().mean(-1) / expected.abs().mean(-1).clamp_min(1e-30)  # [T]
    token = int(error.nan_to_num(float("inf")).argmax()) if len(error) else 0
    worst = error[token].item() if len(error) else 0.0
    return Measurement(name, None, worst if worst == worst else float("inf"), 1.0, token)


def _measurement(name: str, expert: int | None, got: Tensor, expected: Tensor) -> Measurement:
    x, ref = got.double(), expected.double()
    if ref.numel() == 0:
        return Measurement(name, expert, 0.0, 1.0)
    if not ref.any():  # an expert without tokens: exactly zero, or infinitely wrong
        return Measurement(name, expert, 0.0 if not x.any() else float("inf"), 1.0)
    error = ((x - ref).abs().mean() / ref.abs().mean()).item()
    projection = ((x * ref).sum() / (ref * ref).sum()).item()
    return Measurement(name, expert, error if error == error else float("inf"), projection)
