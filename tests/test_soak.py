"""The soak run: what its statistics call growth, and that a planted leak is found while a clean run is not accused."""

import itertools
import json
import types

import pytest
import torch
from helpers import KERNEL_BACKENDS

from ktmoe.backends import kt
from ktmoe.backends.kt import extension
from ktmoe.config import KTConfig
from ktmoe.verify import soak, tuning
from ktmoe.verify.growth import late_rise, trend


KIB = 1024


def series(correlation, count=150, seed=0):
    """Noise of standard deviation about 1 whose neighbours correlate; 1 makes it a random walk."""
    g = torch.Generator().manual_seed(seed)
    values = [0.0]
    for e in torch.randn(count - 1, generator=g, dtype=torch.float64).tolist():
        values.append(correlation * values[-1] + e * max(1 - correlation**2, 1 / count) ** 0.5)
    return values


def sampled(private, **others):
    """A judged run with a sample every 5 steps and these values."""
    count = len(private)
    flat = dict(rss=[0.0] * count, uss=[0.0] * count, threads=[4] * count, descriptors=[6] * count)
    flat |= dict(seconds=range(count), saves=[2] * count, unchanged=[1] * count, private=private)
    found = soak.Run("torch", warm=10)
    for name, values in (flat | dict(step=range(1, 5 * count, 5)) | others).items():
        found.samples[name].extend(float(v) for v in values)
    soak.judge(found)
    return found


def test_a_line_is_found_exactly():
    line = trend(range(100), [5 + 3 * x for x in range(100)])
    assert line.slope == pytest.approx(3)
    assert line.margin == pytest.approx(0, abs=1e-9)
    assert line.growth == pytest.approx(line.sure_growth) == pytest.approx(297)
    assert line.level == pytest.approx(5 + 3 * 49.5)
    with pytest.raises(ValueError, match="at least 10 samples"):
        trend(range(5), range(5))
    with pytest.raises(ValueError, match="different places"):
        trend([1] * 20, range(20))


@pytest.mark.parametrize(("correlation", "rate"), [(0.0, 0.12), (0.5, 0.15), (0.9, 0.25)])
def test_the_interval_holds_the_true_slope_for_dependent_samples(correlation, rate):
    lines = [trend(range(150), series(correlation, seed=s)) for s in range(200)]
    assert sum(abs(line.slope) > line.margin for line in lines) <= rate * len(lines)


@pytest.mark.parametrize("correlation", [0.0, 0.9, 1.0])
def test_noise_is_no_leak(correlation):
    """Of the size that clean runs have, and of three times that."""
    for scale, seed in itertools.product((20 * KIB, 60 * KIB), range(20)):
        assert sampled([300e6 + scale * v for v in series(correlation, seed=seed)]).problems == []


@pytest.mark.parametrize("correlation", [0.0, 0.9, 1.0])
def test_a_slow_leak_is_found_in_noise(correlation):
    for seed in range(20):
        noise = series(correlation, seed=seed)
        found = sampled([300e6 + 20 * KIB * v + KIB * 5 * i for i, v in enumerate(noise)])
        (problem,) = found.problems
        assert problem.startswith("private memory grew by at least 0.")
        assert found.trends["private"].slope == pytest.approx(KIB, rel=0.3)


