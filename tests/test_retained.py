"""Retained forwards: what checkpointing's recompute does not compute again, and what it must."""

import contextlib
import dataclasses
import gc
import warnings

import pytest
import torch
from helpers import BF16_BACKENDS, SMALL, STORED_KERNELS_SLOW, call, module, weights
from torch.utils.checkpoint import checkpoint

import ktmoe.experts
from ktmoe import KTConfig, MoEExperts, recording, retained
from ktmoe.retained import RetainedForwards, same_bits
from ktmoe.types import Lora
from ktmoe.validation import make_inputs


every_backend = pytest.mark.parametrize("name", [*BF16_BACKENDS, *STORED_KERNELS_SLOW])
both_kinds = pytest.mark.parametrize("use_reentrant", [True, False])


@contextlib.contextmanager
def counted(experts, mode="retain"):
    """The calls that reach the backend itself, as ("forward" | "backward", tokens)."""
    wrapper, calls = experts.load(SMALL.rank), []
    inner, before = wrapper.backend, (wrapper.mode, wrapper.bets)

    def forward(inputs, *, save):
        calls.append(("forward", len(inputs.hidden_states)))
        return type(inner).forward(inner, inputs, save=save)

    def backward(ticket, inputs, grad_output):
        calls.append(("backward", len(inputs.hidden_states)))
        return type(inner).backward(inner, ticket, inputs, grad_output)

    inner.forward, inner.backward = forward, backward
    wrapper.mode, wrapper.bets, wrapper._kept = mode, mode != "recompute", None
    try:
        yield calls
    finally:
        del inner.forward, inner.backward
        wrapper.mode, wrapper.bets = before


def step(experts, x, index, w, use_reentrant):
    """One checkpointed forward and backward: output and all gradients."""
    out = checkpoint(experts, x, index, w, use_reentrant=use_reentrant)
    tensors = [x, w, *experts.parameters()]
    out.square().sum().backward()
    found = [out.detach(), *(t.grad for t in tensors)]
    for t in tensors:
        t.grad = None
    return found


def same(a, b):
    return all(map(same_bits, a, b))


@contextlib.contextmanager
def restored(experts):
    kept = [p.detach().clone() for p in experts.parameters()]
    try:
        yield
    finally:
        for p, value in zip(experts.parameters(), kept, strict=True):
            p.data = value
            p.grad = None


@every_backend
@both_kinds
def test_a_recompute_computes_nothing_and_gives_the_same_bits(name, use_reentrant):
    experts = module(name)
    x, index, w = call(experts, tokens=40)
    with counted(experts, "recompute") as calls:
        expected = step(experts, x, index, w, use_reentrant)
    assert calls == [("forward", 40), ("forward", 40), ("backward", 40)]
    with counted(experts) as calls:
        assert same(step(experts, x, index, w, use_reentrant), expected)
        assert same(step(experts, x, index, w, use_reentrant), expected)
    assert calls == 2 * [("forward", 40), ("backward", 40)]
    assert experts.load(SMALL.rank)._kept is None  # nothing is kept beyond the backward


@every_backend
@both_kinds
def test_calls_in_chunks(name, use_reentrant):
    """Beyond the kernel's capacity its backward runs every chunk's forward; the recompute costs nothing even so."""
    experts = module(name, max_len=32)
    x, index, w = call(experts, tokens=70)
    with counted(experts, "recompute"):
        expected = step(experts, x, index, w, use_reentrant)
    with counted(experts) as calls:
        assert same(step(experts, x, index, w, use_reentrant), expected)
    assert calls == [("forward", 70), ("backward", 70)]


