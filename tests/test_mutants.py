"""The contract gate against planted faults and against false alarms: the very decision of a user's gate."""

import functools

import pytest
import torch
from helpers import BF16_KERNELS, STORED_KERNELS_SLOW, draw
from mutants import GRADIENTS, INPUTS, OUTPUT, STALE, WEIGHTS, mutants

from ktmoe.backends import TABLE
from ktmoe.backends.kt.kernel import KernelBackend
from ktmoe.backends.torch import TorchBackend
from ktmoe.gate import contract
from ktmoe.gate.gate import LEVELS
from ktmoe.retained import RetainedForwards
from ktmoe.types import MoEShape


SHAPE = contract.reduced(MoEShape(num_experts=32, hidden_size=128, intermediate_size=128, top_k=2, rank=8))
NAMES = [*INPUTS, *WEIGHTS, *OUTPUT, *GRADIENTS, *STALE]


def make(name, weights):
    if name == "torch":  # stands in for a BF16 kernel on hosts without one
        return TorchBackend(weights, SHAPE)
    return KernelBackend(name, weights, SHAPE, scaling=2.0, max_len=64)


@functools.cache
def fixtures(name):
    case = draw(name, SHAPE, LEVELS["quick"].tokens)
    return case, mutants(case, functools.partial(make, name))


def rejected(name, backend, case):
    """The gate's own decision (`ktmoe.gate.gate.run_contract`)."""
    kind = "AMXBF16" if name == "torch" else name
    backend.name = kind
    return contract.judge(backend, case, TABLE[kind].required)


every_kind = pytest.mark.parametrize("name", ["torch", *BF16_KERNELS, *STORED_KERNELS_SLOW])


def test_there_are_at_least_forty():
    assert len(set(NAMES)) == len(NAMES) >= 40


@every_kind
@pytest.mark.parametrize("fault", NAMES)
def test_every_mutant_is_rejected(name, fault):
    case, found = fixtures(name)
    assert rejected(name, found[fault], case), f"{name}: the gate lets {fault!r} through"


@every_kind
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seeds", [range(20), pytest.param(range(1000), marks=pytest.mark.slow)], ids=["20", "1000"])
def test_no_false_alarm(name, seeds):
    alarms = {}
    for seed in seeds:
        case = draw(name, SHAPE, LEVELS["quick"].tokens, seed)
        problems = rejected(name, RetainedForwards(make(name, case.weights), "retain"), case)
        if problems:
            alarms[seed] = problems
    assert alarms == {}


def test_a_sound_backend_is_not_a_mutant():
    case, _ = fixtures("torch")
    assert not rejected("torch", TorchBackend(case.weights, SHAPE, torch.float32), case)
