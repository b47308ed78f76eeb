"""The load probe: one drawn token for each expert of a layer, on the weights that were loaded.

Every expert is compared with torch on the source's weights. For a backend in 8 bits that tells how far the format is,
not whether the kernel is right. So a few experts, others in the next layer, are compared with INT8's own arithmetic,
which takes seven times as long, and besides them every expert that stands out: one that is further off than others, or
whose output has another length. A misread or swapped expert stands out; one with outliers does too, and then passes.
"""

from __future__ import annotations

import itertools
from contextlib import closing
from dataclasses import asdict, dataclass

import torch
from ktmoe_reference import int8_experts_forward
from torch import Tensor

from ktmoe.backends import Limits, TorchBackend
from ktmoe.interface import Backend
from ktmoe.types import ExpertWeights, KTError
from ktmoe.validation import make_inputs


_NAMES = ("output", "input gradient")
_FAR = 1.5  # times the layer's median distance: further than that stands out
_LENGTH = 0.01  # so does a projection on the exact answer that is this far from 1
_NEAR = 5.0  # times the limit: an error that rounding may explain
_turns = itertools.count()  # so that each layer has other experts compared in 8 bits


@dataclass(frozen=True)
class Depth:
    """How closely the probe looks.

    Attributes:
        dtype: what torch computes in. bf16 reads the source as it is and takes a third of the time of fp32.
        one_in: of so many experts one is compared with INT8's arithmetic, whatever it looks like.
    """

    dtype: torch.dtype
    one_in: int


def probe_problems(
    backend: Backend, weights: ExpertWeights, limits: Limits, depth: Depth, gradient: bool
) -> list[str]:
    """What is wrong with each expert, as sentences. Notes on the backend how far its format is from exact.

    Args:
        backend: with `weights` loaded.
        weights: the source.
        limits: for each expert's single token.
        depth: how closely to look.
        gradient: whether to compare the input gradient too.

    Raises:
        KTError: the weights are no numbers to compute with.
    """
    n = backend.shape.num_experts
    errors = _errors(backend, weights, depth, gradient, n)
    if backend.int8 and 0 < max(e.max().item() for e in _over(limits, errors)) <= _NEAR:
        # A number near the middle of two may be rounded the other way. If it is a token's largest, its scale changes
        # and all else is rounded anew: once in a thousand tokens, and not in two of one expert.
        again = _errors(backend, weights, depth, gradient, n + 1, always=True)
        errors = [torch.minimum(a, b) for a, b in zip(errors, again, strict=True)]
    found = []
    for name, limit, error in zip(_NAMES, (limits.forward, limits.backward), errors, strict=False):
        wrong = (~(error <= limit)).nonzero().flatten().tolist()
        found += [f"{name} of expert {e}: relative error {error[e]:.4g}, limit {limit}" for e in wrong]
    return found


def token_generator(seed: int) -> torch.Generator:
    """Where the probe's tokens and gradients come from."""
    return torch.Generator().manual_seed(seed)


def _over(limits: Limits, errors: list[Tensor]) -> list[Tensor]:
    """Errors as multiples of their limits, 0 where they are within; infinite where there is no number."""
    shares = [e / limit for e, limit in zip(errors, (limits.forward, limits.backward), strict=False)]
    return [torch.where(s <= 1, 0.0, s.nan_to_num(float("inf"))) for s in shares]


def _errors(
    backend: Backend, weights: ExpertWeights, depth: Depth, gradient: bool, seed: int, always: bool = False
) -> list[Tensor]:
    """Of each expert's output and input gradient, [E] each: 0 for experts that nothing speaks against.

    Args:
        backend: with `weights` loaded.
        weights: the source.
        depth: how closely to look.
        gradient: whether to compare the input gradient too.
        seed: of the tokens.
        always: whether every expert is compared in 8 bits.
    """
    n = backend.shape.num_experts
    g = token_generator(seed)
    x = torch.randn(n, backend.shape.hidden_size, generator=g).to(torch.bfloat16)  # [E, H]
    grad = torch.randn(n, backend.shape.hidden_size, generator=g).to(torch.bfloat16) if gradient else None
    # torch first: the kernel's threads spin on for 50 ms after a task, and would triple what torch takes.
    with closing(TorchBackend(weights, backend.shape, depth.dtype)) as torch_backend:
        exact = _answers(torch_backend, x, grad)
    _check_usable(exact, depth.dtype)
    one_in = 1 if always else depth.one_in
    chosen = range(next(_turns) % one_in, n, one_in) if backend.int8 else ()
    in_8_bits = {e: _in_8_bits(backend, weights, e, x, grad) for e in chosen}
    got = _answers(backend, x, grad)
    distances = [_distance(a, b) for a, b in zip(got, exact, strict=True)]
    if backend.int8 is None:
        return distances
    backend.distance = backend.distance or distances
    for a, b, distance in zip(got, exact, distances, strict=True):
        length = ((a * b).sum(-1) / (b * b).sum(-1).clamp_min(1e-30) - 1).abs()
        ordinary = (distance <= _FAR * distance.nanmedian()) & (length <= _LENGTH)
        for e in (~ordinary).nonzero().flatten().tolist():
            if e not in in_8_bits:
                in_8_bits[e] = _in_8_bits(backend, weights, e, x, grad)
    errors = [torch.zeros(n) for _ in got]
    for e, expected in in_8_bits.items():
        for error, mine, theirs in zip(errors, got, expected, strict=True):
            error[e] = _distance(mine[e], theirs)
    return errors


def _answers(backend: Backend, x: Tensor, grad: Tensor | None) -> list[Tensor]:
    """Output and, if asked for, input gradient of every expert for its token: [E, H] fp32 each."""
    index = torch.full((len(x), backend.shape.top_k), -1)
    index[:, 0] = torch.arange(len(x))
    inputs = make_inputs(x, index, torch.ones(index.shape), None, backend.shape, backend.compute_dtype)
    out, ticket = backend.forward(inputs, save=grad is not None)
    if grad is None:
        return [out.float()]
    return [out.float(), backend.backward(ticket, inputs, grad.to(backend.compute_dtype)).hidden_states.float()]


def _in_8_bits(backend: Backend, weights: ExpertWeights, e: int, x: Tensor, grad: Tensor | None) -> list[Tensor]:
    """The same of one expert by INT8's arithmetic: [H] each."""
    assert backend.int8 is not None
    gate, up, down = (w.to(torch.bfloat16).unsqueeze(0) for w in weights.expert(e))
    here = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
    leaf = x[e : e + 1].float().requires_grad_(grad is not None)
    with torch.enable_grad():
        out = int8_experts_forward(leaf, *here, gate, up, down, **asdict(backend.int8))
    if grad is None:
        return [out[0]]
    return [out[0].detach(), torch.autograd.grad(out, leaf, grad[e : e + 1].float())[0][0]]


def _distance(got: Tensor, expected: Tensor) -> Tensor:
    """mean |got - expected| / mean |expected| over the last dimension."""
    return (got - expected).abs().mean(-1) / expected.abs().mean(-1).clamp_min(1e-30)


def _check_usable(exact: list[Tensor], dtype: torch.dtype) -> None:
    unusable = (~torch.stack([t.isfinite().all(-1) for t in exact]).all(0)).nonzero().flatten().tolist()
    if unusable:
        raise KTError(
            f"weights: expert {unusable[0]} gives NaN or infinite numbers for ordinary input in torch too "
            f"({len(unusable)} of {len(exact[0])} experts): its weights hold such values or overflow {dtype}. Is "
            "the checkpoint damaged?"
        )
