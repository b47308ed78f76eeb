"""One contract for all backends: each case is run by every one of them and judged by the fp64 specification."""

import dataclasses

import ktmoe_reference
import pytest
import torch
from helpers import (
    BACKENDS,
    KERNEL_BACKENDS,
    SLACK,
    SMALL,
    call,
    chosen,
    draw,
    exact,
    gradients,
    limits,
    loaded,
    module,
    relative,
)
from hypothesis import given
from hypothesis import strategies as st

from ktmoe.backends import build
from ktmoe.backends.kt.kernel import KernelBackend
from ktmoe.config import KTConfig
from ktmoe.gate import contract
from ktmoe.planning import plan
from ktmoe.types import PROJECTIONS, MoEShape


every_backend = pytest.mark.parametrize("name", BACKENDS)

SHAPES = {
    "small": SMALL,
    "wide": MoEShape(4, 256, 64, 2, 8),
    "tall": MoEShape(4, 64, 320, 2, 8),
    "top-1": MoEShape(3, 64, 64, 1, 4),
    "all experts": MoEShape(4, 64, 64, 4, 4),
    "r=1": MoEShape(4, 128, 64, 2, 1),
    "r=3": MoEShape(4, 64, 64, 2, 3),
    "r=128": MoEShape(3, 128, 128, 2, 128),
}


@every_backend
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_matches_the_specification(name, shape):
    backend, case = loaded(name, shape)
    rows = contract.measure(case, contract.answer(backend, case), contract.specification(case))
    assert contract.violations(rows, limits(name)) == []


@pytest.mark.parametrize("name", KERNEL_BACKENDS)
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_of_the_kernel(name, threads):
    """All others run on one: they wait by spinning, which on busy cores takes a hundred times as long."""
    case = draw(name, SHAPES["tall"], 40)
    backend = KernelBackend(name, case.weights, case.shape, scaling=2.0, threads=threads, max_len=96)
    rows = contract.measure(case, contract.answer(backend, case), contract.specification(case))
    assert contract.violations(rows, limits(name)) == []


@every_backend
def test_chunks_equal_one_call(name):
    """More tokens than kt_max_len: same numbers, summed over chunks."""
    backend, case = loaded(name, SMALL, max_len=32, tokens=90)
    whole, _ = loaded(name, SMALL, max_len=256, tokens=90)
    assert len(case.hidden_states) > 64
    rows = contract.measure(case, contract.answer(backend, case), contract.specification(case))
    assert contract.violations(rows, limits(name)) == []
    out, grads = contract.answer(backend, case)
    out_whole, grads_whole = contract.answer(whole, case)
    assert relative(out, out_whole) < 1e-3
    assert relative(grads.hidden_states, grads_whole.hidden_states) < 1e-3


def routed(name, index, tokens=None, **changes):
    """Output and gradients of a case whose routing is given, and the specification's."""
    backend, case = loaded(name, SMALL)
    index = torch.as_tensor(index)
    n = len(index)
    case = dataclasses.replace(
        case,
        hidden_states=case.hidden_states[:n],
        top_k_index=index,
        top_k_weights=case.top_k_weights[:n],
        grad_output=case.grad_output[:n],
        **changes,
    )
    return contract.answer(backend, case), contract.specification(case)


ROUTINGS = {
    "one token": [[1, 2]],
    "all on one expert": [[3, 3]] * 5,
    "an expert twice": [[0, 0], [1, 1], [2, 2], [0, 1]],
    "absent experts": [[0, 1], [1, 0], [0, 1]],
    "skipped slots": [[0, -1], [4, 1], [-1, 4], [2, 3]],
    "ids of 2^31 and more": [[0, 2**31], [2**32 + 1, 1], [2**40, 2**62], [2, -(2**33)]],
}


@every_backend
@pytest.mark.parametrize("index", ROUTINGS.values(), ids=ROUTINGS)
def test_routings(name, index):
    got, expected = routed(name, index)
    # Two or three tokens per expert are too few for a mean error: every element may be off by its bf16 or int8 step.
    slack = SLACK[name]
    pairs = [(got[0], expected[0]), (got[1].hidden_states, expected[1].hidden_states)]
    pairs += [(got[1].top_k_weights, expected[1].top_k_weights), *zip(got[1].lora, expected[1].lora, strict=True)]
    for mine, theirs in pairs:
        assert mine.isfinite().all()
        if theirs.any():
            assert relative(mine, theirs) < slack
        assert torch.equal(mine.abs().double().flatten(1).sum(1) == 0, theirs.abs().flatten(1).sum(1) == 0)


