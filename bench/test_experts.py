"""Time of one layer's experts, forward and forward with backward, for every backend; only after it is right.

    python -m nox -s perf -- --benchmark-json=perf.json

Compare backends within one run only, on an idle machine. A time never fails a run.
"""

import pytest

from ktmoe.backends import KERNEL_BACKENDS, TABLE, build, kt
from ktmoe.config import KTConfig
from ktmoe.gate import contract
from ktmoe.planning import plan
from ktmoe.shapes import SHAPES
from ktmoe.validation import make_inputs


NAMES = ("DeepSeek-V2-Lite", "Qwen3-30B-A3B")
TOKENS = 256


@pytest.fixture(params=["torch", *KERNEL_BACKENDS])
def layer(request, shape):
    """A backend that has just been held to the contract, and a call for it."""
    name = request.param
    if name in KERNEL_BACKENDS and not kt.available():
        pytest.skip(f"kernel NOT verified on this host: {kt.variant()}")
    case = contract.draw_case(contract.reduced(SHAPES[shape]), TOKENS, 0, TABLE[name].stored)
    decided = plan(KTConfig(kt_backend=name), case.shape, case.weights.stored)
    backend = build(decided, case.weights, case.shape, case.lora.scaling)
    assert contract.judge(backend, case, TABLE[name].expected) == []
    dtype = backend.compute_dtype
    inputs = make_inputs(case.hidden_states, case.top_k_index, case.top_k_weights, case.lora, case.shape, dtype)
    yield backend, inputs, case.grad_output.to(dtype)
    backend.close()


@pytest.mark.parametrize("shape", NAMES)
def test_forward(benchmark, layer):
    backend, inputs, _ = layer
    benchmark.extra_info["tokens"] = len(inputs.hidden_states)
    benchmark.pedantic(lambda: backend.forward(inputs, save=False), rounds=10, warmup_rounds=2)


@pytest.mark.parametrize("shape", NAMES)
def test_forward_and_backward(benchmark, layer):
    backend, inputs, grad_output = layer
    benchmark.extra_info["tokens"] = len(inputs.hidden_states)

    def step():
        _, ticket = backend.forward(inputs, save=True)
        backend.backward(ticket, inputs, grad_output)

    benchmark.pedantic(step, rounds=10, warmup_rounds=2)
