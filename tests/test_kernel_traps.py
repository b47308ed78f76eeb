"""The kernel's traps, by the numbers of docs/kernel.md: each one refused, or worked around exactly."""

import copy
import dataclasses

import pytest
import torch
from helpers import KERNEL_BACKENDS, SMALL, call, draw, fitting, limits, loaded, module, run_python, weights

from ktmoe import KTConfig, KTError, MoEExperts
from ktmoe import experts as experts_module
from ktmoe.backends import TABLE
from ktmoe.backends import kt as kernel_module
from ktmoe.backends.kt import KernelBackend, valid_tp
from ktmoe.backends.kt.extension import Host
from ktmoe.gate import contract
from ktmoe.planning import plan
from ktmoe.types import MoEShape
from ktmoe.validation import make_inputs


every_kernel = pytest.mark.parametrize("name", KERNEL_BACKENDS)


@pytest.mark.parametrize(
    ("name", "changes", "argument"),
    [
        ("AMXBF16", {"hidden_size": 48}, "hidden_size"),
        ("AMXBF16", {"intermediate_size": 80}, "intermediate_size"),
        ("AMXInt8", {"hidden_size": 96}, "hidden_size"),
        ("AMXInt8", {"intermediate_size": 160}, "intermediate_size"),
        ("AMXBF16", {"rank": 129}, "lora_rank"),
        ("AMXInt4", {"hidden_size": 128, "intermediate_size": 192}, "intermediate_size"),
        ("AMXInt4", {"hidden_size": 128, "intermediate_size": 128, "num_experts": 6}, "num_experts"),
        ("AMXInt4", {"hidden_size": 128, "intermediate_size": 128, "rank": 9}, "lora_rank.*1 to 8"),
        ("AMXFP8", {"hidden_size": 192, "intermediate_size": 128}, "hidden_size"),
        ("AMXFP8", {"hidden_size": 128, "intermediate_size": 192}, "intermediate_size"),
    ],
)
def test_k2_shapes_that_crash_are_refused(name, changes, argument):
    """Without a kernel too: the message is the same on every host."""
    with pytest.raises(KTError, match=argument):
        plan(KTConfig(kt_backend=name), dataclasses.replace(SMALL, **changes))


def test_auto_takes_torch_for_shapes_that_the_kernel_cannot_take():
    decided = plan(KTConfig(), dataclasses.replace(SMALL, hidden_size=48))
    assert decided.backend == "torch"
    assert "hidden_size" in decided.note


@every_kernel
@pytest.mark.parametrize("factor", [60.0, 3000.0])
def test_k15_extreme_gates_are_right(name, factor):
    """A gate activation of -88.5 or less: the kernel's grad_input is NaN and two LoRA gradients lose the token."""
    backend, case = loaded(name, SMALL)
    x = case.hidden_states.clone()
    x[3] *= factor
    x[7] *= factor
    case = dataclasses.replace(case, hidden_states=x)
    expected = contract.specification(case)
    rows = contract.measure(case, contract.answer(backend, case), expected)
    assert contract.violations(rows, limits(name)) == []


@every_kernel
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["hidden_states", "grad_output", "top_k_weights"])
def test_k16_a_non_finite_token_reaches_every_gradient_it_should(name, bad, where):
    """One bad token must poison what it touches, as in any torch layer, and nothing else."""
    backend, case = loaded(name, SMALL)
    changed = getattr(case, where).clone()
    changed[5, 0] = bad
    bad_case = dataclasses.replace(case, **{where: changed})
    touched = set(case.top_k_index[5].tolist()) if where != "top_k_weights" else {case.top_k_index[5, 0].item()}
    out, got = contract.answer(backend, bad_case)
    expected_out, expected = contract.specification(bad_case)
    clean = contract.answer(backend, case)[1]
    others = torch.arange(len(changed)) != 5
    assert torch.equal(got.hidden_states[others], clean.hidden_states[others])
    assert torch.equal(got.top_k_weights[others], clean.top_k_weights[others])
    assert torch.equal(out[others].isfinite(), expected_out[others].isfinite())
    for mine, theirs in zip(got.lora, expected.lora, strict=True):
        for e in range(SMALL.num_experts):
            assert bool(mine[e].isfinite().all()) == bool(theirs[e].isfinite().all())
            if e not in touched:
                assert mine[e].isfinite().all()


