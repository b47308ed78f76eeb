"""One probe for each of the kernel's traps (docs/kernel.md): small runs that are wrong or crash without ktmoe's guard.

A probe takes the name of a kernel backend and returns what it found wrong, as sentences. `ktmoe.verify.traps` runs
them in a process of their own; tests/test_guards.py takes each guard away and expects its probe to notice.
"""

from __future__ import annotations

import functools
import gc
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from ktmoe_reference import LORA_NAMES
from torch import Tensor

from ktmoe.backends import TABLE
from ktmoe.backends.kt import KernelBackend, valid_tp
from ktmoe.config import KTConfig
from ktmoe.convert import pack
from ktmoe.experts import MoEExperts
from ktmoe.gate import contract
from ktmoe.interface import STATELESS
from ktmoe.types import ExpertWeights, Gradients, KTError, MoEShape
from ktmoe.validation import make_inputs
from ktmoe.verify import usage


_SHAPE = MoEShape(num_experts=4, hidden_size=64, intermediate_size=64, top_k=2, rank=4)


@dataclass(frozen=True)
class Trap:
    """A trap by its number in docs/kernel.md, what happens to whoever steps into it, and the probe."""

    number: int
    effect: str
    probe: Callable[[str], list[str]]


TRAPS: dict[int, Trap] = {}


def _trap(number: int, effect: str) -> Callable[[Callable[[str], list[str]]], Callable[[str], list[str]]]:
    def register(probe: Callable[[str], list[str]]) -> Callable[[str], list[str]]:
        TRAPS[number] = Trap(number, effect, probe)
        return probe

    return register


def _case(shape: MoEShape = _SHAPE, tokens: int = 24, seed: int = 0) -> contract.Case:
    return contract.draw_case(shape, tokens, seed)


def _load(name: str, case: contract.Case, **options: Any) -> KernelBackend:
    # One thread: the kernel's threads wait by spinning, and with two on two busy cores a task of 1 ms took 170.
    return KernelBackend(name, case.weights, case.shape, **({"scaling": 2.0, "threads": 1, "max_len": 96} | options))


def _wrong(backend: KernelBackend, case: contract.Case) -> list[str]:
    """The contract for one call."""
    rows = contract.measure(case, contract.answer(backend, case), contract.specification(case))
    return contract.violations(rows, TABLE[backend.name].expected)


def _forward(backend: KernelBackend, case: contract.Case, save: bool = True) -> Callable[[], Gradients]:
    """Runs a forward; what is returned runs its backward."""
    inputs = make_inputs(
        case.hidden_states, case.top_k_index, case.top_k_weights, case.lora, case.shape, torch.bfloat16
    )
    _, ticket = backend.forward(inputs, save=save)
    return lambda: backend.backward(ticket, inputs, case.grad_output)


def _differ(what: str, got: Gradients, expected: Gradients) -> list[str]:
    pairs = zip(
        ("hidden_states", "top_k_weights", *LORA_NAMES), _tensors(got), _tensors(expected), strict=True
    )  # the same inputs give the same bits
    return [f"{what}: the gradient of {name} differs" for name, a, b in pairs if not torch.equal(a, b)]


def _tensors(grads: Gradients) -> list[Tensor]:
    return [grads.hidden_states, grads.top_k_weights, *(grads.lora or ())]


def _module(name: str) -> tuple[MoEExperts, tuple[Tensor, Tensor, Tensor]]:
    """A layer with LoRA that matters, and a call for it: [T, H], [T, K], [T, K]."""
    case = _case()
    config = KTConfig(kt_backend=name, kt_num_threads=1, kt_max_len=96)
    experts = MoEExperts(case.weights, top_k=2, r=4, lora_alpha=8, config=config)
    for key, parameter in experts.lora.items():
        parameter.data.copy_(case.lora.tensors[key])
    x = case.hidden_states.float().requires_grad_()
    return experts, (x, case.top_k_index, case.top_k_weights.clone().requires_grad_())