@every_backend
@pytest.mark.parametrize(
    "index", [torch.zeros(0, 2, dtype=torch.int64), torch.full((3, 2), -1)], ids=["no tokens", "no ids"]
)
def test_nothing_to_do(name, index):
    experts = module(name)
    x = torch.randn(len(index), experts.hidden_size, requires_grad=True)
    w = torch.rand(len(index), 2, requires_grad=True)
    out = experts(x, index, w)
    assert out.shape == x.shape
    assert not out.any()
    grads = gradients(experts, out.sum(), x, w)
    assert all(g.isfinite().all() and not g.any() for g in grads)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_layout_of_the_input(name, dtype):
    """Whatever floating dtype, stride and integer type come in: cast, computed, and cast back."""
    experts = module(name)
    x, index, w = call(experts)
    expected = experts(x, index, w)
    strided = torch.empty(10, 2 * experts.hidden_size, dtype=dtype)[:, ::2].copy_(x.detach()).requires_grad_()
    out = experts(strided, index.int().t().contiguous().t(), w.detach().to(dtype))
    assert out.dtype == dtype
    assert relative(out, expected) < 0.03
    (grad,) = torch.autograd.grad(out.float().sum(), strided)
    assert grad.dtype == dtype
    assert grad.isfinite().all()


@every_backend
def test_sequences_of_matrices_equal_stacked_tensors(name):
    backend, case = loaded(name, SMALL)
    decided = plan(KTConfig(kt_backend=name, kt_num_threads=1), case.shape)
    other = build(decided, chosen(case.weights, range(4)), case.shape, case.lora.scaling)
    assert torch.equal(contract.answer(other, case)[0], contract.answer(backend, case)[0])


@every_backend
def test_merged_weights_equal_lora_and_zero_b_equals_base(name):
    backend, case = loaded(name, SMALL)
    zero_b = {n: torch.zeros_like(t) if n.endswith("lora_B") else t for n, t in case.lora.tensors.items()}
    none = dataclasses.replace(case, lora=dataclasses.replace(case.lora, tensors=zero_b))
    spec = ktmoe_reference.experts_forward(
        case.hidden_states.double(), case.top_k_index, case.top_k_weights.double(),
        *exact(case.weights),
    )  # fmt: skip
    assert relative(contract.answer(backend, none)[0], spec) < limits(name).forward
    lora = case.lora.tensors
    merged = {
        p: w.double() + 2.0 * lora[f"{p}.lora_B"].double() @ lora[f"{p}.lora_A"].double()
        for p, w in zip(PROJECTIONS, exact(case.weights), strict=True)
    }
    spec = ktmoe_reference.experts_forward(
        case.hidden_states.double(), case.top_k_index, case.top_k_weights.double(), **merged
    )
    assert relative(contract.answer(backend, case)[0], spec) < limits(name).forward


@every_backend
@given(data=st.data())
def test_properties(name, data):
    """Over drawn token counts and routings: right, linear in the routing weights, and blind to the tokens' order."""
    experts = module(name)
    n = data.draw(st.integers(1, 40), label="tokens")
    seed = data.draw(st.integers(0, 2**16), label="seed")
    ids = st.integers(-1, experts.num_experts)
    index = torch.tensor(data.draw(st.lists(st.tuples(ids, ids), min_size=n, max_size=n), label="routing"))
    x, _, w = call(experts, n, seed)
    with torch.no_grad():
        out = experts(x, index, w)
        lora = {k: v.double() for k, v in experts.lora.items()}
        spec = ktmoe_reference.experts_forward(
            x.to(loaded(name, SMALL)[0].compute_dtype).double(), index, w.double(),
            *exact(experts.weights), lora, 2.0,
        )  # fmt: skip
        assert relative(out, spec) < SLACK[name]
        torch.testing.assert_close(experts(x, index, 2 * w), 2 * out, rtol=0.02, atol=1e-6)
        order = torch.randperm(n)
        assert torch.equal(experts(x[order], index[order], w[order]), out[order])


@every_backend
def test_permuting_experts_permutes_nothing_visible(name):
    backend, case = loaded(name, SMALL)
    order = torch.tensor([2, 0, 3, 1])
    weights = chosen(case.weights, order.tolist())
    lora = dataclasses.replace(case.lora, tensors={n: t[order] for n, t in case.lora.tensors.items()})
    where = torch.argsort(order)
    permuted = dataclasses.replace(
        case, weights=weights, lora=lora, top_k_index=torch.where(case.top_k_index >= 0, where[case.top_k_index], -1)
    )
    decided = plan(KTConfig(kt_backend=name, kt_num_threads=1), case.shape)
    other = build(decided, weights, case.shape, 2.0)
    out, grads = contract.answer(backend, case)
    out_p, grads_p = contract.answer(other, permuted)
    assert relative(out_p, out) < 1e-2
    for a, b in zip(grads.lora, grads_p.lora, strict=True):
        assert relative(b, a[order]) < 1e-2