def difference(what, x, index, w, lora):
    """The same call but for one thing, as small as can be."""
    tensors = {n: t.detach().clone() for n, t in lora.tensors.items()}
    x, index, w, scaling = x.detach().clone(), index.clone(), w.detach().clone(), lora.scaling
    if what == "hidden_states":
        x[3, 4] *= 1.05
    elif what == "minus zero":
        x[3, 5] = -0.0
    elif what == "index":
        index[3] = index[3].flip(0)
    elif what == "weights":
        w[3, 1] *= 1 + 1e-6
    elif what == "scaling":
        scaling *= 2
    elif what == "rank":
        tensors = {n: t[..., :2] if n.endswith("B") else t[:, :2] for n, t in tensors.items()}
    elif what == "no LoRA":
        return x, index, w, None
    elif what == "fewer tokens":
        x, index, w = x[:-1], index[:-1], w[:-1]
    else:
        tensors[what][1, 2, 1] += 1e-6
    return x, index, w, Lora(tensors, scaling)


DIFFERENCES = ["hidden_states", "minus zero", "index", "weights", "scaling", "rank", "no LoRA", "fewer tokens"]


@every_backend
@pytest.mark.parametrize("what", [*DIFFERENCES, *SMALL.lora_shapes()])
def test_one_bit_makes_another_call(name, what):
    experts = module(name)
    x, index, w = call(experts, tokens=12)
    with torch.no_grad():
        x[3, 5] = 0.0
    lora = Lora({n: p.detach().requires_grad_() for n, p in experts.lora.items()}, experts.scaling)
    other = difference(what, x, index, w, lora)
    x2 = other[0].requires_grad_()
    with counted(experts, "recompute"):
        expected = experts.run(*other)
        expected = [expected, *torch.autograd.grad(expected.sum(), [x2])]
    with counted(experts) as calls:
        experts.run(x, index, w, lora)
        got = experts.run(*other)
        got = [got, *torch.autograd.grad(got.sum(), [x2])]
    assert [c for c, _ in calls] == ["forward", "forward", "backward"]
    assert same(got, expected)


@every_backend
@pytest.mark.parametrize("how", ["fused", "foreach", "data", "no_grad"])
@pytest.mark.parametrize("grad", [True, False])
def test_an_optimizer_step_between_two_forwards_is_noticed(name, how, grad):
    """Without a backward in between, which would end what is kept anyway."""
    experts = module(name)
    x, index, w = call(experts)
    with restored(experts), counted(experts) as calls, torch.set_grad_enabled(grad):
        before = experts(x, index, w)
        if how == "data":
            experts.lora["up_proj.lora_B"].data[2] += 0.5
        elif how == "no_grad":
            with torch.no_grad():
                experts.lora["up_proj.lora_B"][2] += 0.5
        else:
            for p in experts.parameters():
                p.grad = torch.ones_like(p)
            torch.optim.AdamW(experts.parameters(), lr=0.05, **{how: True}).step()
        after = experts(x, index, w)
        assert [c for c, _ in calls] == ["forward", "forward"]
        assert not torch.equal(before, after)
        wrapper = experts.load(SMALL.rank)
        wrapper._kept = None
        assert torch.equal(experts(x, index, w), after)


@every_backend
def test_what_the_caller_writes_to_is_not_what_is_kept(name):
    """bf16 tensors on the CPU reach a backend as they are, and its output the caller."""
    experts = module(name)
    x, index, w = (t.detach() for t in call(experts, dtype=torch.bfloat16))
    with counted(experts) as calls, torch.no_grad():
        first = experts(x, index, w)
        clean = first.clone()
        first += 1
        second = experts(x, index, w)
        assert torch.equal(second, clean)
        second += 1
        assert torch.equal(experts(x, index, w), clean)
        assert len(calls) == 1
        for t in (x, w):
            t *= 1.5
            experts(x, index, w)
        index[:] = index.flip(1)
        experts(x, index, w)
        assert len(calls) == 4


