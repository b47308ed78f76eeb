"""The torch backend's own rooms: ways to multiply, rows, tickets, kept memory, and how it is chosen."""

import dataclasses
import functools
import threading
from pathlib import Path
from weakref import WeakSet

import pytest
import torch
from helpers import SMALL, call, chosen, needs_packing, relative, run_python, weights
from ktmoe_reference import LORA_NAMES

from ktmoe import memory
from ktmoe.backends import TABLE
from ktmoe.backends.torch import TorchBackend, backend, build, choice
from ktmoe.backends.torch.buffers import BUFFERS, Buffers
from ktmoe.backends.torch.products import FromSource, Packed
from ktmoe.backends.torch.rows import Rows, padded
from ktmoe.config import KTConfig
from ktmoe.experts import MoEExperts
from ktmoe.gate import contract
from ktmoe.interface import STATELESS
from ktmoe.types import ExpertWeights, Inputs, KTError, MoEShape
from ktmoe.validation import make_inputs


WAYS = {
    "bf16": (torch.bfloat16, FromSource),
    "fp32": (torch.float32, FromSource),
    "packed": (torch.bfloat16, functools.partial(Packed, rows=64, backward=True)),
    "packed forward": (torch.bfloat16, functools.partial(Packed, rows=64, backward=False)),
}
LIMITS = {name: TABLE["reference" if name == "fp32" else "torch"].expected for name in WAYS}
PACKED = [pytest.param(way, marks=needs_packing) for way in ("packed", "packed forward")]
every_way = pytest.mark.parametrize("way", ["bf16", "fp32", *PACKED])
SHAPES = {
    "small": SMALL,
    "odd": MoEShape(5, 71, 43, 3, 3),
    "r=1, top-1": MoEShape(3, 64, 96, 1, 1),
    "r=128": MoEShape(3, 128, 128, 2, 128),
}


def built(way, weights, shape):
    dtype, products = WAYS[way]
    return TorchBackend(weights, shape, dtype, products(weights))


def inputs_of(case, dtype=torch.bfloat16):
    x, index, w = case.hidden_states, case.top_k_index, case.top_k_weights
    return make_inputs(x, index, w, case.lora, case.shape, dtype)


def all_of(out, grads):
    return [out, grads.hidden_states, grads.top_k_weights, *grads.lora]


def same(first, second):
    return all(map(torch.equal, first, second))


@every_way
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("tokens", [1, 90])
def test_every_way_matches_the_specification(way, shape, tokens):
    case = contract.draw_case(shape, tokens, seed=0)
    got = contract.answer(built(way, case.weights, shape), case)
    rows = contract.measure(case, got, contract.specification(case))
    assert contract.violations(rows, LIMITS[way]) == []


class Lazy:
    """Matrices that are made when they are asked for, as those of quantised checkpoints."""

    def __init__(self, stacked):
        self.stacked, self.shape, self.dtype = stacked, stacked.shape, stacked.dtype

    def __len__(self):
        return len(self.stacked)

    def __getitem__(self, e):
        return self.stacked[e].clone()


@every_way
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("form", ["stacked", "sequence", "lazy", "turned"])
def test_weights_of_every_dtype_and_form(way, dtype, form, monkeypatch):
    monkeypatch.setattr("ktmoe.backends.torch.products._BLOCK", 2048)  # several blocks for each matrix
    case = contract.draw_case(SMALL, 40, seed=1)
    stacked = ExpertWeights(
        *(t.to(dtype) for t in (case.weights.gate_proj, case.weights.up_proj, case.weights.down_proj))
    )
    weights = {
        "stacked": lambda w: w,
        "sequence": lambda w: chosen(w, range(w.num_experts)),
        "lazy": lambda w: ExpertWeights(Lazy(w.gate_proj), Lazy(w.up_proj), Lazy(w.down_proj)),
        "turned": lambda w: ExpertWeights(*(p.mT.contiguous().mT for p in (w.gate_proj, w.up_proj, w.down_proj))),
    }[form](stacked)
    rows = contract.measure(case, contract.answer(built(way, weights, SMALL), case), contract.specification(case))
    assert contract.violations(rows, LIMITS[way]) == []


