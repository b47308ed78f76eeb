"""What `auto` becomes on a host: backend and threads by measuring, backward buffers by memory."""

import dataclasses
import subprocess
import warnings

import pytest
from helpers import SMALL, weights

from ktmoe import KTConfig, MoEExperts
from ktmoe.backends import is_kernel
from ktmoe.gate import choice
from ktmoe.gate.choice import bf16_bytes, settle
from ktmoe.planning import plan
from ktmoe.types import MoEShape


LARGE = MoEShape(num_experts=8, hidden_size=576, intermediate_size=1536, top_k=2, rank=8)  # worth measuring
kernel = pytest.mark.kernel


@pytest.fixture(autouse=True)
def said(monkeypatch):
    monkeypatch.setattr("ktmoe.notices._said", set())
    monkeypatch.setattr(choice, "_shared", {})
    monkeypatch.setattr(choice, "usable_cores", lambda nodes=None: 8)
    monkeypatch.setattr("ktmoe.planning.usable_cores", lambda nodes=None: 8)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield found


def answer(monkeypatch, **times):
    """Has the measuring process answer: seconds by "torch", "kernel1", "kernel7"; 9 for all others."""
    asked = []

    def measured(shape, plans, stored, tokens):
        own = {"fp8": "AMXFP8"}.get(stored)
        names = {p.backend: "own" if p.backend == own else "kernel" for p in plans}
        asked.append([f"{names[p.backend]}{p.threads}" if is_kernel(p) else p.backend for p in plans])
        return [(times.get(name, 9.0), 0.0) for name in asked[-1]]

    monkeypatch.setattr(choice, "_measured", measured)
    return asked


@kernel
def test_auto_takes_the_fastest_and_says_so(monkeypatch, said):
    asked = answer(monkeypatch, torch=0.2, kernel4=0.3)
    found = settle(KTConfig(), LARGE, bf16_bytes(LARGE))
    assert asked == [["kernel8", "kernel7", "kernel4", "kernel2", "kernel1", "torch"]]
    assert (found.kt_backend, found.kt_num_threads) == ("torch", None)
    assert "torch is the fastest on this machine" in str(said[0].message)
    assert "AMXBF16 with 4 threads: 300 ms" in str(said[0].message)
    answer(monkeypatch, torch=0.2, kernel4=0.1)
    found = settle(KTConfig(), LARGE, bf16_bytes(LARGE))
    assert (found.kt_backend, found.kt_num_threads) == ("AMXBF16", 4)


@kernel
def test_what_the_user_gave_stays(monkeypatch):
    asked = answer(monkeypatch, kernel2=0.1)
    found = settle(KTConfig(kt_backend="AMXInt8"), LARGE, 0)
    assert (found.kt_backend, found.kt_num_threads) == ("AMXInt8", 2)
    found = settle(KTConfig(kt_backend="AMXBF16", kt_num_threads=5, kt_share_backward="on"), LARGE, 0)
    assert (found.kt_backend, found.kt_num_threads, found.kt_share_backward) == ("AMXBF16", 5, "on")
    assert len(asked) == 1
    answer(monkeypatch, torch=0.1)
    found = settle(KTConfig(kt_num_threads=5), LARGE, 0)
    assert (found.kt_backend, found.kt_num_threads) == ("torch", 5)
    for name in ("torch", "reference"):
        config = KTConfig(kt_backend=name)
        assert settle(config, LARGE, 0) is config
    assert settle(found, LARGE, 0) == found  # a settled configuration is not measured again
    assert len(asked) == 1


@kernel
@pytest.mark.parametrize(("free", "bf16_too"), [(100, True), (1, False)])
def test_the_checkpoints_own_format_is_compared_with_bf16_where_that_fits(monkeypatch, free, bf16_too):
    shape, size = dataclasses.replace(LARGE, hidden_size=512), 10**9
    monkeypatch.setattr(choice.memory, "available", lambda: free * 10**9)
    asked = answer(monkeypatch, own4=0.2, kernel4=0.3, torch=0.4)
    found = settle(KTConfig(), shape, size, "fp8")
    counts = (8, 7, 4, 2, 1)
    bf16 = [f"kernel{n}" for n in counts] if bf16_too else []
    assert asked == [[*(f"own{n}" for n in counts), *bf16, "torch"]]
    assert (found.kt_backend, found.kt_num_threads, found.kt_share_backward) == ("AMXFP8", 4, "on")


def test_shapes_that_the_kernel_cannot_take_are_left_alone(monkeypatch):
    asked = answer(monkeypatch)
    config = KTConfig()
    assert settle(config, dataclasses.replace(LARGE, hidden_size=580), 0) is config
    assert asked == []


@kernel
def test_small_layers_are_not_measured(monkeypatch):
    asked = answer(monkeypatch)
    assert settle(KTConfig(), SMALL, 0).kt_backend == "auto"
    assert asked == []