def _refused(what: str, word: str, call: Callable[[], Any]) -> list[str]:
    try:
        call()
    except KTError as error:
        return [] if word in str(error) else [f"{what}: refused, but the message does not name {word}: {error}"]
    except Exception as error:
        return [f"{what}: {type(error).__name__} instead of a KTError: {error}"]
    return [f"{what}: accepted"]


@_trap(1, "more tokens than the capacity: segfault")
def _more_tokens_than_the_capacity(name: str) -> list[str]:
    case = _case(tokens=90)
    return _wrong(_load(name, case, max_len=32), case)


@_trap(2, "sizes that are no multiple of 32 or 64: segfault or abort")
def _sizes_that_do_not_fit(name: str) -> list[str]:
    shape = replace(_SHAPE, hidden_size=48 if name == "AMXBF16" else 96)
    config = KTConfig(kt_backend=name, kt_max_len=96)
    return _refused("an odd size", "hidden_size", lambda: MoEExperts(_case(shape).weights, top_k=2, config=config))


@_trap(3, "int32 ids, bf16 routing weights, strided input: 80 to 140 % wrong")
def _other_dtypes_and_strides(name: str) -> list[str]:
    experts, (x, index, weights) = _module(name)
    strided = torch.empty(len(x), 128)[:, ::2].copy_(x.detach())
    with torch.no_grad():
        expected = experts(x, index, weights.to(torch.bfloat16).float())
        got = experts(strided, index.int().t().contiguous().t(), weights.to(torch.bfloat16))
    return [] if torch.equal(got, expected) else ["the same numbers in another dtype or layout give another output"]


@_trap(4, "another top_k than configured: heap corruption")
def _another_top_k(name: str) -> list[str]:
    experts, (x, _, _) = _module(name)
    index, weights = torch.zeros(len(x), 3, dtype=torch.int64), torch.ones(len(x), 3)
    return _refused("three experts per token instead of two", "top_k_index", lambda: experts(x, index, weights))


@_trap(5, "ids of 2^31 and more: wrong gradients")
def _huge_ids(name: str) -> list[str]:
    case = _case()
    index = case.top_k_index.clone()
    index[index < 0] = 2**32 + 1
    index[::3, 1] = 2**31
    return _wrong(_load(name, case), replace(case, top_k_index=index))


def _replaced_rows(name: str, rows: int) -> list[str]:
    experts, (x, index, weights) = _module(name)
    out = experts(x, index, weights).sum()
    for t in (x, index, weights):
        t.data = t.data.repeat(2, 1)[:rows].clone()
    return _refused(f"a backward with {rows} rows", "shape", out.backward)


@_trap(6, "backward with fewer rows than the forward: write out of bounds")
def _fewer_rows(name: str) -> list[str]:
    return _replaced_rows(name, 5)


@_trap(7, "backward with more rows than the forward: rows never written")
def _more_rows(name: str) -> list[str]:
    return _replaced_rows(name, 40)


@_trap(8, "two forwards before one backward: the second's gradients")
def _two_forwards(name: str) -> list[str]:
    cases = [_case(), replace(_case(seed=1), weights=_case().weights)]
    backend = _load(name, cases[0])
    alone = [_forward(backend, c)() for c in cases]
    backwards = [_forward(backend, c) for c in cases]
    return [p for i in (0, 1) for p in _differ(f"call {i + 1}", backwards[i](), alone[i])]


@_trap(9, "a cache shared by layers: 127 % wrong")
def _two_layers(name: str) -> list[str]:
    cases = [_case(seed=s) for s in (0, 1)]
    backends = [_load(name, c) for c in cases]
    alone = [_forward(b, c)() for b, c in zip(backends, cases, strict=True)]
    backwards = [_forward(b, c) for b, c in zip(backends, cases, strict=True)]
    return [p for i in (1, 0) for p in _differ(f"layer {i + 1}", backwards[i](), alone[i])]


@_trap(10, "two objects with one layer id: segfault")
def _objects_come_and_go(name: str) -> list[str]:
    found = []
    for seed, rank in enumerate((4, 5, 6)):  # other ranks: new objects
        case = _case(replace(_SHAPE, rank=rank), seed=seed)
        found += _wrong(_load(name, case), case)
    return found


