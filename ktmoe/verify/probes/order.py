"""Calls one after another, of one layer or several: whose activations, LoRA and gradients a backward finds."""

from __future__ import annotations

import sys
import threading
from dataclasses import replace

import torch

from ktmoe.gate import contract
from ktmoe.interface import STATELESS
from ktmoe.validation import make_inputs
from ktmoe.verify.probes.trap import SHAPE, differ, drawn, forward, load, module, trap, wrong


@trap(8, "two forwards before one backward: the second's gradients")
def _two_forwards(name: str) -> list[str]:
    cases = [drawn(name), replace(drawn(name, seed=1), weights=drawn(name).weights)]
    backend = load(name, cases[0])
    alone = [forward(backend, c)() for c in cases]
    backwards = [forward(backend, c) for c in cases]
    return [p for i in (0, 1) for p in differ(f"call {i + 1}", backwards[i](), alone[i])]


@trap(9, "a cache shared by layers: 127 % wrong")
def _two_layers(name: str) -> list[str]:
    cases = [drawn(name, seed=s) for s in (0, 1)]
    backends = [load(name, c) for c in cases]
    alone = [forward(b, c)() for b, c in zip(backends, cases, strict=True)]
    backwards = [forward(b, c) for b, c in zip(backends, cases, strict=True)]
    return [p for i in (1, 0) for p in differ(f"layer {i + 1}", backwards[i](), alone[i])]


@trap(10, "two objects with one layer id: segfault")
def _objects_come_and_go(name: str) -> list[str]:
    found = []
    for seed, rank in enumerate((4, 5, 6)):  # other ranks: new objects
        case = drawn(name, replace(SHAPE, rank=rank), seed=seed)
        found += wrong(load(name, case), case)
    return found


@trap(11, "LoRA edited in place: half of it stale")
def _edited_lora(name: str) -> list[str]:
    case = drawn(name)
    backend = load(name, case)
    contract.answer(backend, case)
    other = replace(case.lora, tensors=dict(drawn(name, seed=1).lora.tensors))
    return wrong(backend, replace(case, lora=other))


@trap(12, "default gradient mode: some gradients add up, some stay from earlier calls")
def _gradients_of_other_calls(name: str) -> list[str]:
    case = drawn(name)
    backend = load(name, case)
    found = []
    for first in (0, 2, 0):
        index = first + case.top_k_index.clamp_min(0) % 2
        found += wrong(backend, replace(case, top_k_index=index))
    return found


@trap(13, "gradients added up in bf16: half of their precision")
def _accumulation(name: str) -> list[str]:
    experts, (x, index, weights) = module(name)
    experts.to(torch.bfloat16)  # as trainers do to the whole model
    parameters = list(experts.parameters())
    total = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
    for rows in x.detach().repeat(10, 1).split(len(x)):
        loss = experts(rows, index, weights.detach()).sum()
        for sum_, grad in zip(total, torch.autograd.grad(loss, parameters, retain_graph=True), strict=True):
            sum_ += grad.double()
        loss.backward()
    error = max(
        ((p.grad.double() - t).abs().mean() / t.abs().mean()).item()  # type: ignore[union-attr]
        for p, t in zip(parameters, total, strict=True)
    )
    return [] if error < 1e-6 else [f"ten gradients add up to {error:.2g} beside their sum"]


@trap(26, "two callers at once: underflow of the cache, wrong numbers")
def _two_threads(name: str) -> list[str]:
    cases = [drawn(name), drawn(name, seed=1), replace(drawn(name, seed=2), weights=drawn(name).weights)]
    backends = [load(name, c, threads=t) for c, t in zip(cases[:2], (1, 2), strict=True)]  # with a pool each
    backends.append(backends[0])
    alone = [forward(b, c)() for b, c in zip(backends, cases, strict=True)]
    found: list[str] = []

    def work(i: int) -> None:
        try:
            for _ in range(12):
                found.extend(differ(f"thread {i + 1}", forward(backends[i], cases[i])(), alone[i]))
        except Exception as error:
            found.append(f"thread {i + 1}: {type(error).__name__}: {error}")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # so that the two meet
    try:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    finally:
        sys.setswitchinterval(interval)
    return found[:10]


@trap(27, "an evaluation between forward and backward: 39 % wrong")
def _evaluation_between(name: str) -> list[str]:
    case = drawn(name)
    backend = load(name, case)
    alone = forward(backend, case)()
    backward = forward(backend, case)
    rows = slice(0, 3)
    few = make_inputs(
        case.hidden_states[rows], case.top_k_index[rows], case.top_k_weights[rows], None, case.shape, torch.bfloat16
    )
    _, ticket = backend.forward(few, save=False)
    return differ("after an evaluation", backward(), alone) + ([] if ticket == STATELESS else ["it left a ticket"])


@trap(28, "gradient memory that is used again: rows of idle experts keep what lay there")
def _used_memory(name: str) -> list[str]:
    case = drawn(name)
    backend = load(name, case)
    found = []
    for _ in range(4):
        found += wrong(backend, case)
    return found
