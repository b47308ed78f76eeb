"""What the code around the experts does to any module: optimizers, hooks, copies, transforms, busy threads."""

import copy
import hashlib
import io
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from helpers import BF16_BACKENDS, BF16_KERNELS, SMALL, call, gradients, module, relative, weights
from torch.autograd import forward_ad

from ktmoe import KTConfig, MoEExperts


every_backend = pytest.mark.parametrize("name", BF16_BACKENDS)


def fresh(name, seed=0):
    """A module that a test may change, with the LoRA of `module(name, seed=seed)`."""
    config = KTConfig(kt_backend=name, kt_max_len=256, kt_num_threads=1)
    experts = MoEExperts(weights(), top_k=SMALL.top_k, r=SMALL.rank, lora_alpha=2 * SMALL.rank, config=config)
    g = torch.Generator().manual_seed(seed)
    for p in experts.parameters():
        p.data = torch.randn(p.shape, generator=g) * 0.1
    return experts


@pytest.fixture
def experts(name):
    made = fresh(name)
    yield made
    made.close()


def equal(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def trained(name):
    """A digest of the LoRA after a few steps of two optimizers that use OpenMP for the large parameter beside it."""
    experts = fresh(name)
    x, index, w = call(experts)
    dense = torch.nn.Parameter(torch.randn(2**20, generator=torch.Generator().manual_seed(0)))
    for kind in ("fused", "foreach"):
        optimizer = torch.optim.AdamW([dense, *experts.parameters()], lr=0.01, **{kind: True})
        for _ in range(10):
            experts(x.detach() + dense.view(-1, 64)[-10:], index, w.detach()).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    values = b"".join(p.detach().numpy().tobytes() for p in (dense, *experts.parameters()))
    experts.close()
    return hashlib.sha256(values).hexdigest()


@pytest.mark.parametrize("name", BF16_KERNELS[:1])
def test_more_busy_threads_than_cores(name):
    """The kernel's threads wait by spinning. Beside OpenMP's it is slower then, but neither stuck nor different."""
    code = f"import torch, test_clients; torch.set_num_threads(2); print(test_clients.trained({name!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [trained(name)]


@every_backend
def test_groups_clipping_and_accumulation(name, experts):
    """LoRA+ gives B a larger learning rate; gradients are summed over two calls, clipped, and zeroed in place."""
    groups = [
        dict(params=[p for n, p in experts.named_parameters() if f"lora_{side}" in n], lr=lr)
        for side, lr in (("A", 0.01), ("B", 0.16))
    ]
    optimizer = torch.optim.SGD(groups, foreach=True)
    for step in range(3):
        calls = [call(experts, seed=2 * step + i) for i in range(2)]
        summed = [sum(g) for g in zip(*(gradients(experts, experts(*c).square().sum()) for c in calls), strict=True)]
        norm = torch.stack([g.norm() for g in summed]).norm()
        rates = [0.01 if "lora_A" in n else 0.16 for n, _ in experts.named_parameters()]
        expected = [
            p.detach() - lr * g / norm for p, g, lr in zip(experts.parameters(), summed, rates, strict=True)
        ]  # fmt: skip
        for c in calls:
            experts(*c).square().sum().backward()
        torch.testing.assert_close(torch.nn.utils.clip_grad_norm_(experts.parameters(), 1.0), norm)
        optimizer.step()
        torch.testing.assert_close([p.detach() for p in experts.parameters()], expected)
        optimizer.zero_grad(set_to_none=False)
        assert not any(p.grad.any() for p in experts.parameters())


@every_backend
def test_an_optimizer_inside_the_backward(name, experts):
    x, index, w = call(experts)
    found = gradients(experts, experts(x, index, w).sum())
    expected = [p.detach() - 0.1 * g for p, g in zip(experts.parameters(), found, strict=True)]
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in experts.parameters()}
    for p in optimizers:
        p.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
    experts(x, index, w).sum().backward()
    torch.testing.assert_close([p.detach() for p in experts.parameters()], expected)


@every_backend
def test_only_some_tensors_train(name, experts):
    x, index, w = call(experts)
    leaves = [x, w, *experts.parameters()]
    expected = gradients(experts, experts(x, index, w).square().sum(), x, w)
    for leaf, gradient in zip(leaves, expected, strict=True):
        for other in leaves:
            other.requires_grad_(other is leaf)
        (found,) = torch.autograd.grad(experts(x, index, w).square().sum(), leaf)
        assert torch.equal(found, gradient)


def views_of_one_vector(tensors):
    parts = torch.cat([t.flatten() for t in tensors]).split([t.numel() for t in tensors])
    return [part.view_as(t) for part, t in zip(parts, tensors, strict=True)]


LAYOUTS = {
    "new": lambda tensors: [t.clone() for t in tensors],
    "transposed": lambda tensors: [t.mT.contiguous().mT for t in tensors],
    "views of one vector": views_of_one_vector,
}


@every_backend
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_parameters_swapped_between_steps(name, experts, layout):
    """As for an evaluation with averaged weights: other tensors under the same parameters, and back."""
    x, index, w = call(experts)
    mine = [p.data for p in experts.parameters()]
    before = gradients(experts, experts(x, index, w).square().sum(), x, w)
    averaged = module(name, seed=3)
    for p, t in zip(experts.parameters(), layout([p.detach() for p in averaged.parameters()]), strict=True):
        p.data = t
    assert relative(experts(x, index, w), averaged(x, index, w)) < 1e-6
    for p, t in zip(experts.parameters(), mine, strict=True):
        p.data = t
    assert equal(gradients(experts, experts(x, index, w).square().sum(), x, w), before)