@_trap(11, "LoRA edited in place: half of it stale")
def _edited_lora(name: str) -> list[str]:
    case = _case()
    backend = _load(name, case)
    contract.answer(backend, case)
    other = replace(case.lora, tensors=dict(_case(seed=1).lora.tensors))
    return _wrong(backend, replace(case, lora=other))


@_trap(12, "default gradient mode: some gradients add up, some stay from earlier calls")
def _gradients_of_other_calls(name: str) -> list[str]:
    case = _case()
    backend = _load(name, case)
    found = []
    for first in (0, 2, 0):
        index = first + case.top_k_index.clamp_min(0) % 2
        found += _wrong(backend, replace(case, top_k_index=index))
    return found


@_trap(13, "gradients added up in bf16: half of their precision")
def _accumulation(name: str) -> list[str]:
    experts, (x, index, weights) = _module(name)
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


@_trap(14, "a null gradient pointer: segfault")
def _without_lora(name: str) -> list[str]:
    experts, (x, index, weights) = _module(name)
    got = torch.autograd.grad(experts.run(x, index, weights, lora=None).sum(), (x, weights))
    for key, parameter in experts.lora.items():
        if key.endswith("lora_B"):
            parameter.data.zero_()
    expected = torch.autograd.grad(experts(x, index, weights).sum(), (x, weights))
    same = all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    return [] if same else ["no LoRA and LoRA with B = 0 have different gradients"]


@_trap(15, "a gate activation of -88.5 or less: NaN, and two LoRA gradients lose the token")
def _extreme_gates(name: str) -> list[str]:
    case = _case()
    x = case.hidden_states.clone()
    x[3] *= 60
    x[7] *= 3000
    return _wrong(_load(name, case), replace(case, hidden_states=x))


@_trap(16, "one token that is NaN: finite LoRA gradients that are wrong")
def _a_nan_token(name: str) -> list[str]:
    case = _case()
    x = case.hidden_states.clone()
    x[5, 0] = float("nan")
    bad = replace(case, hidden_states=x)
    got, expected = contract.answer(_load(name, case), bad)[1], contract.specification(bad)[1]
    names = ("hidden_states", "top_k_weights", *LORA_NAMES)
    return [
        f"{tensor}: NaN where it should not be, or none where it should"
        for tensor, a, b in zip(names, _tensors(got), _tensors(expected), strict=True)
        if not torch.equal(a.isfinite().flatten(1).all(1), b.isfinite().flatten(1).all(1))
    ]


@_trap(17, "five or more parts of tensor parallelism: gradients 46 to 80 % wrong")
def _many_parts(name: str) -> list[str]:
    shape = replace(_SHAPE, intermediate_size=1280)
    tp = valid_tp(name, shape, 5)
    return _wrong(_load(name, _case(shape), tp=tp, threads=tp), _case(shape))


@_trap(18, "parts of tensor parallelism that are no multiple of 32 or 64: segfault")
def _odd_parts(name: str) -> list[str]:
    shape = replace(_SHAPE, intermediate_size=192)
    tp = valid_tp(name, shape, 4)
    return _wrong(_load(name, _case(shape), tp=tp, threads=tp), _case(shape))


@_trap(19, "experts on the GPU: ignored")
def _gpu_experts(name: str) -> list[str]:
    return _refused(
        "kt_num_gpu_experts: 1", "kt_num_gpu_experts", lambda: KTConfig(kt_backend=name, kt_num_gpu_experts=1)
    )


@_trap(20, "an expert map: LoRA of other experts")
def _every_expert_in_its_place(name: str) -> list[str]:
    case = _case()
    return _wrong(_load(name, case), case)


@_trap(21, "LoRA dropout: another mask in every forward, also in evaluation")
def _dropout(name: str) -> list[str]:
    case = _case()
    return _wrong(_load(name, case), case)


@_trap(22, "destroyed objects: their packed weights leak")
def _loads_and_closes(name: str) -> list[str]:
    case = _case(replace(_SHAPE, hidden_size=512, intermediate_size=512))  # 6 MiB
    process, held = psutil.Process(), []
    for i in range(9):
        backend = _load(name, case)
        _forward(backend, case)()
        if i % 2:
            backend.close()
        del backend
        gc.collect()
        held.append(usage.measure(process)[2] / 2**20)
    grown = held[-1] - held[2]
    return [] if grown < 6 else [f"six loads after the third grew the process by {grown:.0f} MiB"]


