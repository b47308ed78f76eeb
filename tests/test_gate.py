"""The two checks before the kernel: what passes, what does not, and that nothing wrong gets through."""

import dataclasses
import functools
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from helpers import KERNEL_BACKENDS, SMALL, chosen, fitting, loaded, run_python, weights
from mutants import changed, rows

from ktmoe import KernelError, KTConfig, KTError, MoEExperts, kept
from ktmoe.backends import TABLE
from ktmoe.backends.kt import KernelBackend
from ktmoe.backends.kt.extension import Host
from ktmoe.backends.torch import TorchBackend
from ktmoe.exits import run
from ktmoe.gate import certificate, contract, distance, gate, load_probe
from ktmoe.planning import plan


every_kernel = pytest.mark.parametrize("name", KERNEL_BACKENDS)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KTMOE_CACHE_DIR", str(tmp_path))
    return tmp_path / "gate"


@every_kernel
def test_the_contract_gate_passes_once_and_leaves_a_certificate(name, cache, monkeypatch):
    config = KTConfig(kt_backend=name, kt_num_threads=1, kt_max_len=64)
    shape = fitting(name)
    decided = plan(config, shape)
    assert gate.ensure_verified(decided, shape, config) == decided
    (written,) = cache.glob("*.json")
    found = json.loads(written.read_text())
    assert found["subject"]["shape"] == dataclasses.asdict(contract.reduced(shape))
    monkeypatch.setattr(gate, "_run_gate", lambda *args: pytest.fail("the certificate was not used"))
    gate.ensure_verified(decided, shape, config)


@every_kernel
@pytest.mark.parametrize(
    "change", [None, "shape", "_extension_hash", "cpu_model", "_code_hash", "host", "torn", "edited", "renamed"]
)
def test_a_certificate_for_something_else_is_not_believed(name, cache, monkeypatch, change):
    config = KTConfig(kt_backend=name, kt_num_threads=1, kt_max_len=64)
    shape, ran = fitting(name), []
    decided = plan(config, shape)
    monkeypatch.setattr(gate, "_run_gate", lambda *args: ran.append(args) or [])
    gate.ensure_verified(decided, shape, config)
    (written,) = cache.glob("*.json")
    if change == "shape":
        shape = dataclasses.replace(shape, intermediate_size=256)
    elif change == "torn":
        written.write_text(written.read_text()[:-10])
    elif change in ("edited", "renamed"):  # one that passed for another rank, made to look like the one that is needed
        shape = dataclasses.replace(shape, rank=5)
        text = written.read_text()
        written.write_text(text.replace('"rank": 4', '"rank": 5') if change == "edited" else text)
        written.rename(kept._path(certificate.subject(decided, contract.reduced(shape))))
    elif change is not None:
        monkeypatch.setattr(certificate, change, lambda: "another")
    gate.ensure_verified(decided, shape, config)
    assert len(ran) == (1 if change is None else 2)


@every_kernel
def test_a_full_check_runs_at_every_start(name, cache, monkeypatch):
    monkeypatch.setattr(Host, "_hosts", {})  # no idle object of another test serves: a larger rank is checked as well
    config = KTConfig(kt_backend=name, kt_num_threads=1, kt_max_len=64, kt_verify="full")
    ran = []
    monkeypatch.setattr(gate, "_run_gate", lambda about, level: ran.append(level) or [])
    dtypes = []
    real = gate.probe_problems
    monkeypatch.setattr(gate, "probe_problems", lambda *args: dtypes.append(args[3].dtype) or real(*args))
    for _ in range(2):
        MoEExperts(weights(name=name), top_k=2, r=4, config=config)
    assert ran == ["full", "full"]
    assert dtypes == [torch.float32] * 2
    shape = fitting(name)
    assert gate.run_contract(certificate.subject(plan(config, shape), contract.reduced(shape)), "full") == []


@every_kernel
def test_switched_off_checks_are_announced(name, cache, monkeypatch):
    monkeypatch.setattr(gate, "_run_gate", lambda *args: pytest.fail("checked"))
    monkeypatch.setattr(gate, "probe_problems", lambda *args: pytest.fail("checked"))
    monkeypatch.setattr("ktmoe.notices._said", set())
    with pytest.warns(UserWarning, match=f"kt_verify: off, so nothing has checked that {name}"):
        MoEExperts(weights(name=name), top_k=2, r=4, config=KTConfig(kt_backend=name, kt_verify=False, kt_max_len=64))