@every_way
def test_without_lora_is_as_with_zero_b(way, monkeypatch):
    monkeypatch.setattr("ktmoe.backends.torch.products._BLOCK", 2048)
    case = contract.draw_case(SMALL, 40, seed=1)
    b = built(way, case.weights, SMALL)
    zero = {n: torch.zeros_like(t) if n.endswith("lora_B") else t for n, t in case.lora.tensors.items()}
    inputs = inputs_of(dataclasses.replace(case, lora=dataclasses.replace(case.lora, tensors=zero)), b.compute_dtype)
    grad = case.grad_output.to(b.compute_dtype)
    found = []
    for some in (inputs, dataclasses.replace(inputs, lora=None)):
        out, ticket = b.forward(some, save=True)
        grads = b.backward(ticket, some, grad)
        found.append([out, grads.hidden_states, grads.top_k_weights])
    assert same(*found)


@every_way
@pytest.mark.parametrize("lora", [True, False], ids=["LoRA", "no LoRA"])
def test_kept_and_recomputed_gradients_are_the_same_bits(way, lora):
    case = contract.draw_case(SMALL, 70, seed=2)
    b = built(way, case.weights, SMALL)
    inputs = inputs_of(case, b.compute_dtype)
    inputs = inputs if lora else dataclasses.replace(inputs, lora=None)
    grad = case.grad_output.to(b.compute_dtype)
    _, ticket = b.forward(inputs, save=True)
    assert ticket != STATELESS
    kept, again = b.backward(ticket, inputs, grad), b.backward(STATELESS, inputs, grad)
    assert torch.equal(kept.hidden_states, again.hidden_states)
    assert torch.equal(kept.top_k_weights, again.top_k_weights)
    assert same(kept.lora or [], again.lora or [])
    assert (kept.lora is not None) == lora


def test_a_ticket_lives_until_its_backward_or_the_next_saving_forward():
    case = contract.draw_case(SMALL, 30, seed=3)
    b = built("bf16", case.weights, SMALL)
    inputs = inputs_of(case)
    other = dataclasses.replace(inputs, hidden_states=-inputs.hidden_states)
    expected = b.backward(STATELESS, inputs, case.grad_output)
    _, first = b.forward(inputs, save=True)
    b.forward(other, save=False)
    built("bf16", case.weights, SMALL).forward(other, save=True)
    assert b.holds(first)
    _, second = b.forward(other, save=True)
    assert not b.holds(first)
    assert b.holds(second)
    assert same(b.backward(first, inputs, case.grad_output).lora, expected.lora)
    assert b.holds(second), "a backward that recomputes touches nothing that is kept"
    b.backward(second, other, case.grad_output)
    assert not b.holds(second)
    assert b.holds(STATELESS)


def test_without_room_nothing_is_kept(monkeypatch):
    case = contract.draw_case(SMALL, 30, seed=3)
    b = built("bf16", case.weights, SMALL)
    inputs = inputs_of(case)
    out, ticket = b.forward(inputs, save=True)
    expected = all_of(out, b.backward(ticket, inputs, case.grad_output))
    monkeypatch.setattr(BUFFERS, "_limits", {torch.device("cpu"): 0})
    monkeypatch.setattr(BUFFERS, "_spare", [])
    out, ticket = b.forward(inputs, save=True)
    assert ticket == STATELESS
    assert same(all_of(out, b.backward(ticket, inputs, case.grad_output)), expected)


@every_way
def test_long_calls_run_in_chunks(way, monkeypatch):
    case = contract.draw_case(SMALL, 300, seed=4)
    b = built(way, case.weights, SMALL)
    whole = all_of(*contract.answer(b, case))
    used = []
    monkeypatch.setattr(backend, "_CHUNK", 100 * SMALL.top_k * SMALL.hidden_size * b.compute_dtype.itemsize)
    monkeypatch.setattr(backend, "Rows", lambda index, *rest: used.append(len(index)) or Rows(index, *rest))
    chunked = all_of(*contract.answer(b, case))
    assert used == [100, 100, 100, 6]
    for a, b in zip(chunked, whole, strict=True):
        assert relative(a, b) < (1e-6 if way == "fp32" else 1e-2)