@_trap(23, "other weights in the same object: the old ones in the backward")
def _reload(name: str) -> list[str]:
    found = []
    for seed in (0, 1, 2):
        case = _case(replace(_SHAPE, rank=7), seed=seed)
        backend = _load(name, case)
        found += _wrong(backend, case)
        backend.close()
    return found


@_trap(24, "a corrupted file of packed weights: loads silently")
def _packed_weights(name: str) -> list[str]:
    case = _case()
    with tempfile.TemporaryDirectory() as directory:
        (layer,) = pack({"layers.0.experts": case.weights}, Path(directory), "drawn", threads=2)
        found = []
        if name != "AMXInt8":
            path_given = functools.partial(KTConfig, kt_backend=name, kt_weight_path=directory)
            found += _refused("packed INT8 weights", "kt_weight_path", path_given)
        for kind in ("quant", "scale"):
            file = next(f for f in layer.files() if f.expert == 2 and f.kind == kind)
            path = layer.folder / file.name
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
            found += _refused(f"one bit of {path.name}", path.name, lambda: _load("AMXInt8", case, packed=layer))
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        _load("AMXInt8", case, packed=layer)
        return found


@_trap(25, "weights that are not there: segfault")
def _no_weights(name: str) -> list[str]:
    gate_up, down = torch.empty(4, 64, 64, device="meta"), torch.empty(4, 64, 64, device="meta")
    meta = ExpertWeights(gate_up, gate_up, down)
    config = KTConfig(kt_backend=name, kt_max_len=96)
    found = _refused("weights on the meta device", "meta", lambda: MoEExperts(meta, top_k=2, r=4, config=config))
    return found + _wrong(_load(name, _case()), _case())


@_trap(26, "two callers at once: underflow of the cache, wrong numbers")
def _two_threads(name: str) -> list[str]:
    cases = [_case(), _case(seed=1), replace(_case(seed=2), weights=_case().weights)]
    backends = [_load(name, c, threads=t) for c, t in zip(cases[:2], (1, 2), strict=True)]  # with a pool each
    backends.append(backends[0])
    alone = [_forward(b, c)() for b, c in zip(backends, cases, strict=True)]
    found: list[str] = []

    def work(i: int) -> None:
        try:
            for _ in range(12):
                found.extend(_differ(f"thread {i + 1}", _forward(backends[i], cases[i])(), alone[i]))
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


@_trap(27, "an evaluation between forward and backward: 39 % wrong")
def _evaluation_between(name: str) -> list[str]:
    case = _case()
    backend = _load(name, case)
    alone = _forward(backend, case)()
    backward = _forward(backend, case)
    rows = slice(0, 3)
    few = make_inputs(
        case.hidden_states[rows], case.top_k_index[rows], case.top_k_weights[rows], None, case.shape, torch.bfloat16
    )
    _, ticket = backend.forward(few, save=False)
    return _differ("after an evaluation", backward(), alone) + ([] if ticket == STATELESS else ["it left a ticket"])


@_trap(28, "gradient memory that is used again: rows of idle experts keep what lay there")
def _used_memory(name: str) -> list[str]:
    case = _case()
    backend = _load(name, case)
    found = []
    for _ in range(4):
        found += _wrong(backend, case)
    return found


@_trap(29, "every task: 100 bytes that are never freed")
def _many_tasks(name: str) -> list[str]:
    case = contract.first_rows(_case(), 1)
    backend, process, held = _load(name, case), psutil.Process(), []
    inputs = make_inputs(
        case.hidden_states, case.top_k_index, case.top_k_weights, case.lora, case.shape, torch.bfloat16
    )
    for _ in range(3):
        for _ in range(2500):
            backend.forward(inputs, save=False)  # two tasks
        held.append(usage.measure(process)[2])
    grown = (held[-1] - held[0]) / 10_000
    return [] if grown < 20 else [f"memory grew by {grown:.0f} bytes a task"]