@every_kernel
@pytest.mark.parametrize(
    ("end", "message"),
    [("import os; os.kill(os.getpid(), 11)", "was killed by signal 11"), ("raise RuntimeError('boom')", "boom")],
)
def test_a_kernel_that_crashes_in_the_gate_is_an_error(name, cache, monkeypatch, end, message):
    real = gate.subprocess.run
    monkeypatch.setattr(
        gate.subprocess, "run", lambda command, **kw: real([command[0], "-c", end], **kw)
    )  # the child process really dies
    config = KTConfig(kt_backend=name, kt_max_len=64)
    with pytest.raises(KernelError, match=message):
        MoEExperts(weights(name=name), top_k=2, r=4, config=config)
    assert not list(cache.glob("*.json"))


@every_kernel
def test_fallback_to_torch_is_allowed_and_announced(name, cache, monkeypatch):
    monkeypatch.setattr(gate, "_run_gate", lambda *args: ["output: relative error 0.5, limit 0.05"])
    config = KTConfig(kt_backend=name, kt_fallback="torch", kt_max_len=96 if name == "AMXInt8" else 160)
    with pytest.warns(UserWarning, match="failed the contract gate(.|\n)*relative error 0.5"):
        experts = MoEExperts(weights(name=name), top_k=2, r=4, config=config)
    assert experts.plan.backend == "torch"
    assert isinstance(experts.load(4).backend, TorchBackend)


class Broken:
    """A kernel stand-in: right, but for one planted fault."""

    def __init__(self, backend, fault):
        self.backend, self.fault = backend, fault
        self.shape, self.compute_dtype, self.int8 = backend.shape, backend.compute_dtype, backend.int8

    def forward(self, inputs, *, save):
        out, ticket = self.backend.forward(inputs, save=save)
        return (-out if self.fault == "sign" else out), ticket

    def backward(self, ticket, inputs, grad_output):
        grads = self.backend.backward(ticket, inputs, grad_output)
        if self.fault == "2 % scale":
            grads.lora[3] *= 1.02
        elif self.fault == "one expert stale":
            grads.lora[0][1] = grads.lora[0][0]
        elif self.fault == "an idle expert moves":
            grads.lora[5][-1, 0, 0] = 1e-6
        elif self.fault == "a NaN":
            grads.hidden_states[0, 0] = float("nan")
        elif self.fault == "a dropped token":
            grads.hidden_states[1] = 0
        return grads


@every_kernel
@pytest.mark.parametrize(
    "fault", [None, "sign", "2 % scale", "one expert stale", "an idle expert moves", "a NaN", "a dropped token"]
)
def test_the_contract_rejects_faults(name, fault):
    backend, case = loaded(name, SMALL)
    expected = contract.specification(case, int8=backend.int8)
    rows = contract.measure(case, contract.answer(Broken(backend, fault), case), expected)
    assert bool(contract.violations(rows, TABLE[name].required)) == (fault is not None)


@every_kernel
@pytest.mark.parametrize("depth", [level.probe for level in gate.LEVELS.values()])
def test_the_load_probe_finds_a_swapped_and_a_misread_expert(name, depth):
    """The kernel was given other weights than the source holds: its own numbers are consistent, and wrong."""
    backend, case = loaded(name, SMALL)
    limits = TABLE[name].required
    assert gate.probe_problems(backend, case.weights, limits, depth, True) == []
    swapped = chosen(case.weights, [0, 2, 1, 3]).up_proj
    found = gate.probe_problems(backend, dataclasses.replace(case.weights, up_proj=swapped), limits, depth, True)
    assert {f.split(":")[0] for f in found} == {
        f"{n} of expert {e}" for n in ("output", "input gradient") for e in (1, 2)
    }
    torn = changed(case.weights.down_proj, rows((3, slice(40, None)), 0.0))
    found = gate.probe_problems(backend, dataclasses.replace(case.weights, down_proj=torn), limits, depth, False)
    assert {f.split(":")[0] for f in found} >= {"output of expert 3"}


@every_kernel
def test_a_failed_probe_stops_the_load(name, cache, monkeypatch):
    """End to end: the weights change between packing and probing, as a mis-read shard would."""
    monkeypatch.setattr(gate, "_run_gate", lambda *args: [])
    real = gate.probe_problems

    def misread(backend, source, *args):
        gate_proj = changed(source.gate_proj, rows(2, torch.neg))
        return real(backend, dataclasses.replace(source, gate_proj=gate_proj), *args)

    monkeypatch.setattr(gate, "probe_problems", misread)
    with pytest.raises(KernelError, match=r"failed the load probe(.|\n)*expert 2"):
        MoEExperts(weights(name=name), top_k=2, r=4, config=KTConfig(kt_backend=name, kt_max_len=64))


@pytest.mark.kernel
def test_threads_stay_within_what_the_process_may_use():
    """A pool that is larger than a container's share waits by spinning on cores that it does not have."""
    done = run_python("""
        import os
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        from helpers import SMALL
        from ktmoe import KTConfig
        from ktmoe.planning import plan
        print(plan(KTConfig(), SMALL).threads, plan(KTConfig(kt_num_threads=3), SMALL).threads)
    """)
    assert done.stdout == "1 3\n", done.stderr