def test_k17_k18_tensor_parallelism_is_cut_to_what_works():
    shape = MoEShape(8, 2048, 1408, 6, 8)
    assert [valid_tp("AMXBF16", shape, n) for n in (1, 2, 3, 4, 8)] == [1, 2, 2, 4, 4]
    assert valid_tp("AMXInt8", shape, 8) == 2
    assert valid_tp("AMXBF16", dataclasses.replace(shape, intermediate_size=32 * 5), 8) == 1  # 5 parts are never used


@every_kernel
@pytest.mark.parametrize("tp", [2, 3, 4])
def test_tensor_parallel_is_right(name, tp):
    case = draw(name, MoEShape(3, 64, 128 * tp if TABLE[name].stored else 64 * tp, 2, 4), 16, seed=1)
    backend = KernelBackend(name, case.weights, case.shape, scaling=2.0, tp=tp, threads=tp, max_len=64)
    rows = contract.measure(case, contract.answer(backend, case), contract.specification(case))
    assert contract.violations(rows, limits(name)) == []


@every_kernel
@pytest.mark.parametrize("share_backward", [True, False])
def test_both_kinds_of_backward_buffer(name, share_backward):
    """Two layers, each with other sizes, one after the other and interleaved."""
    if not share_backward and not TABLE[name].own_backward:
        with pytest.raises(KTError, match="kt_share_backward: got off"):
            plan(KTConfig(kt_backend=name, kt_share_backward="off"), fitting(name))
        return
    shapes = [SMALL, dataclasses.replace(SMALL, hidden_size=256, intermediate_size=192)]
    cases = [draw(name, s, 16, seed=2) for s in shapes]
    backends = [
        KernelBackend(name, c.weights, c.shape, scaling=2.0, max_len=64, share_backward=share_backward) for c in cases
    ]
    for _ in range(2):
        for backend, case in zip(backends, cases, strict=True):
            rows = contract.measure(case, contract.answer(backend, case), contract.specification(case))
            assert contract.violations(rows, limits(name)) == []


@every_kernel
def test_adapters_of_other_ranks_and_scales(name):
    """The kernel is built for one rank and scale; smaller ranks are padded, other scales carried by B."""
    backend, case = loaded(name, SMALL)
    contract.answer(backend, case)  # leaves the full rank in the kernel's copies
    lora = {n: (t[..., :3] if n.endswith("lora_B") else t[:, :3]).contiguous() for n, t in case.lora.tensors.items()}
    case = dataclasses.replace(case, lora=dataclasses.replace(case.lora, tensors=lora, scaling=0.7))
    rows = contract.measure(case, contract.answer(backend, case), contract.specification(case))
    assert contract.violations(rows, limits(name)) == []
    config = KTConfig(kt_backend=name)
    larger = MoEExperts(weights(name=name), top_k=2, r=4, config=config)
    larger(*call(larger))
    del larger  # its kernel object waits for the next layer, whose own rank counts all the same
    with pytest.raises(KTError, match=r"rank 3.*at most r = 2"):
        MoEExperts(weights(name=name), top_k=2, r=2, config=config).run(
            *call(module(name)), lora=dataclasses.replace(case.lora, tensors=lora)
        )


@every_kernel
def test_what_an_earlier_layer_left_is_verified_as_what_it_is(name, monkeypatch):
    """An object of a larger rank, built while nobody looked: the gate is asked about the rank that computes."""
    shape = dataclasses.replace(SMALL, num_experts=SMALL.num_experts + 1)
    for rank, verify in ((4, "off"), (2, "quick")):
        asked = []
        monkeypatch.setattr(experts_module, "ensure_verified", lambda p, s, c, asked=asked: asked.append(s.rank) or p)
        config = KTConfig(kt_backend=name, kt_verify=verify)
        made = MoEExperts(weights(shape, name=name), top_k=2, r=rank, config=config)
        del made
    assert asked == ([8] if TABLE[name].rank else [2, 4])


