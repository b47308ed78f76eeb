"""The two checks before the kernel on a real model's weights: nothing wrong passes, nothing right is refused."""

import dataclasses
import functools

import pytest
import torch
from helpers import BF16_KERNELS
from mutants import GRADIENTS, INPUTS, OUTPUT, WEIGHTS, Mutant, mutants
from safetensors.torch import load_file

from ktmoe.backends import TABLE
from ktmoe.backends.kt import KernelBackend
from ktmoe.gate import contract
from ktmoe.gate.gate import LEVELS
from ktmoe.gate.load_probe import probe_problems
from ktmoe.types import ExpertWeights


every_kernel = pytest.mark.parametrize("name", BF16_KERNELS)
EXPERTS = (28, 29, 0, 13)  # layers of the model; 28 has the outliers that were once refused


@pytest.fixture(scope="session")
def mlps(real_model):
    """Every MLP of the dense model as an expert of one layer: 30 that differ, where upcycled ones are alike."""
    tensors = load_file(real_model.dense / "model.safetensors")
    return ExpertWeights(
        *(
            [tensors[f"model.layers.{i}.mlp.{p}.weight"] for i in range(30)]
            for p in ("gate_proj", "up_proj", "down_proj")
        )
    )


def take(weights, ids):
    return ExpertWeights(
        *(torch.stack([getattr(weights, p)[i] for i in ids]) for p in ("gate_proj", "up_proj", "down_proj"))
    )


def case_of(mlps, seed=0, ids=EXPERTS):
    weights = take(mlps, ids)
    shape = contract.MoEShape(len(ids), weights.hidden_size, weights.intermediate_size, top_k=2, rank=8)
    return dataclasses.replace(contract.draw_case(shape, LEVELS["quick"].tokens, seed), weights=weights)


def make(name, weights, share_backward=True):
    shape = contract.MoEShape(weights.num_experts, weights.hidden_size, weights.intermediate_size, top_k=2, rank=8)
    return KernelBackend(name, weights, shape, scaling=2.0, max_len=256, share_backward=share_backward)


@pytest.mark.slow
@every_kernel
def test_every_mutant_is_rejected_on_real_weights(name, mlps):
    case = case_of(mlps)
    passed = []
    for fault, backend in mutants(case, functools.partial(make, name)).items():
        backend.name = name
        if not contract.judge(backend, case, TABLE[name].required):
            passed.append(fault)
    assert passed == []
    assert len([*INPUTS, *WEIGHTS, *OUTPUT, *GRADIENTS]) >= 40


@every_kernel
@pytest.mark.parametrize("share_backward", [True, False])
def test_a_right_kernel_passes_the_contract_on_real_weights(name, mlps, share_backward):
    for seed in range(2):
        case = case_of(mlps, seed)
        sound = Mutant(make(name, case.weights, share_backward))
        sound.name = name
        assert contract.judge(sound, case, TABLE[name].required) == []


@every_kernel
@pytest.mark.parametrize("fault", WEIGHTS)
def test_the_load_probe_finds_what_was_packed_wrongly(name, mlps, fault):
    """Experts that are not what the source says, among many that are; INT8's arithmetic is asked where it matters."""
    ids = list(range(20, 30))
    weights = take(mlps, ids)
    backend = make(name, WEIGHTS[fault](weights))
    assert probe_problems(backend, weights, TABLE[name].required, LEVELS["quick"].probe, False)


@every_kernel
def test_the_load_probe_passes_every_expert_of_the_model(name, mlps):
    backend = make(name, take(mlps, range(30)))
    for level in LEVELS.values():
        assert probe_problems(backend, mlps, TABLE[name].required, level.probe, True) == []
    if name == "AMXInt8":
        assert backend.distance[0].max() > 5 * TABLE[name].required.forward / 2  # from bf16 it would have failed


@every_kernel
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_seed_of_the_load_probe_refuses_a_right_kernel(name, mlps, monkeypatch):
    backend, real, refused = make(name, take(mlps, range(30))), torch.Generator.manual_seed, {}
    for seed in range(100):
        monkeypatch.setattr(
            "ktmoe.gate.load_probe.token_generator", lambda n, seed=seed: real(torch.Generator(), 1000 * seed + n)
        )
        if found := probe_problems(backend, mlps, TABLE[name].required, LEVELS["full"].probe, True):
            refused[seed] = found
    assert refused == {}
