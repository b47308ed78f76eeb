"""`python -m ktmoe.gate.measuring SHAPE PLANS STORED TOKENS`: how long some plans take, in a process of its own.

The kernel keeps the weights of every object that it ever made, and its threads: neither is left to the training.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from ktmoe.backends import Plan, build
from ktmoe.gate import contract
from ktmoe.gate.choice import part_of
from ktmoe.interface import Backend
from ktmoe.types import Lora, MoEShape
from ktmoe.validation import make_inputs


_REPEATS = 3
_SECONDS = 3.0  # after which no further repetition begins
_REST = 0.12  # seconds; the kernel's threads spin on for 50 ms after a task


def measure(shape: MoEShape, plans: Sequence[Plan], stored: str, tokens: int) -> list[tuple[float, float]]:
    """Seconds of a training forward and backward under each plan: medians over other routings, taken in turns.

    What stands around the experts in a model is part of it: what the kernel's threads take from torch's next products
    counts.

    Args:
        shape: of the layer that is to be trained.
        plans: to compare.
        stored: the format of the weights, as `ExpertWeights.stored`.
        tokens: of the whole layer; a part of the experts gets its part of them.

    Returns:
        For each plan seconds of the experts, and of the dense products around them.
    """
    part, tokens = part_of(shape, tokens)
    case = contract.draw_case(part, 1, seed=0, stored=stored)
    backends = [build(p, case.weights, part, case.lora.scaling) for p in plans]
    times: list[list[tuple[float, float]]] = [[] for _ in backends]
    g = torch.Generator().manual_seed(0)
    began = time.perf_counter()
    for repeat in range(1 + _REPEATS):  # the first one allocates
        if repeat > 1 and time.perf_counter() - began > _SECONDS:
            break
        order = list(zip(backends, times, strict=True))
        for backend, found in order if repeat % 2 else order[::-1]:
            time.sleep(_REST)
            seconds = _once(backend, tokens, case.lora, g)
            if repeat:
                found.append(seconds)
    return [tuple(map(statistics.median, zip(*found, strict=True))) for found in times]


def _once(backend: Backend, tokens: int, lora: Lora, g: torch.Generator) -> tuple[float, float]:
    shape = backend.shape
    x = torch.randn(tokens, shape.hidden_size, generator=g)
    index = torch.rand(tokens, shape.num_experts, generator=g).argsort(-1)[:, : shape.top_k]
    weights = torch.rand(tokens, shape.top_k, generator=g)
    inputs = make_inputs(x, index, weights, lora, shape, backend.compute_dtype)
    dense = torch.randn(shape.hidden_size, shape.hidden_size, generator=g).to(torch.bfloat16)
    start = time.perf_counter()
    with backend.working():
        _, ticket = backend.forward(inputs, save=True)
    around = _attention(inputs.hidden_states, dense, 1)
    with backend.working():
        backend.backward(ticket, inputs, inputs.hidden_states)
    around += _attention(inputs.hidden_states, dense, 2)
    return time.perf_counter() - start - around, around


def _attention(x: Tensor, dense: Tensor, times: int) -> float:
    """Four projections and a norm, as the rest of a layer has them at least. Returns seconds."""
    start = time.perf_counter()
    for _ in range(4 * times):
        torch.nn.functional.rms_norm(x.to(dense.dtype) @ dense, dense.shape[:1])
    return time.perf_counter() - start


if __name__ == "__main__":
    plans = [Plan(**p) for p in json.loads(sys.argv[2])]
    print(json.dumps(measure(MoEShape(**json.loads(sys.argv[1])), plans, sys.argv[3], int(sys.argv[4]))))