@every_kernel
def test_a_forked_child_gets_an_error_and_workers_live(name):
    done = run_python(f"""
        import os, torch
        from helpers import module, call
        from torch.utils.data import DataLoader
        experts = module({name!r})
        x, i, w = call(experts)
        experts(x, i, w).sum().backward()
        assert [b.item() for b in DataLoader(range(4), num_workers=2)] == [0, 1, 2, 3]
        read, write = os.pipe()
        if os.fork() == 0:
            try:
                experts(x, i, w)
            except Exception as error:
                os.write(write, f"{{type(error).__name__}}: {{error}}".encode())
            os._exit(0)
        os.wait()
        print(os.read(read, 4096).decode())
        experts(x, i, w).sum().backward()
    """)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("KTError: The routed experts were called in a forked process")


@every_kernel
def test_the_extension_keeps_off_stdout(name):
    done = run_python(f"""
        from helpers import module, call
        experts = module({name!r})
        experts(*call(experts)).sum().backward()
        print("only this")
    """)
    assert (done.returncode, done.stdout) == (0, "only this\n"), done.stderr


def test_an_unavailable_kernel_falls_back_and_says_so():
    """As on a CPU without AMX and AVX512-BF16: the extension's own variant switch."""
    done = run_python("""
        import os, warnings
        os.environ["KT_KERNEL_CPU_VARIANT"] = "avx512_base"
        from helpers import weights, call
        from ktmoe import KTConfig, MoEExperts
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for name in ("AMXBF16", "AMXInt8", "auto"):
                experts = MoEExperts(weights(), top_k=2, r=4, config=KTConfig(kt_backend=name))
                experts(*call(experts)).sum().backward()
                assert experts.plan.backend == "torch"
        found = [str(s.message) for s in said if "routed experts run on the torch backend" in str(s.message)]
        print(len(found), found[0])
    """)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 ktmoe: the routed experts run on the torch backend (no SFT kernel on this host")


def test_a_forced_variant_for_another_cpu_is_no_kernel_and_no_crash(tmp_path):
    """An AVX-512 variant on a CPU without it stops the process while it is imported."""
    (tmp_path / "kt_kernel.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    done = run_python(f"""
        import os, sys
        sys.path.insert(0, {str(tmp_path)!r})
        os.environ.update(KT_KERNEL_CPU_VARIANT="avx512_base", PYTHONPATH={str(tmp_path)!r})
        from ktmoe.backends import kt
        print(kt.available(), kt.variant())
    """)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("False KT_KERNEL_CPU_VARIANT is avx512_base, and this CPU cannot run that variant")


def test_bad_calls_are_refused():
    experts = module("torch")
    x, i, w = torch.zeros(5, 64), torch.zeros(5, 2, dtype=torch.int64), torch.zeros(5, 2)
    for args, message in [
        ((x.view(1, 5, 64), i, w), "hidden_states: got shape"),
        ((x[:, :63], i, w), "hidden_states: got shape"),
        ((x.long(), i, w), "hidden_states: got torch.int64"),
        ((x, i.float(), w), "top_k_index: got torch.float32"),
        ((x, i[:4], w), "top_k_index: got shape"),
        ((x, i, w[:4]), "top_k_weights: got shape"),
        ((x, i, w.bool()), "top_k_weights: got torch.bool"),
        ((None, i, w), "hidden_states: got NoneType"),
    ]:
        with pytest.raises(KTError, match=message):
            experts(*args)
    with pytest.raises(KTError, match="rank 8"):
        experts.run(x, i, w, _lora(8))
    with pytest.raises(KTError, match=r"down_proj.lora_B missing"):
        experts.run(x, i, w, _lora(4, drop="down_proj.lora_B"))
    with pytest.raises(KTError, match=r"up_proj.lora_A: got torch.float32 \(4, 4, 32\)"):
        experts.run(x, i, w, _lora(4, change="up_proj.lora_A"))


def _lora(rank, drop=None, change=None):
    from ktmoe.types import Lora

    tensors = {n: torch.zeros(s) for n, s in SMALL.lora_shapes(rank).items()}
    tensors.pop(drop, None)
    if change:
        tensors[change] = tensors[change][..., :32]
    return Lora(tensors, 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(top_k=0), "top_k: got 0"),
        (dict(top_k=5), "top_k: got 5; expected at most num_experts = 4"),
        (dict(top_k=2, r=-1), "r: got -1"),
        (dict(top_k=2, r=2.5), "r: got 2.5"),
    ],
)
def test_bad_modules_are_refused(arguments, message):
    with pytest.raises(KTError, match=message):
        MoEExperts(weights(), **arguments)


def test_weights_that_do_not_fit_together_are_refused():
    from ktmoe import ExpertWeights

    w = weights()
    for changes, message in [
        (dict(gate_proj=w.gate_proj[:3]), "hold .*3"),
        (dict(up_proj=w.up_proj[:, :32]), r"up_proj\[0\]"),
        (dict(down_proj=w.down_proj.float()), r"down_proj\[0\] is torch.float32"),
        (dict(gate_proj=w.gate_proj.to(torch.float8_e4m3fn)), "float8_e4m3fn"),
    ]:
        with pytest.raises(KTError, match=message):
            ExpertWeights(**({p: getattr(w, p) for p in ("gate_proj", "up_proj", "down_proj")} | changes))


def test_the_host_says_which_variant():
    assert kernel_module.variant()


@every_kernel
def test_a_closed_backend_says_so(name):
    case = draw(name, SMALL, 4)
    backend = KernelBackend(name, case.weights, case.shape, max_len=64)
    backend.close()
    with pytest.raises(KTError, match="closed"):
        contract.answer(backend, case)


@every_kernel
def test_the_callers_settings_do_not_reach_the_kernel(name):
    """torch.set_default_device("cuda") would give the kernel addresses on the GPU; "meta" gave it null pointers."""
    done = run_python(f"""
        import torch
        from helpers import call, gradients, relative, weights
        from ktmoe import KTConfig, MoEExperts
        held = weights(name={name!r})
        judge = MoEExperts(held, top_k=2, r=4, lora_alpha=8, config=KTConfig(kt_backend="reference"))
        for p in judge.parameters():
            p.data.normal_().mul_(0.1)
        x, i, w = call(judge)
        out = judge(x, i, w)
        expected = [out, *gradients(judge, out.sum(), x, w)]
        config = KTConfig(kt_backend={name!r}, kt_num_threads=1, kt_max_len=96)
        torch.set_default_device("meta")
        torch.set_default_dtype(torch.bfloat16)
        with torch.inference_mode():
            MoEExperts(held, top_k=2, config=config)(x, i, w)  # what it leaves behind is used again below
        experts = MoEExperts(held, top_k=2, r=4, lora_alpha=8, config=config)
        assert {{(p.device.type, p.dtype) for p in experts.parameters()}} == {{("cpu", torch.float32)}}
        for p, q in zip(experts.parameters(), judge.parameters(), strict=True):
            p.data.copy_(q.data)
        out = experts(x, i, w)
        got = [out, *gradients(experts, out.sum(), x, w)]
        assert all(relative(a, b) < 0.06 for a, b in zip(got, expected, strict=True))
        print("right")
    """)
    assert done.stdout == "right\n", done.stderr


@every_kernel
def test_an_interrupted_call_ends_before_its_tensors(name):
    """Ctrl-C between submitting a task and waiting for it left the kernel writing into freed memory."""
    done = run_python(f"""
        import random, signal, torch
        from helpers import call, gradients, module, relative
        experts = module({name!r})
        x, i, w = call(experts, tokens=200)
        def step():
            return gradients(experts, experts(x, i, w).sum(), x, w)
        expected = step()
        def interrupt(*args):
            raise KeyboardInterrupt
        signal.signal(signal.SIGALRM, interrupt)
        interrupted = 0
        for _ in range(150):
            try:
                signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-4, 8e-3))
                step()
                signal.setitimer(signal.ITIMER_REAL, 0)
            except (KeyboardInterrupt, RuntimeError) as error:
                # The signal may come within torch's own `with torch.no_grad()`, or in a finalizer, which swallows it.
                assert isinstance(error, KeyboardInterrupt) or "does not require grad" in str(error)
                interrupted += 1
                torch.set_grad_enabled(True)
        signal.setitimer(signal.ITIMER_REAL, 0)
        # Not the same bits: the kernel's threads add up in another order each time.
        print(interrupted > 20 and max(map(relative, step(), expected)) < 1e-6)
    """)
    assert done.stdout == "True\n", done.stderr


@every_kernel
@pytest.mark.parametrize("tp", [1, 2])
def test_k11_k34_what_objects_share_is_never_read_later(name, tp):
    """Two layers of one size: LoRA and scales that another one has overwritten since, with NaN, are nobody's."""
    shape = MoEShape(4, 128, 256, 2, 8)
    cases = [draw(name, shape, 16, seed=seed) for seed in (3, 4)]
    layers = [KernelBackend(name, c.weights, shape, scaling=2.0, tp=tp, threads=tp, max_len=64) for c in cases]
    expected = [contract.answer(layer, case) for layer, case in zip(layers, cases, strict=True)]
    mine, theirs = (layer._object for layer in layers)
    shared = [t for t in (*mine.lora, *mine.scales) if any(t is other for other in (*theirs.lora, *theirs.scales))]
    assert len(shared) == 4 + len(mine.scales)
    calls = [
        make_inputs(c.hidden_states, c.top_k_index, c.top_k_weights, c.lora, shape, torch.bfloat16) for c in cases
    ]
    saved = [layer.forward(inputs, save=True) for layer, inputs in zip(layers, calls, strict=True)]
    for tensor in shared:
        tensor.fill_(float("nan"))
    for layer, inputs, case, (out, ticket), answer in zip(layers, calls, cases, saved, expected, strict=True):
        assert layer.holds(ticket)
        grads = layer.backward(ticket, inputs, case.grad_output)
        again, _ = layer.forward(inputs, save=False)
        got = [out, again, grads.hidden_states, grads.top_k_weights, *grads.lora]
        wanted = [answer[0], answer[0], answer[1].hidden_states, answer[1].top_k_weights, *answer[1].lora]
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@every_kernel
def test_a_ticket_is_spent_by_a_call_that_is_interrupted(name, monkeypatch):
    """Ctrl-C right after the kernel's backward, which takes the activations off its cache, or after new LoRA."""
    backend, case = loaded(name, SMALL)
    call_ = case.hidden_states, case.top_k_index, case.top_k_weights
    inputs = make_inputs(*call_, case.lora, case.shape, torch.bfloat16)
    negated = {n: -t for n, t in case.lora.tensors.items()}
    other = make_inputs(*call_, dataclasses.replace(case.lora, tensors=negated), case.shape, torch.bfloat16)
    expected = contract.answer(backend, case)[1]
    real = Host.run

    def interrupted(self, task):
        real(self, task)
        raise KeyboardInterrupt

    for what in ("backward", "forward"):
        _, ticket = backend.forward(inputs, save=True)
        monkeypatch.setattr(Host, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            backend.backward(ticket, inputs, case.grad_output) if what == "backward" else backend.forward(
                other, save=True
            )
        monkeypatch.setattr(Host, "run", real)
        got = backend.backward(ticket, inputs, case.grad_output)
        assert all(map(torch.equal, got.lora, expected.lora))
        assert torch.equal(got.hidden_states, expected.hidden_states)


@every_kernel
def test_first_calls_from_several_threads(name):
    """One pool for all of them, and stdout is still there afterwards."""
    done = run_python(f"""
        import sys, threading
        from helpers import call, weights
        from ktmoe import KTConfig, MoEExperts
        from ktmoe.backends.kt.extension import Host
        sys.setswitchinterval(1e-6)
        config = KTConfig(kt_backend={name!r}, kt_num_threads=1, kt_max_len=64, kt_verify="off")
        layers = [MoEExperts(weights(seed=s, name={name!r}), top_k=2, config=config) for s in range(4)]
        threads = [threading.Thread(target=lambda m=m: m(*call(m))) for m in layers]
        [t.start() for t in threads]
        [t.join() for t in threads]
        print(len(Host._hosts))
    """)
    assert done.stdout == "1\n", done.stderr


@every_kernel
def test_the_kernel_can_be_neither_copied_nor_pickled(name):
    """A copy of the module has no kernel object of its own until it is called."""
    with pytest.raises(KTError, match="neither copied nor pickled"):
        copy.deepcopy(loaded(name, SMALL)[0])
    experts = module(name)
    other = copy.deepcopy(experts)
    assert torch.equal(other(*call(other)), experts(*call(experts)))


@pytest.mark.parametrize("name", ["torch", *KERNEL_BACKENDS])
def test_lazy_negative_views(name):
    experts = module(name)
    x, index, w = call(experts)
    expected = experts(x, index, w)
    assert torch.equal(experts(torch._neg_view(-x.detach()), index, torch._neg_view(-w.detach())), expected)


@pytest.mark.parametrize("name", ["reference", "torch", *KERNEL_BACKENDS])
def test_tensors_without_numbers_are_refused(name):
    """FakeTensorMode gave the kernel null pointers; the torch backend took LoRA on the meta device for zero."""
    done = run_python(f"""
        import torch
        from helpers import call, module
        from ktmoe import KTError
        from torch._subclasses.fake_tensor import FakeTensorMode

        experts = module({name!r})
        x, index, w = (t.detach() for t in call(experts))

        def refused(what, *args):
            try:
                experts(*args)
            except KTError as error:
                print(what in str(error))
            else:
                print("accepted")

        with FakeTensorMode(allow_non_fake_inputs=True):
            refused("no numbers", x, index, w)
            refused("no numbers", torch.empty(3, x.shape[1]), torch.zeros(3, 2, dtype=torch.int64), torch.empty(3, 2))
        refused("hidden_states: got a tensor on the meta device", x.to("meta"), index, w)
        refused("hidden_states: got layout torch.sparse_coo", x.to_sparse(), index, w)
        refused("top_k_weights: got layout torch.sparse_coo", x, index, w.to_sparse())
        experts.lora_A["up_proj"] = torch.nn.Parameter(torch.empty(4, 4, x.shape[1], device="meta"))
        refused("up_proj.lora_A: got a tensor on the meta device", x, index, w)
    """)
    assert done.stdout.split() == ["True"] * 6, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["torch", *KERNEL_BACKENDS])
@pytest.mark.parametrize("size", [(1, 4), (4, 8), (4, 2)])
def test_lora_replaced_before_the_backward_is_refused(name, size):
    """`.data = ...` goes past autograd; one expert's tensor would be spread over all of them, silently."""
    experts = module(name)
    parameter = experts.lora["up_proj.lora_A"]
    kept = parameter.data
    x, index, w = call(experts)
    loss = experts(x, index, w).sum()
    try:
        parameter.data = torch.zeros(*size, experts.hidden_size)
        with pytest.raises(KTError, match=r"up_proj\.lora_A"):
            loss.backward()
    finally:
        parameter.data = kept


def test_sparse_weights_are_refused():
    w = weights()
    with pytest.raises(KTError, match=r"layout torch.sparse_coo"):
        dataclasses.replace(w, gate_proj=w.gate_proj.to_sparse())
