"""Every backend against the specification, over drawn sizes, routings, scales and layouts.

How wrong may a sound backend be? That depends on the case: on one token, on sums that cancel, on a gate where silu
bends. So each case is also computed several times by the specification's formulas with every value that the backend
rounds moved at random within its rounding step. The backend's errors may be a few times the worst of these copies'
and no more; where no copy moves (idle experts, skipped slots) they must be exactly zero.
"""

import dataclasses
import functools
import random
from dataclasses import dataclass

import pytest
import torch
from helpers import BACKENDS, KERNELS, PACKS, draw, exact, fitting, needs_packing
from hypothesis import given
from hypothesis import strategies as st
from ktmoe_reference import LORA_NAMES, experts_forward
from mutants import GRADIENTS, INPUTS, OUTPUT, Mutant
from torch.nn.functional import silu

from ktmoe.autograd import run_experts
from ktmoe.backends import TABLE
from ktmoe.backends.kt.kernel import KernelBackend
from ktmoe.backends.reference import ReferenceBackend
from ktmoe.backends.torch import TorchBackend
from ktmoe.backends.torch.products import FromSource, Packed
from ktmoe.types import PROJECTIONS, Lora, MoEShape
from ktmoe.validation import check_call, check_lora


every_backend = pytest.mark.parametrize("name", BACKENDS)
GRANULE = {"AMXBF16": 32, "AMXInt8": 64, "AMXFP8": 128, "AMXInt4": 128}
TORCH = {  # dtype of rows and products, and what multiplies
    "source": (torch.bfloat16, FromSource),
    "cast": (torch.float32, FromSource),
}
if PACKS:
    TORCH["packed"] = (torch.bfloat16, functools.partial(Packed, rows=8, backward=True))
    TORCH["packed forward"] = (torch.bfloat16, functools.partial(Packed, rows=64, backward=False))
COPIES = 16
FACTOR = 5.0  # times the worst copy; that one is about twice the standard deviation
SMALLEST = 1e-30  # noise: what is smaller may underflow
TINY = 1e-300  # instead of a division by zero
BUILT_SCALING = 2.0


@dataclass(frozen=True)
class Layer:
    """What a backend is built for."""

    shape: MoEShape
    max_len: int
    tp: int
    share_backward: bool
    way: str = ""  # of the torch backend


@functools.cache
def layers(name):
    """150 layers, small ones first. Not more: every kind of kernel object keeps its memory to the end (K22)."""
    rng, found = random.Random(0), []
    for _ in range(150):
        e = rng.choice((4, 8) if name == "AMXInt4" else (1, 2, 3, 4, 5, 8))
        k = rng.randint(1, min(e, 4))
        tp = rng.choice((1, 1, 1, 1, 1, 1, 1, 2)) if name in KERNELS else 1
        h, i = (rng.choice((1, 1, 2, 2, 3, 4)) * GRANULE.get(name, 32) for _ in "hi")
        if name not in KERNELS:
            h, i = (n - rng.choice((0, 0, 3, 21, 31)) for n in (h, i))
        rank = rng.choice((1, 1, 2, 3, 4, 7, 8, 8, 15, 16, 17, 31, 32, 33, 64, 100, 128))
        share = rng.random() < 0.7 or not TABLE[name].own_backward
        layer = Layer(fitting(name, MoEShape(e, h, i * tp, k, rank)), rng.choice((32, 64)), tp, share)
        found.append(dataclasses.replace(layer, way=rng.choice(list(TORCH)) if name == "torch" else ""))
    return sorted(found, key=lambda d: (d.tp, d.shape.num_experts * d.shape.hidden_size * d.shape.intermediate_size))


def build(name, layer, seed):
    weights = draw(name, layer.shape, 1, seed).weights
    if name in KERNELS:
        sizes = dict(threads=layer.tp, tp=layer.tp, max_len=layer.max_len, share_backward=layer.share_backward)
        return KernelBackend(name, weights, layer.shape, scaling=BUILT_SCALING, **sizes)
    if name == "torch":
        dtype, products = TORCH[layer.way]
        return TorchBackend(weights, layer.shape, dtype, products(weights))
    return ReferenceBackend(weights, layer.shape)


lent = functools.lru_cache(maxsize=64)(build)  # what falls out gives its kernel object to the next layer of its kind
kept = functools.cache(build)


def built(name, layer, seed):
    """A backend: mostly one on a kernel object that has held other weights before. One kind cannot be used again."""
    return (kept if name == "AMXInt8" and not layer.share_backward else lent)(name, layer, seed)