@kernel
@pytest.mark.parametrize(("free", "share"), [(3.4, "off"), (3.3, "on")])
def test_backward_copies_where_memory_is_there(monkeypatch, free, share):
    """Twice the weights in three fifths of what is free."""
    monkeypatch.setattr(choice.memory, "available", lambda: int(free * 10**9))
    assert settle(KTConfig(kt_backend="AMXBF16", kt_num_threads=1), SMALL, 10**9).kt_share_backward == share
    assert settle(KTConfig(kt_backend="AMXInt8", kt_num_threads=1), SMALL, 10**9).kt_share_backward == "on"
    monkeypatch.setattr(choice.memory, "available", lambda: 0)  # taken by the model that was attached before
    assert settle(KTConfig(kt_backend="AMXBF16", kt_num_threads=1), SMALL, 10**9).kt_share_backward == share
    one = bf16_bytes(SMALL)
    monkeypatch.setattr(choice.memory, "available", lambda: int(free * one))
    experts = MoEExperts(weights(), top_k=2, config=KTConfig(kt_backend="AMXBF16", kt_num_threads=1))
    assert experts.plan.share_backward == (share == "on")


@kernel
def test_a_measurement_is_kept_and_a_failed_one_is_said(monkeypatch, said, tmp_path):
    monkeypatch.setenv("KTMOE_CACHE_DIR", str(tmp_path))
    calls = []

    def run(command, **options):
        calls.append(command)
        if len(calls) == 1:
            raise subprocess.CalledProcessError(1, command, stderr="Traceback\nMemoryError")
        return subprocess.CompletedProcess(
            command, 0, stdout="noise\n[[5, 0], [4, 0], [3, 0], [2, 0], [1, 0], [6, 0]]\n"
        )

    monkeypatch.setattr(choice.subprocess, "run", run)
    found = settle(KTConfig(), LARGE, 0)
    assert (found.kt_backend, found.kt_num_threads) == ("AMXBF16", plan(KTConfig(), LARGE).threads)
    assert "could not be measured (MemoryError)" in str(said[0].message)
    for _ in range(2):
        assert settle(KTConfig(), LARGE, 0).kt_num_threads == 1
    assert len(calls) == 2
    assert settle(KTConfig(), dataclasses.replace(LARGE, top_k=4), 0).kt_num_threads == 1
    assert len(calls) == 3  # another shape, another measurement


@kernel
def test_measuring_really(monkeypatch, tmp_path):
    monkeypatch.setenv("KTMOE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(choice, "usable_cores", lambda nodes=None: 2)
    monkeypatch.setattr("ktmoe.planning.usable_cores", lambda nodes=None: 2)
    seconds = choice._measured(SMALL, choice._candidates(["AMXBF16", "torch"], KTConfig(), SMALL, ""), "", 512)
    assert len(seconds) == 3
    assert all(0 < s < 10 for both in seconds for s in both)


def test_a_part_of_the_experts_stands_for_all():
    part, tokens = choice.part_of(MoEShape(128, 2048, 768, 8, 8), 512)
    assert (part.num_experts, tokens) == (12, 48)  # 32 rows for each expert, as 512 tokens give 128 of them
    part, tokens = choice.part_of(MoEShape(8, 4096, 14336, 2, 8), 512)
    assert (part.num_experts, tokens) == (4, 256)
    assert choice.part_of(SMALL, 512) == (SMALL, 512)


@kernel
def test_the_kernel_leaves_a_core(monkeypatch):
    for cores, threads in ((1, 1), (2, 1), (8, 7), (64, 60)):
        monkeypatch.setattr("ktmoe.planning.usable_cores", lambda nodes, cores=cores: cores)
        assert plan(KTConfig(), SMALL).threads == threads


@kernel
def test_a_speed_is_that_of_all_experts(monkeypatch):
    monkeypatch.setattr(choice, "_measured", lambda shape, plans, stored, tokens: [(0.1, 0.01)] * len(plans))
    shape = MoEShape(128, 2048, 768, 8, 8)
    found = choice.speed(KTConfig(kt_backend="AMXBF16", kt_num_threads=1), shape, "", 1024)
    assert found.experts == pytest.approx(0.1 * 128 / 12, rel=0.02)
    assert found.dense == pytest.approx(24 * 1024 * 12 / 128 * 2048**2 / 0.01, rel=0.02)


@kernel
def test_named_nodes_leave_torch_out(monkeypatch):
    monkeypatch.setattr("ktmoe.planning.numa_nodes", lambda: [0, 2])
    asked = answer(monkeypatch, torch=0.1, kernel4=0.2)
    assert settle(KTConfig(kt_numa_nodes=[2]), LARGE, 0).kt_num_threads == 4
    assert all("torch" not in names for names in asked)