@every_way
def test_a_nan_stays_in_its_token(way):
    case = contract.draw_case(SMALL, 50, seed=5)
    b = built(way, case.weights, SMALL)
    out, grads = contract.answer(b, case)
    token = int((case.top_k_index >= 0).all(-1).nonzero()[0])
    x = case.hidden_states.clone()
    x[token, 3] = float("nan")
    spoiled, theirs = contract.answer(b, dataclasses.replace(case, hidden_states=x))
    others = torch.arange(len(x)) != token
    assert spoiled[token].isnan().all()
    assert torch.equal(spoiled[others], out[others])
    assert torch.equal(theirs.hidden_states[others], grads.hidden_states[others])
    mine = torch.zeros(SMALL.num_experts, dtype=torch.bool)
    mine[case.top_k_index[token]] = True
    for name, a, expected in zip(LORA_NAMES, theirs.lora, grads.lora, strict=True):
        assert torch.equal(a[~mine], expected[~mine]), name
        assert a[mine].isnan().any((1, 2)).all(), name
    # What was computed with it is in no memory that the next call reads.
    assert same(all_of(*contract.answer(b, case)), all_of(out, grads))


@every_way
def test_infinite_and_huge_routing_weights(way):
    """The sum over experts splits weights in two parts for bf16."""
    case = contract.draw_case(SMALL, 10, seed=6)
    two = (case.top_k_index >= 0).all(-1).nonzero().flatten()[:3]
    w = case.top_k_weights.clone()
    w[two, 0] = torch.tensor([float("inf"), 1e37, float("nan")])
    b = built(way, case.weights, SMALL)
    out, _ = b.forward(inputs_of(dataclasses.replace(case, top_k_weights=w), b.compute_dtype), save=False)
    w = torch.zeros_like(w).index_put((two, torch.tensor(0)), torch.tensor(1.0))
    alone, _ = b.forward(inputs_of(dataclasses.replace(case, top_k_weights=w), b.compute_dtype), save=False)
    assert torch.equal(out[two[0]], alone[two[0]] * float("inf"))
    assert relative(out[two[1]].double() / 1e37, alone[two[1]]) < 0.01
    assert out[two[2]].isnan().all()
    others = torch.ones(len(w), dtype=torch.bool).index_fill(0, two, False)
    assert out[others].isfinite().all()


@every_way
def test_idle_experts_and_skipped_slots_are_exactly_zero(way):
    case = contract.draw_case(SMALL, 12, seed=7)
    index = torch.where(case.top_k_index == 1, -1, case.top_k_index)
    case = dataclasses.replace(case, top_k_index=index)
    out, grads = contract.answer(built(way, case.weights, SMALL), case)
    assert not grads.top_k_weights[index < 0].any()
    assert not out[(index < 0).all(-1)].any()
    assert all(not t[1].any() and not t[-1].any() and t[0].any() for t in grads.lora)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_over_slots_keeps_the_precision_of_the_routing_weights(dtype):
    g = torch.Generator().manual_seed(0)
    index, w = torch.randint(-1, 6, (50, 3), generator=g), torch.rand(50, 3, generator=g)
    rows = Rows(index, w, 6, pad=True)
    values = torch.randn(rows.total + 1, 40, generator=g).to(dtype)
    values[-1] = 0
    got = rows.combine(values)
    expected = (values[rows.of_slot].double() * w.double().unsqueeze(-1)).sum(1)
    step = torch.finfo(dtype).eps / 2
    assert ((got.double() - expected).abs() <= step * expected.abs() + 1e-6 + 2**-16 * step).all()
    assert got.dtype == dtype


def test_few_numbers_of_rows_occur():
    numbers = {padded(n) for n in range(1, 4097)}
    assert len(numbers) <= 60
    assert all(n <= padded(n) <= max(n + 7, n * 1.13) for n in range(1, 10_000))


