"""Shared by the tests: the backends under test, layers to run them on, and how close is close."""

import functools

import pytest
import torch

from ktmoe import contract
from ktmoe.backends import build, plan
from ktmoe.config import KTConfig
from ktmoe.experts import MoEExperts
from ktmoe.types import ExpertWeights, MoEShape


KERNELS = ("AMXBF16", "AMXInt8")
BACKENDS = [
    pytest.param(b, marks=[pytest.mark.kernel] if b in KERNELS else []) for b in ("reference", "torch", *KERNELS)
]
KERNEL_BACKENDS = [pytest.param(b, marks=[pytest.mark.kernel]) for b in KERNELS]
SMALL = MoEShape(num_experts=4, hidden_size=64, intermediate_size=64, top_k=2, rank=4)


@functools.cache  # the kernel leaks the weights of destroyed objects: few are built, and kept
def loaded(name, shape, seed=0, max_len=256, tokens=24):
    """A backend loaded with a drawn case, and the case."""
    case = contract.draw_case(shape, tokens, seed)
    decided = plan(KTConfig(kt_backend=name, kt_max_len=max_len, kt_num_threads=2), shape)
    assert decided.backend == name, decided.note
    return build(decided, case.weights, shape, case.lora.scaling), case


def relative(got, expected):
    """mean |got - expected| / mean |expected|."""
    got, expected = got.double(), expected.double()
    return ((got - expected).abs().mean() / expected.abs().mean().clamp_min(1e-30)).item()


def limits(name):
    """This project's own tight limits."""
    return contract.EXPECTED[name]


def weights(shape=SMALL, seed=0):
    """bf16 expert weights of a layer."""
    return contract.draw_case(shape, 1, seed).weights


@functools.cache
def module(name, shape=SMALL, max_len=256, seed=0):
    """A `MoEExperts` with non-zero LoRA of its own, r = shape.rank, alpha = 2 r."""
    config = KTConfig(kt_backend=name, kt_max_len=max_len, kt_num_threads=2)
    experts = MoEExperts(weights(shape), top_k=shape.top_k, r=shape.rank, lora_alpha=2 * shape.rank, config=config)
    g = torch.Generator().manual_seed(seed)
    for p in experts.parameters():
        p.data = torch.randn(p.shape, generator=g) * 0.1
    return experts


def call(experts, tokens=10, seed=1, dtype=torch.float32):
    """Leaves for one call: hidden_states, index, weights."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, experts.hidden_size, generator=g).to(dtype).requires_grad_()
    index = torch.rand(tokens, experts.num_experts, generator=g).argsort(-1)[:, : experts.top_k]
    w = torch.rand(tokens, experts.top_k, generator=g).requires_grad_()
    return x, index, w


def gradients(experts, loss, *leaves):
    """Gradients of the leaves and of the module's LoRA, without touching `.grad`."""
    return torch.autograd.grad(loss, [*leaves, *experts.parameters()], retain_graph=True)


def stack(case_weights):
    """The same weights as sequences of E matrices, as checkpoints hold them."""
    return ExpertWeights(*(list(getattr(case_weights, p)) for p in ("gate_proj", "up_proj", "down_proj")))