@dataclass(frozen=True)
class Draw:
    """One example in plain values, for hypothesis to print."""

    layer: Layer
    weights_seed: int
    tokens: int
    ids: list  # the routing picks from these
    factors: list  # the routing weights are multiplied by some of these
    scale: float  # of hidden_states
    extreme: int  # so many rows are a thousand times larger
    dtype: torch.dtype
    layout: str
    rank: int | None  # None: no LoRA
    lora_scale: float
    lora_dtype: torch.dtype
    scaling: float
    meanwhile: Layer | None  # computes between forward and backward
    seed: int


@st.composite
def draws(draw, name):
    layer = draw(st.sampled_from(layers(name)))
    e, rank = layer.shape.num_experts, layer.shape.rank
    ids = st.one_of(st.integers(0, e - 1), st.sampled_from([-1, e, 2**31, 2**32, -(2**40)]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.float16]))
    half = dtype == torch.float16  # has room for ordinary sizes only
    return Draw(
        layer=layer,
        weights_seed=draw(st.integers(0, 1)),
        tokens=draw(st.integers(0, 60)),
        ids=draw(st.one_of(st.just(list(range(e))), st.lists(ids, min_size=1, max_size=6))),
        factors=draw(st.lists(st.sampled_from([1.0, -1.0, 0.0] + [1e3, 1e-3] * (not half)), min_size=1, max_size=4)),
        scale=1.0 if half else 10.0 ** draw(st.integers(-3, 2)),
        extreme=0 if half else draw(st.sampled_from([0, 0, 0, 1, 3])),
        dtype=dtype,
        layout=draw(st.sampled_from(["contiguous", "strided", "transposed"])),
        rank=draw(st.one_of(st.just(rank), st.integers(1, rank), st.none())),
        lora_scale=draw(st.sampled_from([1.0, 0.0, 0.1, 3.0])),
        lora_dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        scaling=draw(st.sampled_from([BUILT_SCALING, 0.25, 3.7])),
        meanwhile=draw(st.one_of(st.none(), st.sampled_from(layers(name)))),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


@dataclass(frozen=True)
class Call:
    """The tensors of a draw. All are bf16's values: no backend is charged for the rounding of what it is given."""

    hidden_states: torch.Tensor
    index: torch.Tensor
    routing: torch.Tensor
    lora: Lora | None
    grad_output: torch.Tensor

    @property
    def leaves(self):
        return [self.hidden_states, self.routing, *(self.lora or ())]


def call_of(d):
    g, shape = torch.Generator().manual_seed(d.seed), d.layer.shape

    def randn(*size, scale=1.0):
        return (torch.randn(*size, generator=g) * scale).to(torch.bfloat16)

    def pick(values):
        return torch.tensor(values)[torch.randint(len(values), (d.tokens, shape.top_k), generator=g)]

    x = randn(d.tokens, shape.hidden_size, scale=d.scale)
    x[: d.extreme] *= 1000
    routing = (torch.rand(d.tokens, shape.top_k, generator=g) * 0.9 + 0.1) * pick(d.factors)
    lora = None
    if d.rank is not None:
        scales = {"lora_A": 1.0, "lora_B": 0.3 * d.lora_scale}
        tensors = {
            n: randn(*size, scale=scales[n.split(".")[1]] * size[2] ** -0.5).to(d.lora_dtype)
            for n, size in shape.lora_shapes(d.rank).items()
        }
        lora = Lora(tensors, d.scaling)
    return Call(x.to(d.dtype), pick(d.ids), routing, lora, randn(*x.shape).to(d.dtype))


def laid_out(t, layout):
    """The same values with other strides."""
    if layout == "strided":
        return t.repeat_interleave(2, 1)[:, ::2]
    return t.t().contiguous().t() if layout == "transposed" else t


def gradients(out, leaves, grad_output):
    """Zeros where nothing depends on a leaf."""
    if not out.requires_grad:
        return [torch.zeros_like(t) for t in leaves]
    found = torch.autograd.grad(out, leaves, grad_output, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True)]


def answer(backend, call, layout="contiguous", meanwhile=None):
    """What a user gets: the output and the gradients of the leaves."""
    x = laid_out(call.hidden_states, layout).detach().requires_grad_()
    w = laid_out(call.routing, layout).detach().requires_grad_()
    lora = call.lora and Lora({n: t.clone().requires_grad_() for n, t in call.lora.tensors.items()}, call.lora.scaling)
    check_call(x, call.index, w, backend.shape)
    if lora:
        check_lora(lora, backend.shape)
    out = run_experts(backend, x, laid_out(call.index, layout), w, lora)
    if meanwhile:
        ones = torch.ones(5, meanwhile.shape.hidden_size)
        slots = torch.ones(5, meanwhile.shape.top_k)
        run_experts(meanwhile, ones, slots.long() - 1, slots, None)
    return [out.detach(), *gradients(out, [x, w, *(lora or ())], laid_out(call.grad_output, layout))]