def test_a_failed_kernel_is_one_message_on_the_command_line(capsys):
    def command():
        raise KernelError("kt_backend: AMXBF16 failed the contract gate")

    with pytest.raises(SystemExit) as end:
        run(command)
    assert end.value.code == 2
    assert capsys.readouterr().err == "ktmoe: kt_backend: AMXBF16 failed the contract gate\n"


@every_kernel
def test_an_object_that_failed_is_never_used_again(name, cache, monkeypatch):
    """Not by the next layer that is built alike, whose own probe would then be all that stands before it."""
    monkeypatch.setattr(gate, "_run_gate", lambda *args: [])
    config = KTConfig(kt_backend=name, kt_max_len=288)  # sizes that nothing else here has
    real = gate.probe_problems
    monkeypatch.setattr(gate, "probe_problems", lambda *args: ["output of expert 0: wrong"])
    with pytest.raises(KernelError, match="failed the load probe"):
        MoEExperts(weights(name=name), top_k=2, r=3, config=config)
    monkeypatch.setattr(gate, "probe_problems", real)
    assert not MoEExperts(weights(name=name), top_k=2, r=3, config=config).load(3).reloaded


@every_kernel
def test_damaged_weights_are_not_blamed_on_the_kernel(name, cache, monkeypatch):
    monkeypatch.setattr(gate, "_run_gate", lambda *args: [])
    damaged = weights(name=name)
    broken = functools.partial(changed, damaged.up_proj, rows((2, 5, 7), float("nan")))
    if TABLE[name].stored:  # what is not finite is in the scales, which are looked at before anything else
        with pytest.raises(KTError, match="the scales of expert 2 hold NaN"):
            broken()
        return
    damaged = dataclasses.replace(damaged, up_proj=broken())
    with pytest.raises(KTError, match="weights: expert 2 gives NaN"):
        MoEExperts(damaged, top_k=2, r=4, config=KTConfig(kt_backend=name, kt_max_len=64))


@every_kernel
def test_another_package_in_the_way_is_noticed(name, cache, monkeypatch, tmp_path):
    """`python -m` looks into the working directory first."""
    (tmp_path / "ktmoe").mkdir()
    (tmp_path / "ktmoe" / "__init__.py").write_text("")
    (tmp_path / "ktmoe" / "gate.py").write_text("print([])")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KernelError, match="the checking process"):
        MoEExperts(weights(name=name), top_k=2, r=4, config=KTConfig(kt_backend=name, kt_max_len=64))


@every_kernel
@pytest.mark.parametrize("share", ["on", "off"])
def test_the_input_gradient_is_probed_wherever_backward_weights_are_kept(name, cache, monkeypatch, share):
    """With one shared buffer they are made anew for every backward: the first layer tells it all, new or reloaded."""
    monkeypatch.setattr(gate, "_run_gate", lambda *args: [])
    monkeypatch.setattr(gate, "_gradients_probed", set())
    monkeypatch.setattr(Host, "_hosts", {})  # no idle object of another test serves
    ran, real = [], gate.probe_problems
    monkeypatch.setattr(gate, "probe_problems", lambda *args: ran.append(args[4]) or real(*args))
    config = KTConfig(kt_backend=name, kt_max_len=224, kt_share_backward=share)  # sizes that nothing else here has
    if share == "off" and not TABLE[name].own_backward:
        pytest.skip("has no backward weights of a layer's own")
    layers = [MoEExperts(weights(name=name), top_k=2, r=3, config=config) for _ in range(3)]
    layers[0].close()
    layers.append(MoEExperts(weights(name=name), top_k=2, r=3, config=config))
    reloaded = layers[3].load(3).reloaded
    assert reloaded == (share == "on" or name == "AMXBF16")
    assert ran == ([True, False, False, True] if share == "on" else [True] * 4)


@pytest.mark.parametrize("top_k", [1, 2, 4, 6, 8])
def test_some_expert_has_more_rows_than_one_block_of_the_kernel(top_k):
    shape = contract.reduced(dataclasses.replace(SMALL, num_experts=64, top_k=top_k))
    for level, seed in itertools.product(gate.LEVELS, range(8)):
        index = contract.draw_case(shape, gate.case_tokens(level, shape), seed).top_k_index
        assert index[index >= 0].bincount().max() > 32


@pytest.mark.parametrize("content", ["[" * 100_000, "null", "[]", '{"subject": 1}', "\ud800"])
def test_a_damaged_certificate_is_not_believed(cache, content):
    about = certificate.subject(plan(KTConfig(kt_backend="torch"), SMALL), SMALL)
    kept.write(about)
    (written,) = cache.glob("*.json")
    assert certificate.exists(about)
    written.write_bytes(content.encode("utf-8", "surrogatepass"))
    assert not certificate.exists(about)


