"""What every probe is made of: its entry in the table of traps, a drawn layer, calls of it, and what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from ktmoe_reference import LORA_NAMES
from torch import Tensor

from ktmoe.backends import TABLE
from ktmoe.backends.kt import KernelBackend
from ktmoe.config import KTConfig
from ktmoe.experts import MoEExperts
from ktmoe.gate import contract
from ktmoe.interface import Backend
from ktmoe.types import Gradients, KTError, MoEShape
from ktmoe.validation import make_inputs


SHAPE = MoEShape(num_experts=4, hidden_size=64, intermediate_size=64, top_k=2, rank=4)


@dataclass(frozen=True)
class Trap:
    """A trap by its number in docs/kernel.md, what happens to whoever steps into it, and the probe."""

    number: int
    effect: str
    probe: Callable[[str], list[str]]


TRAPS: dict[int, Trap] = {}


def trap(number: int, effect: str) -> Callable[[Callable[[str], list[str]]], Callable[[str], list[str]]]:
    """Enters a probe in the table."""

    def register(probe: Callable[[str], list[str]]) -> Callable[[str], list[str]]:
        TRAPS[number] = Trap(number, effect, probe)
        return probe

    return register


def drawn(name: str, shape: MoEShape = SHAPE, tokens: int = 24, seed: int = 0) -> contract.Case:
    """A drawn layer of sizes and with weights that a backend takes, and a call of it."""
    row = TABLE[name]
    return contract.draw_case(contract.fitting(row, shape), tokens, seed, row.stored)


def load(name: str, case: contract.Case, **options: Any) -> KernelBackend:
    """The case's layer in the kernel."""
    # One thread: the kernel's threads wait by spinning, and with two on two busy cores a task of 1 ms took 170.
    return KernelBackend(name, case.weights, case.shape, **({"scaling": 2.0, "threads": 1, "max_len": 96} | options))


def wrong(backend: KernelBackend, case: contract.Case) -> list[str]:
    """The contract for one call, by the backend's own arithmetic."""
    expected = contract.specification(case, int8=backend.int8)
    rows = contract.measure(case, contract.answer(backend, case), expected)
    return contract.violations(rows, TABLE[backend.name].expected)


def far(backend: Backend, case: contract.Case) -> list[str]:
    """As `wrong`, for a call of which some tokens or experts are computed exactly and others in 8 bits."""
    rows = contract.measure(case, contract.answer(backend, case), contract.specification(case))
    in_8_bits = backend.name == "AMXInt8"
    return contract.violations(rows, contract.DRAWN_INT8 if in_8_bits else TABLE[backend.name].expected)


def forward(backend: KernelBackend, case: contract.Case, save: bool = True) -> Callable[[], Gradients]:
    """Runs a forward; what is returned runs its backward."""
    inputs = make_inputs(
        case.hidden_states, case.top_k_index, case.top_k_weights, case.lora, case.shape, torch.bfloat16
    )
    _, ticket = backend.forward(inputs, save=save)
    return lambda: backend.backward(ticket, inputs, case.grad_output)


def differ(what: str, got: Gradients, expected: Gradients) -> list[str]:
    """Which gradients are not bitwise the expected ones."""
    pairs = zip(
        ("hidden_states", "top_k_weights", *LORA_NAMES), tensors(got), tensors(expected), strict=True
    )  # the same inputs give the same bits
    return [f"{what}: the gradient of {name} differs" for name, a, b in pairs if not torch.equal(a, b)]


def tensors(grads: Gradients) -> list[Tensor]:
    """All gradients, in the order of the inputs."""
    return [grads.hidden_states, grads.top_k_weights, *(grads.lora or ())]


def module(name: str) -> tuple[MoEExperts, tuple[Tensor, Tensor, Tensor]]:
    """A layer with LoRA that matters, and a call for it: [T, H], [T, K], [T, K]."""
    case = drawn(name)
    config = KTConfig(kt_backend=name, kt_num_threads=1, kt_max_len=96)
    experts = MoEExperts(case.weights, top_k=2, r=4, lora_alpha=8, config=config)
    for key, parameter in experts.lora.items():
        parameter.data.copy_(case.lora.tensors[key])
    x = case.hidden_states.float().requires_grad_()
    return experts, (x, case.top_k_index, case.top_k_weights.clone().requires_grad_())


def refused(what: str, word: str, call: Callable[[], Any]) -> list[str]:
    """Whether a call is refused by a message that names the word."""
    try:
        call()
    except KTError as error:
        return [] if word in str(error) else [f"{what}: refused, but the message does not name {word}: {error}"]
    except Exception as error:
        return [f"{what}: {type(error).__name__} instead of a KTError: {error}"]
    return [f"{what}: accepted"]