def specification(weights, call):
    x, w, *lora = (t.double().requires_grad_() for t in call.leaves)
    tensors = dict(zip(LORA_NAMES, lora, strict=True)) if lora else None
    scaling = call.lora.scaling if lora else 1.0
    out = experts_forward(x, call.index, w, *exact(weights), tensors, scaling)
    return [out.detach(), *gradients(out, [x, w, *lora], call.grad_output.double())]


class Step:
    """Moves values at random within a rounding step: relative to the value, or to the largest of its row."""

    def __init__(self, generator, relative, of_row=False):
        self.generator, self.relative, self.of_row = generator, relative, of_row

    def __call__(self, t):
        size = t.abs().amax(-1, keepdim=True) if self.of_row else t.abs()
        return t + size * self.relative * torch.empty_like(t).uniform_(-1, 1, generator=self.generator)


class Rounded(torch.autograd.Function):
    """A value that is rounded on its way forward, its gradient on the way back; None: it is not."""

    @staticmethod
    def forward(ctx, t, forward, backward):
        ctx.backward_step = backward
        return forward(t) if forward else t.view_as(t)

    @staticmethod
    def backward(ctx, grad):
        return ctx.backward_step(grad) if ctx.backward_step else grad, None, None


def copies(name, weights, call):
    """`specification` with rounding, `COPIES` times: tensors with one more leading dimension."""
    g = torch.Generator().manual_seed(0)
    # bf16 products are summed in fp32 and rounded once; fp32 ones lose a few steps on the way.
    dtype, relative = (torch.float64, 2.0**-21) if name == "reference" else (torch.float32, 2.0**-8)
    step = Step(g, relative)
    int8 = Step(g, 0.5 / 127, of_row=True) if name == "AMXInt8" else None
    stacks = dict(zip(PROJECTIONS, exact(weights), strict=True))
    x, w, *lora = leaves = [t.to(dtype).expand(COPIES, *t.shape).clone().requires_grad_() for t in call.leaves]

    def handed(t, dtype, forward=None):  # gradients are handed out in the dtype of the tensor
        return Rounded.apply(Rounded.apply(t, None, Step(g, torch.finfo(dtype).eps)), forward, step)

    h = handed(x, call.hidden_states.dtype)
    if lora:
        tensors = call.lora.tensors
        ab = {n: handed(t, tensors[n].dtype, step) for n, t in zip(LORA_NAMES, lora, strict=True)}

    def linear(projection, e, v):
        weight = stacks[projection][e].to(dtype).expand(COPIES, -1, -1)
        if int8:
            weight = int8(weight)
        y = Rounded.apply(Rounded.apply(v, int8, step) @ weight.mT, step, int8)
        if lora:
            inner = Rounded.apply(v @ ab[f"{projection}.lora_A"][:, e].mT, step, step)
            y = y + call.lora.scaling * Rounded.apply(inner @ ab[f"{projection}.lora_B"][:, e].mT, step, step)
        return Rounded.apply(y, step, step)

    out = torch.zeros_like(x)
    for e in range(weights.num_experts):
        token, slot = torch.where(call.index == e)
        if len(token):
            v = Rounded.apply(h[:, token], None, step)
            act = Rounded.apply(silu(linear("gate_proj", e, v)), step, step)
            mid = Rounded.apply(act * linear("up_proj", e, v), step, step)
            out = out.index_add(1, token, linear("down_proj", e, mid) * w[:, token, slot, None])
    out = Rounded.apply(Rounded.apply(out, step, None), Step(g, torch.finfo(call.hidden_states.dtype).eps), None)
    return [out.detach(), *gradients(out, leaves, call.grad_output.to(dtype).expand(COPIES, -1, -1))]


def departures(error, expected):
    """Size and drift of every row's error, and the drift of all rows together: [copies, 2 rows + 1].

    Drift is the error's part along the expected row: little for rounding, and all of it for a wrong scale.
    """
    along = (error * expected).sum(-1)  # [copies, rows]
    drift = along.abs() / expected.norm(dim=-1).clamp_min(TINY)
    together = along.sum(-1, keepdim=True).abs() / expected.norm().clamp_min(TINY)
    return torch.cat([error.norm(dim=-1), drift, together], 1)