def test_a_cache_that_cannot_be_written_is_no_failure(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KTMOE_CACHE_DIR", str(tmp_path / "file"))
    monkeypatch.setattr("ktmoe.notices._said", set())
    about = certificate.subject(plan(KTConfig(kt_backend="torch"), SMALL), SMALL)
    with pytest.warns(UserWarning, match="cannot be kept"):
        kept.write(about)
    assert not certificate.exists(about)


INT8 = pytest.param("AMXInt8", marks=[pytest.mark.kernel])


@pytest.mark.parametrize("name", [INT8])
@pytest.mark.parametrize("share_backward", [True, False])
@pytest.mark.parametrize("change", [None, "exact", "another backward copy", "another number of parts"])
def test_an_int8_kernel_is_judged_by_the_arithmetic_that_it_is_built_for(name, share_backward, change):
    case = contract.draw_case(dataclasses.replace(SMALL, hidden_size=128, intermediate_size=128), 64, 0)
    backend = Broken(KernelBackend(name, case.weights, case.shape, scaling=2.0, share_backward=share_backward), None)
    backend.name = name
    if change == "exact":
        backend.int8 = None
    elif change == "another backward copy":
        backend.int8 = dataclasses.replace(backend.int8, requantised=not share_backward)
    elif change == "another number of parts":
        backend.int8 = dataclasses.replace(backend.int8, tp=2)
    assert bool(contract.judge(backend, case, TABLE[name].expected)) == (change is not None)


@pytest.mark.parametrize("name", [INT8])
def test_an_int8_kernel_in_parts_passes(name):
    case = contract.draw_case(dataclasses.replace(SMALL, hidden_size=128, intermediate_size=256), 64, 0)
    for tp in (1, 2, 4):
        backend = KernelBackend(name, case.weights, case.shape, scaling=2.0, tp=tp, threads=tp)
        assert contract.judge(backend, case, TABLE[name].required) == []


@pytest.mark.parametrize("name", [INT8])
def test_layer_after_layer_the_probe_asks_int8_about_other_experts(name, monkeypatch):
    """A kernel that is slightly wrong for one expert, too little to stand out, is found within 64 layers."""
    case = contract.draw_case(dataclasses.replace(SMALL, num_experts=20), 1, 0)
    backend, asked = KernelBackend(name, case.weights, case.shape), []
    real = load_probe._in_8_bits
    monkeypatch.setattr(load_probe, "_in_8_bits", lambda *args: asked.append(args[2]) or real(*args))
    monkeypatch.setattr(load_probe, "_FAR", float("inf"))
    monkeypatch.setattr(load_probe, "_LENGTH", float("inf"))
    quick, full = (level.probe for level in gate.LEVELS.values())
    for _ in range(64):
        assert load_probe.probe_problems(backend, case.weights, TABLE[name].required, quick, False) == []
    assert sorted(asked) == list(range(20))
    asked.clear()
    load_probe.probe_problems(backend, case.weights, TABLE[name].required, full, False)
    assert sorted(asked) == list(range(20))


@pytest.mark.parametrize("name", [INT8])
@pytest.mark.parametrize(
    ("first", "second", "refused"),
    [(0.03, 0.001, False), (0.03, 0.03, True), (0.2, 0.001, True), (float("nan"), 0.001, True)],
)
def test_one_token_whose_largest_number_was_rounded_the_other_way_is_no_fault(
    name, monkeypatch, first, second, refused
):
    backend, case = loaded(name, SMALL)
    answers = iter([first, second])
    monkeypatch.setattr(load_probe, "_errors", lambda *args, **kwargs: [torch.full((4,), next(answers))])
    found = load_probe.probe_problems(backend, case.weights, TABLE[name].required, gate.LEVELS["quick"].probe, False)
    assert bool(found) == refused


def test_how_far_the_format_is_is_one_sentence():
    near, far = SimpleNamespace(name="AMXInt8"), SimpleNamespace(name="AMXInt8")
    near.distance = [torch.tensor([0.02, 0.03])]
    far.distance = [torch.tensor([0.05, 0.18]), torch.tensor([0.26, 0.04])]
    assert distance.sentence({"a": SimpleNamespace(name="AMXBF16", distance=())}) == ""
    said = distance.sentence({"layers.0": near})
    assert "2.5 % from bf16" in said
    assert "at most 3.0 %: layers.0, expert 1" in said
    assert "15 % forward, 25 % backward" in said
    assert "above" not in said
    said = distance.sentence({"layers.0": near, "layers.1": far})
    assert "7.0 % from bf16" in said
    assert "layers.1, expert 1" in said
    assert "2 experts are above that" in said