@every_backend
@both_kinds
@pytest.mark.parametrize("between", ["evaluation", "without LoRA", "other forward"])
def test_other_calls_in_between_mean_computing_again(name, use_reentrant, between):
    """DPO's reference pass, an evaluation, a second microbatch: as it was before anything was kept."""
    experts = module(name)
    x, index, w = call(experts)
    with counted(experts, "recompute"):
        expected = step(experts, x, index, w, use_reentrant)
    with counted(experts) as calls:
        out = checkpoint(experts, x, index, w, use_reentrant=use_reentrant)
        other = call(experts, tokens=7, seed=5)
        if between == "evaluation":
            with torch.no_grad():
                experts.eval()(*other)
                experts.train()
        elif between == "without LoRA":
            with torch.no_grad():
                experts.run(*other, lora=None)
        else:
            experts(*other)
        out.square().sum().backward()
        found = [out.detach(), x.grad, w.grad, *(p.grad for p in experts.parameters())]
        for p in experts.parameters():
            p.grad = None
    assert same(found, expected)
    assert [c for c, _ in calls] == ["forward", "forward", "forward", "backward"]


@every_backend
def test_only_training_bets_on_a_recompute(name):
    experts = module(name)
    x, index, w = call(experts)
    wrapper = experts.load(SMALL.rank)
    with counted(experts):
        with torch.no_grad():
            experts.eval()(x, index, w)
            assert wrapper._kept is None
            experts.train().run(x, index, w, lora=None)
            assert wrapper._kept is None
            experts(x, index, w)
            assert wrapper._kept is not None
        with torch.inference_mode():
            experts(x, index, w)
            assert wrapper._kept is None


@pytest.mark.parametrize("mode", ["auto", "retain", "recompute"])
def test_auto_keeps_where_memory_is_there(mode, monkeypatch):
    monkeypatch.setattr(retained, "total", lambda: 10_000)
    experts = MoEExperts(weights(), top_k=2, r=4, config=KTConfig(kt_backend="torch", kt_cpu_activation=mode))
    x, index, w = call(experts)
    needed = len(x) * retained.bytes_per_token(SMALL, experts.load(4).compute_dtype)
    for free, kept in ((1000 + needed, mode == "retain"), (1001 + needed, mode != "recompute")):
        monkeypatch.setattr(retained, "_LOOK", -1.0)  # at every call
        monkeypatch.setattr(retained, "available", lambda free=free: free)
        experts(x, index, w)
        assert (experts.load(4)._kept is not None) == kept
    if mode != "recompute":
        record = experts.load(4)._kept
        tensors = record.hidden_states, record.output, record.top_k_index, record.top_k_weights
        assert sum(t.nbytes for t in tensors) == needed


class Noisy(torch.nn.Module):
    """Routes at random, as a router with noise whose state checkpointing does not put back."""

    def __init__(self, experts, moves):
        super().__init__()
        self.experts, self.moves, self.calls = experts, moves, 0

    def forward(self, x, index, w):
        self.calls += 1
        return self.experts(x, index.roll(self.calls if self.moves else 0, 0), w)


@every_backend
@both_kinds
@pytest.mark.parametrize("moves", [True, False])
def test_a_recompute_that_routes_differently_is_said_once(name, use_reentrant, moves, monkeypatch):
    monkeypatch.setattr("ktmoe.notices._said", set())
    layer = Noisy(module(name), moves)
    with counted(layer.experts), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for seed in range(3):
            step(layer, *call(layer.experts, seed=seed), use_reentrant)
    assert len([s for s in said if "sent tokens to other experts" in str(s.message)]) == moves


@every_backend
@both_kinds
def test_two_batches_before_their_backwards_are_no_other_routing(name, use_reentrant, monkeypatch):
    monkeypatch.setattr("ktmoe.notices._said", set())
    experts = module(name)
    with counted(experts), warnings.catch_warnings():
        warnings.simplefilter("error")
        for order in ((0, 1), (1, 0)):
            calls = [call(experts, seed=s) for s in (1, 2)]
            outs = [checkpoint(experts, *c, use_reentrant=use_reentrant) for c in calls]
            for at in order:
                outs[at].sum().backward()
            for p in experts.parameters():
                p.grad = None