def test_nothing_grows_over_steps_of_varying_sizes(monkeypatch):
    """Workspaces and kept activations of three layers, over 200 steps: one of each, of the largest step's size."""
    monkeypatch.setattr(BUFFERS, "_spare", [])
    monkeypatch.setattr(BUFFERS, "_lent", WeakSet())  # other tests' layers may wait for a backward
    case = contract.draw_case(SMALL, 300, seed=8)
    layers = [built("bf16", case.weights, SMALL) for _ in range(3)]
    g = torch.Generator().manual_seed(0)
    grown = None
    for n in (*range(5, 307, 43), 306, *torch.randint(1, 307, (200,), generator=g).tolist()):
        some = contract.first_rows(case, n)
        inputs = inputs_of(some)
        tickets = [b.forward(inputs, save=True)[1] for b in layers]
        for b, ticket in zip(layers, tickets, strict=True):
            b.backward(ticket, inputs, some.grad_output)
        assert not BUFFERS._lent
        assert len(BUFFERS._spare) == len(layers)
        grown = grown or (_bytes(BUFFERS) if n == 306 else None)
    # Rows are padded by expert: a smaller call may need a little more than the largest.
    assert _bytes(BUFFERS) <= 1.15 * grown


def test_the_last_one_to_close_takes_the_memory_along():
    buffers = Buffers()
    one, two = object.__new__(TorchBackend), object.__new__(TorchBackend)
    buffers.join(one)
    buffers.join(two)
    buffers.workspace("rows", (10, 10), torch.empty(0))
    buffers.give_back(buffers.borrow(1000, torch.device("cpu")))
    buffers.leave(one)
    assert _bytes(buffers) > 0
    del two
    buffers.leave(one)
    assert _bytes(buffers) == 0


def _bytes(buffers):
    return sum(s.size for s in (*buffers._workspaces.values(), *buffers._spare, *buffers._lent))


def test_closed_experts_say_so():
    case = contract.draw_case(SMALL, 4, seed=0)
    b = built("bf16", case.weights, SMALL)
    _, ticket = b.forward(inputs_of(case), save=True)
    b.close()
    b.close()
    with pytest.raises(KTError, match="were closed"):
        b.forward(inputs_of(case), save=False)
    with pytest.raises(KTError, match="were closed"):
        b.backward(ticket, inputs_of(case), case.grad_output)