def excess(got, expected, noisy):
    """A tensor's worst departure from the specification, in those of the worst copy. [rows, n], [COPIES, rows, n]."""
    noise = (noisy - expected).square().mean((0, 2)).sqrt().unsqueeze(-1)  # [rows, 1]
    still = (noise == 0).squeeze(-1)
    if not torch.equal(got[still], expected[still]):
        return float("inf")
    noise = noise.clamp_min(SMALLEST)  # as the unit: every row counts by how exactly it can be known
    mine = departures((got - expected).unsqueeze(0) / noise, expected / noise)[0]
    worst = departures((noisy - expected) / noise, expected / noise).amax(0)
    return (mine / (worst + 1 / FACTOR)).nan_to_num(torch.inf).amax().item()


def judge(got, expected, noisy):
    """What is further from the specification than rounding can explain, and how far."""
    found = {}
    names = ("output", "hidden_states", "top_k_weights", *LORA_NAMES)[: len(got)]
    for name, mine, theirs, many in zip(names, got, expected, noisy, strict=True):
        if theirs.numel():
            rows = (-1, 1) if name == "top_k_weights" else (len(theirs), -1)  # slots; tokens or experts
            theirs = theirs.reshape(rows)
            found[name] = excess(mine.double().reshape(rows), theirs, many.double().reshape(COPIES, *theirs.shape))
    return {name: times for name, times in found.items() if times > FACTOR}


@needs_packing
def test_the_torch_backend_is_drawn_with_packed_weights():
    assert {layer.way for layer in layers("torch")} == {"source", "cast", "packed", "packed forward"}


@every_backend
@given(data=st.data())
def test_matches_the_specification(name, data):
    d = data.draw(draws(name))
    backend, call = built(name, d.layer, d.weights_seed), call_of(d)
    got = answer(backend, call, d.layout, d.meanwhile and built(name, d.meanwhile, 0))
    assert judge(got, specification(backend.weights, call), copies(name, backend.weights, call)) == {}


def within_a_step(got, expected):
    """As `close`, but for a step of bf16 of a row's largest number: other numbers of rows are summed otherwise."""
    return all(
        ((a - b).abs() <= 2.0**-7 * b.abs().amax(-1, keepdim=True)).all() for a, b in zip(got, expected, strict=True)
    )


def close(got, expected):
    """Equal bit for bit, but for what is too small to be a normal number."""
    return all(torch.allclose(a, b, rtol=0, atol=1e-36) for a, b in zip(got, expected, strict=True))


@every_backend
@given(data=st.data())
def test_what_holds_bit_for_bit(name, data):
    """Powers of two go through, B = 0 is no LoRA, and to the kernel a token is alone with its experts."""
    d = dataclasses.replace(data.draw(draws(name)), dtype=torch.float32)
    backend, call = built(name, d.layer, d.weights_seed), call_of(d)
    change = functools.partial(dataclasses.replace, call)
    out, x, w, *lora = answer(backend, call)
    assert close(answer(backend, change(grad_output=4 * call.grad_output)), [out, *(4 * t for t in (x, w, *lora))])
    assert close(answer(backend, change(routing=4 * call.routing)), [4 * out, 4 * x, w, *(4 * t for t in lora)])
    if lora:
        tensors = {n: torch.zeros_like(t) if n.endswith("lora_B") else t for n, t in call.lora.tensors.items()}
        zero = answer(backend, change(lora=dataclasses.replace(call.lora, tensors=tensors)))
        assert close(zero[:3], answer(backend, change(lora=None)))
    if name in KERNELS:
        half = torch.arange(d.tokens) % 2 == 0
        fields = {f: getattr(call, f)[half] for f in ("hidden_states", "index", "routing", "grad_output")}
        assert within_a_step(answer(backend, change(**fields))[:2], [out[half], x[half]])


@every_backend
def test_planted_faults_are_found(name):
    """The same judgement finds every fault of one line in an ordinary call of many tokens, or in one of few."""
    layer = Layer(
        fitting(name),
        64,
        1,
        True,
        "packed" if PACKS else "cast",
    )
    backend = built(name, layer, 0)
    missed = {n: {"inputs": f} for n, f in INPUTS.items()}
    missed |= {n: {"output": f} for n, f in OUTPUT.items()} | {n: {"gradients": f} for n, f in GRADIENTS.items()}
    for tokens in (60, 8):
        call = call_of(
            Draw(
                layer, weights_seed=0, tokens=tokens, ids=[0, 1, 2], factors=[1.0], scale=1.0, extreme=0,
                dtype=torch.float32, layout="contiguous", rank=4, lora_scale=1.0, lora_dtype=torch.float32,
                scaling=BUILT_SCALING, meanwhile=None, seed=0,
            )
        )  # fmt: skip
        expected, noisy = specification(backend.weights, call), copies(name, backend.weights, call)
        assert judge(answer(backend, call), expected, noisy) == {}
        for fault in list(missed):
            if judge(answer(Mutant(backend, **missed[fault]), call), expected, noisy):
                del missed[fault]
    assert missed == {}