class Stale(RetainedForwards):
    """Answers from what it kept without looking."""

    def _same(self, kept, inputs):
        return kept.hidden_states.shape == inputs.hidden_states.shape


def test_these_tests_find_a_stale_output():
    """The comparison taken away: every kind of difference must show."""
    experts = module("torch")
    stale = Stale(experts.load(SMALL.rank).backend, "retain")
    x, index, w = call(experts, tokens=12)
    lora = Lora(dict(experts.lora), experts.scaling)
    for what in (*DIFFERENCES[:6], *SMALL.lora_shapes()):
        assert not _noticed(stale, what, x, index, w, lora)
        assert _noticed(experts.load(SMALL.rank), what, x, index, w, lora)


def _noticed(backend, what, x, index, w, lora):
    first, second = ((x, index, w, lora), difference(what, x, index, w, lora))
    record = recording.Record()
    with recording.into(record):
        for args in (first, second):
            inputs = make_inputs(*(t.detach() for t in args[:3]), args[3], SMALL, backend.compute_dtype)
            backend.forward(inputs, save=True)
    return record.retained == 0


@pytest.mark.slow
@every_backend
def test_200_steps_of_varying_sizes_do_not_grow(name):
    experts = module(name, shape=dataclasses.replace(SMALL, num_experts=6))
    held = []
    x, index, w = call(experts, tokens=90)
    step(experts, x, torch.tensor([0, 1]).expand_as(index), w, True)  # no later call has an expert with more rows
    del x, index, w
    for i in range(200):
        x, index, w = call(experts, tokens=1 + (37 * i) % 90, seed=i)
        step(experts, x, index, w, i % 2 == 0)
        del x, index, w
        if i % 20 == 19:
            gc.collect()
            held.append(sum(o.nbytes for o in gc.get_objects() if type(o) is torch.Tensor))
    assert max(held[1:]) <= held[1]


class Counted:
    """A backend, and how often it is asked."""

    def __init__(self, backend, count):
        self.backend, self.count = backend, count

    def forward(self, inputs, *, save):
        self.count["forward"] += 1
        return self.backend.forward(inputs, save=save)

    def backward(self, *args):
        self.count["backward"] += 1
        return self.backend.backward(*args)

    def __getattr__(self, name):
        return getattr(self.backend, name)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    factory = pytest.importorskip("factory")
    pytest.importorskip("llamafactory")
    return factory.Workspace(tmp_path_factory.mktemp("retained"))


@pytest.mark.parametrize("backend", ["torch", pytest.param("AMXBF16", marks=pytest.mark.kernel)])
@pytest.mark.parametrize(
    ("options", "computed"),
    [
        ({}, 1),  # LLaMA-Factory's default: reentrant
        ({"use_reentrant_gc": False}, 1),
        ({"gradient_accumulation_steps": 2}, 1),
        ({"packing": True}, 1),
        ({"kt_cpu_activation": "recompute"}, 2),
        ({"stage": "dpo"}, 3),  # the reference pass comes between a layer's forward and its recompute
    ],
    ids=lambda v: "-".join(v) or "default" if isinstance(v, dict) else None,
)
def test_llama_factory(workspace, backend, options, computed, monkeypatch):
    """How many forwards reach the backend for each backward."""
    count = {"forward": 0, "backward": 0}

    class Counting(RetainedForwards):
        def __init__(self, inner, mode):
            super().__init__(inner, mode)
            self.backend = Counted(inner, count)

    monkeypatch.setattr(ktmoe.experts, "RetainedForwards", Counting)
    keys = {"max_steps": 2, "kt_backend": backend, "save_strategy": "no", "kt_num_threads": 1, **options}
    workspace.run("-".join((backend, *options)), **keys)
    assert count["backward"] > 0
    assert count["forward"] == computed * count["backward"]