def test_layers_in_several_threads_do_not_mix():
    cases = [contract.draw_case(SMALL, 60, seed) for seed in range(4)]
    layers = [built("bf16", c.weights, SMALL) for c in cases]
    expected = [all_of(*contract.answer(b, c)) for b, c in zip(layers, cases, strict=True)]
    wrong = []

    def work(i):
        for _ in range(10):
            if not same(all_of(*contract.answer(layers[i], cases[i])), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []


@pytest.fixture
def bf16_pays(monkeypatch):
    monkeypatch.setattr(choice, "why_not_bf16", lambda packed: "")


@pytest.mark.usefixtures("bf16_pays")
@pytest.mark.parametrize(
    ("free", "copies"), [(32, "forward and backward, 2.0 x"), (30, "the forward, 1.0 x"), (27, "no copy")]
)
def test_memory_decides_on_copies(free, copies, monkeypatch):
    """In GiB, of 100: a quarter is left alone. The layer has three."""
    matrix = torch.empty(1, 1, 1, dtype=torch.bfloat16).expand(512, 1024, 1024)
    monkeypatch.setattr(memory, "total", lambda: 100 * 2**30)
    monkeypatch.setattr(memory, "available", lambda: free * 2**30)
    monkeypatch.setattr(choice, "Packed", lambda weights, rows, backward: FromSource(weights))
    said = []
    monkeypatch.setattr(choice, "say_once", said.append)
    build(ExpertWeights(matrix, matrix, matrix), MoEShape(512, 1024, 1024, 2, 8))
    assert copies in said[0]


@pytest.mark.usefixtures("bf16_pays")
@pytest.mark.parametrize(
    "packing", ["off", *(pytest.param(p, marks=needs_packing) for p in ("auto", "both", "forward"))]
)
def test_the_key_reaches_the_layer(packing, recwarn):
    weights = contract.draw_case(SMALL, 1, seed=0).weights
    config = KTConfig(kt_backend="torch", kt_torch_packing=packing)
    experts = MoEExperts(weights, top_k=2, r=4, config=config)
    products = experts._backend.backend._products
    assert experts._backend.compute_dtype == torch.bfloat16
    assert isinstance(products, FromSource if packing == "off" else Packed)
    if packing != "off":
        assert bool(products._down_backward) == (packing != "forward")


@needs_packing
def test_new_weights_are_packed_anew(bf16_pays):
    first, second = (contract.draw_case(SMALL, 20, seed) for seed in (0, 1))
    experts = MoEExperts(first.weights, top_k=2, config=KTConfig(kt_backend="torch", kt_torch_packing="both"))
    call = first.hidden_states, first.top_k_index, first.top_k_weights
    before = experts(*call)
    experts.use_weights(second.weights)
    expected = TorchBackend(second.weights, SMALL).forward(Inputs(*call, None), save=False)[0]
    assert relative(experts(*call), expected) < 0.01
    assert relative(before, expected) > 0.5


def test_where_bf16_is_slow_products_are_fp32(monkeypatch):
    said = []
    monkeypatch.setattr(choice, "say_once", said.append)
    monkeypatch.setattr(choice, "why_not_bf16", lambda packed: "this CPU has no instructions for bfloat16")
    weights = contract.draw_case(SMALL, 1, seed=0).weights
    for packing in ("auto", "off", "both"):
        assert build(weights, SMALL, packing).compute_dtype == torch.float32
    assert "float32" in said[0]
    assert "no instructions" in said[0]
    assert ["of no use" in line for line in said] == [False, False, True]


def test_the_measurement_compares_both(monkeypatch):
    """Whichever is faster on this host, by the times that were taken."""
    monkeypatch.setattr(choice, "Packed", lambda weights, rows, backward: FromSource(weights))
    for half, full, pays in ((1.0, 1.0, True), (1.0, 0.5, False)):
        times = iter((half, half, full, full))
        monkeypatch.setattr(choice, "_fastest", lambda run, times=times: next(times))
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
        assert (choice._compared(packed=True) == "") == pays
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert "no instructions" in choice._compared(packed=True)


def test_a_measurement_leaves_the_users_random_numbers_alone(monkeypatch, tmp_path):
    """The first run on a machine measures, and begins with the same LoRA as every later one."""
    monkeypatch.setenv("KTMOE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(choice, "_fastest", lambda run: 1.0)
    found = []
    for _ in range(2):  # measured, then read
        choice.why_not_bf16.cache_clear()
        torch.manual_seed(5)
        experts = MoEExperts(weights(), top_k=SMALL.top_k, r=2, config=KTConfig(kt_backend="torch"))
        experts(*call(experts))
        found.append(torch.rand(4))
    choice.why_not_bf16.cache_clear()
    assert torch.equal(*found)


def test_what_was_measured_is_kept(monkeypatch, tmp_path):
    """A run that is resumed computes as before, also on a machine that is busy now."""
    monkeypatch.setenv("KTMOE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(choice, "_compared", lambda packed: "fp32 was faster")
    choice.why_not_bf16.cache_clear()
    assert choice.why_not_bf16(packed=True) == "fp32 was faster"
    monkeypatch.setattr(choice, "_compared", lambda packed: "")
    choice.why_not_bf16.cache_clear()
    assert choice.why_not_bf16(packed=True) == "fp32 was faster"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    choice.why_not_bf16.cache_clear()
    assert choice.why_not_bf16(packed=True) == ""
    choice.why_not_bf16.cache_clear()


@needs_packing
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory NOT measured: no /proc on this system")
def test_packed_copies_take_twice_the_weights_and_no_more():
    """A temporary beside each copy left a hole of its size, which glibc's malloc does not find again."""
    done = run_python("""
        import torch
        from pathlib import Path
        from ktmoe.backends.torch.products import Packed
        from ktmoe.types import ExpertWeights

        def anonymous():
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))

        # 2 MB and 1 MB: the first one that is freed tells malloc to keep such sizes in its heap.
        gate, up, down = torch.randn(3, 24, 1024, 1024).bfloat16()
        weights = ExpertWeights(gate[:, :512], up[:, :512], down[:, :, :512])
        before = anonymous()
        packed = Packed(weights, 64, backward=True)
        print((anonymous() - before) / weights.nbytes())
    """)
    assert done.returncode == 0, done.stderr
    assert 1.9 < float(done.stdout) < 2.25