def test_steps_of_memory():
    """What comes once and early is no leak, whatever its size; what comes again and again is."""
    noise = [KIB * v for v in series(0.5)]
    mib = 2**20
    assert sampled([v + (8 * mib if i > 25 else 0) for i, v in enumerate(noise)]).problems == []  # in the warm-up
    assert sampled([v + (mib if i > 42 else 0) for i, v in enumerate(noise)]).problems == []  # a tenth after it
    assert sampled([v + i // 30 * mib / 4 for i, v in enumerate(noise)]).problems


def test_saved_adapters_have_an_allowance():
    noise = [KIB * v for v in series(0.5)]
    saves = [2 + i // 5 for i in range(150)]
    grown = [v + 16 * KIB * n for v, n in zip(noise, saves, strict=True)]
    assert sampled(grown, saves=saves).problems == []
    assert sampled(grown).problems


def test_threads_descriptors_and_outputs():
    flat = [0.0] * 150
    rising = [4 + (i > 120) for i in range(150)]
    assert sampled(flat, threads=rising).problems == ["threads: up to 5 at the end, 1 more than early"]
    assert sampled(flat, descriptors=rising).problems == [
        "open file descriptors: up to 5 at the end, 1 more than early"
    ]
    assert sampled(flat, threads=[4 + (i < 20) for i in range(150)]).problems == []
    assert late_rise([1, 2, 3, 2, 1, 1, 1, 1]) == -1
    (problem,) = sampled(flat, unchanged=[i != 70 for i in range(150)]).problems
    assert problem == "outputs of the fixed probe: other bits in 1 samples, from step 351"


def test_too_short_to_judge():
    assert sampled([0.0] * 24).problems == ["too short to judge: 19 samples after warm-up, expected at least 20"]


@pytest.fixture
def steps(monkeypatch):
    """Runs of 27 steps: a clock that only steps move, so that they are as many, however busy the machine is.

    They are judged by the last 16, with a limit that goes with it: a third of the planted leak.
    """
    made, step = [], tuning.Tuning.step
    monkeypatch.setattr(tuning.Tuning, "step", lambda self: (made.append(1), step(self))[1])
    monkeypatch.setattr(soak, "time", types.SimpleNamespace(monotonic=lambda: len(made) / 20))
    monkeypatch.setattr(tuning, "BATCHES", ((1, 5), (2, 11), (1, 70)))
    monkeypatch.setattr(soak, "SETTLED", 11)
    monkeypatch.setattr(soak, "ENOUGH", 15)
    monkeypatch.setattr(soak, "ALLOWED", 16 * 64 * KIB / 3)


def finish(capsys, tmp_path, *arguments):
    """Exit code, output and result of the command."""
    code = soak.main(["--minutes", "0.022", "--output", str(tmp_path / "new"), *arguments])
    assert (tmp_path / "new" / "soak.png").read_bytes().startswith(b"\x89PNG")
    return code, capsys.readouterr().out, json.loads((tmp_path / "new" / "soak.json").read_text())


def check(result, *names):
    assert result["section"] == "soak"
    assert [r["backend"] for r in result["data"]["runs"]] == [*names]
    for r in result["data"]["runs"]:
        assert {len(values) for values in r["samples"].values()} == {len(r["samples"]["step"])}
        assert min(r["events"][name] for name in soak.EVENTS) >= 2
        assert all(r["samples"]["unchanged"])
        assert min(r["samples"]["private"]) > 50e6
        assert r["trends"].keys() == {"rss", "private"}


def test_the_command_without_a_kernel(monkeypatch, capsys, tmp_path, steps):
    """A clean run: nothing is wrong, and the exit code says only that no kernel was there."""
    monkeypatch.setattr(extension, "available", lambda: False)
    monkeypatch.setattr(kt, "available", lambda: False)
    monkeypatch.setattr(kt, "variant", lambda: "no kernel (a test)")
    code, out, result = finish(capsys, tmp_path)
    assert result["problems"] == []
    assert (code, result["verdict"]) == (1, "not verified")
    assert "kernel NOT verified on this host: no kernel (a test)" in out
    assert "bitwise equal" in out
    check(result, "torch")


def test_a_planted_leak_is_found(monkeypatch, capsys, tmp_path, steps):
    """The same run, each of whose steps keeps 64 KiB."""
    kept, step = [], tuning.Tuning.step
    monkeypatch.setattr(tuning.Tuning, "step", lambda self: (kept.append(bytearray(64 * KIB)), step(self))[1])
    code, out, result = finish(capsys, tmp_path, "--backend", "torch", "--allow-unverified")
    assert (code, result["verdict"]) == (1, "fail")
    assert [p.split(" grew")[0] for p in result["problems"]] == ["torch: resident memory", "torch: private memory"]
    assert result["data"]["runs"][0]["trends"]["private"]["slope"] == pytest.approx(64 * KIB, rel=0.2)
    assert "soak FAILED" in out


@pytest.mark.kernel
def test_the_command_with_the_kernel(capsys, tmp_path, steps):
    code, out, result = finish(capsys, tmp_path, "--backend", "AMXInt8")
    assert (code, result["verdict"]) == (0, "pass"), result["problems"]
    assert result["summary"].startswith("soak passed: AMXInt8: ")
    assert result["summary"] in out.replace("\n", " ")
    check(result, "AMXInt8")


def test_a_thread_outside_of_the_mask_fails_the_run(monkeypatch, capsys, tmp_path, steps):
    monkeypatch.setattr(soak.usage, "outside_of_the_mask", lambda: ["numa_0_t_1 may run elsewhere"])
    code, _, result = finish(capsys, tmp_path, "--backend", "torch", "--allow-unverified")
    assert (code, result["problems"]) == (1, ["torch: numa_0_t_1 may run elsewhere"])


def test_a_loss_that_is_not_finite_ends_the_run(monkeypatch, capsys, tmp_path, steps):
    monkeypatch.setattr(tuning.Tuning, "step", lambda self: float("nan"))
    code, _, result = finish(capsys, tmp_path, "--backend", "torch")
    assert code == 1
    assert result["problems"][0] == "torch: step 0: the loss is nan"
    assert len(result["data"]["runs"][0]["samples"]["step"]) == 1


@pytest.mark.parametrize("backend", ["torch", *KERNEL_BACKENDS])
def test_the_probe_notices_one_bit(backend):
    probe = tuning.Probe(KTConfig(kt_backend=backend, kt_max_len=tuning.MAX_LEN, kt_num_threads=1), seed=0)
    assert probe.unchanged
    probe._case.grad_output.view(torch.int16)[3, 5] ^= 1
    assert not probe.unchanged
    probe._case.grad_output.view(torch.int16)[3, 5] ^= 1
    assert probe.unchanged


def test_an_adapter_that_comes_back_otherwise_is_said(monkeypatch, tmp_path):
    model = tuning.Tuning("torch", 0, tmp_path)
    model.step()
    model.save_and_load()
    model.reattach(new=False)
    model.reattach(new=True)
    assert model.mismatches == []
    load = type(model.model).load_adapter

    def spoilt(self, path, name):
        load(self, path, name)
        next(p for n, p in self.named_parameters() if f"lora_B.{name}" in n).data += 0.01

    monkeypatch.setattr(type(model.model), "load_adapter", spoilt)
    model.save_and_load()
    assert model.mismatches == [
        "step 1: the logits of an adapter that was saved and loaded are not bitwise what they were"
    ]


def test_arguments(capsys):
    for arguments, said in ((["--minutes", "0"], "expected more than 0"), (["--backend", "cuda"], "invalid choice")):
        with pytest.raises(SystemExit, match="2"):
            soak.main(arguments)
        assert said in capsys.readouterr().err