@every_backend
@pytest.mark.parametrize("which", range(9))
def test_what_changes_between_forward_and_backward_is_noticed(name, experts, which):
    x, index, w = (t.detach().clone() for t in call(experts))
    out = experts(x, index, w)
    with torch.no_grad():
        [x, index, w, *experts.parameters()][which].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@every_backend
@pytest.mark.parametrize("assign", [True, False])
def test_saved_and_loaded_state(name, experts, assign):
    x, index, w = call(experts)
    file = io.BytesIO()
    torch.save(module(name, seed=3).state_dict(), file)
    file.seek(0)
    experts.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    assert torch.equal(experts(x, index, w), module(name, seed=3)(x, index, w))
    assert all(g.any() for g in gradients(experts, experts(x, index, w).sum()))


@every_backend
def test_hooks(name, experts):
    x, index, w = call(experts)
    plain = experts(x, index, w)
    expected = gradients(experts, plain.sum(), x, w)
    seen = []
    experts.register_forward_hook(lambda module, args, out: out * 2)
    experts.register_full_backward_hook(lambda module, grads, out: seen.append((grads, out)))
    next(experts.parameters()).register_hook(lambda g: g * 4)
    out = experts(x, index, w)
    assert torch.equal(out, 2 * plain)
    found = gradients(experts, out.sum(), x, w)
    assert equal(found, [(8 if i == 2 else 2) * g for i, g in enumerate(expected)])
    (((grad_x, _, grad_w), (grad_out,)),) = seen
    assert equal([grad_x, grad_w, grad_out], [found[0], found[1], torch.ones_like(out)])


@every_backend
def test_saved_tensors_may_be_moved_away(name, experts):
    x, index, w = call(experts)
    expected = gradients(experts, experts(x, index, w).sum(), x, w)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        out = experts(x, index, w)
    assert equal(gradients(experts, out.sum(), x, w), expected)


@every_backend
def test_inference_mode(name, experts):
    x, index, w = call(experts)
    out = experts(x, index, w)
    alone = gradients(experts, out.sum(), x, w)
    with torch.inference_mode():
        assert torch.equal(experts(x, index, w), out)
        experts(*call(experts, tokens=3))
    assert equal(gradients(experts, out.sum(), x, w), alone)


@every_backend
def test_a_backward_that_outlives_its_module(name):
    """In another thread, after the module is gone and its successor has run on the kernel object it had."""
    first = fresh(name)
    x, index, w = call(first)
    leaves = [x, w, *first.parameters()]
    expected = gradients(first, first(x, index, w).sum(), x, w)
    out, found = first(x, index, w).sum(), []
    del first
    successor = fresh(name, seed=3)
    successor(x, index, w)
    thread = threading.Thread(target=lambda: found.extend(torch.autograd.grad(out, leaves)))
    thread.start()
    thread.join()
    successor.close()
    assert equal(found, expected)


@every_backend
def test_functional_call(name, experts):
    other = module(name, seed=3)
    given = {n: p.detach().clone().requires_grad_() for n, p in other.named_parameters()}
    x, index, w = call(experts)
    out = torch.func.functional_call(experts, given, (x, index, w))
    assert torch.equal(out, other(x, index, w))
    found = torch.autograd.grad(out.sum(), list(given.values()))
    assert equal(found, gradients(other, other(x, index, w).sum()))


@every_backend
def test_transforms_that_it_does_not_know_are_refused(name, experts):
    """A kernel has one backward: no vmap, no forward mode."""
    x, index, w = (t.detach() for t in call(experts))

    def run(h):
        return experts(h, index, w)

    one = torch.ones_like(x)
    for transform in (
        lambda: torch.func.grad(lambda h: run(h).sum())(x),
        lambda: torch.func.vjp(run, x),
        lambda: torch.func.jvp(run, (x,), (one,)),
        lambda: torch.func.vmap(run)(x.expand(3, -1, -1)),
    ):
        with pytest.raises(RuntimeError, match="setup_context"):
            transform()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=r"jvp|forward AD"):
        run(forward_ad.make_dual(x, one))


@pytest.mark.parametrize("name", BF16_BACKENDS[1:])
def test_a_batch_of_gradients_is_refused(name, experts):
    """The reference, which is autograd's own, can do it."""
    x, index, w = call(experts)
    out = experts(x, index, w)
    with pytest.raises(RuntimeError, match=r"vmap|storage|[Bb]atching rule"):
        torch.autograd.grad(out, x, torch.ones(3, *out.shape), is_grads_batched=True)


@pytest.mark.parametrize("name", ["reference", "torch"])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies(name, experts, copied):
    other = copied(experts)
    x, index, w = call(experts)
    expected = experts(x, index, w)
    assert torch.equal(other(x, index, w), expected)
    with torch.no_grad():
        next(other.parameters()).zero_()
    assert torch.equal(experts(x, index, w), expected)
    assert not torch.equal(other(x, index, w), expected)


@pytest.mark.parametrize("name", [BF16_BACKENDS[1], BF16_KERNELS[0]])
def test_copies_of_what_is_not_loaded_yet(name):
    base = MoEExperts(weights(), top_k=2, config=KTConfig(kt_backend=name, kt_max_len=256, kt_num_threads=1))
    other = copy.deepcopy(base)
    x, index, w = call(base)
    assert torch.equal(other(x, index, w), base(x, index, w))
    base.close()
    other.close()
