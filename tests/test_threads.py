"""Threads of torch while it computes experts, and processes that have none."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from helpers import SMALL, call, module, weights

from ktmoe import backends, interface
from ktmoe.backends.reference import ReferenceBackend
from ktmoe.backends.torch import TorchBackend
from ktmoe.config import KTConfig
from ktmoe.experts import MoEExperts
from ktmoe.planning import plan
from ktmoe.types import KTError


CLASSES = {"torch": TorchBackend, "reference": ReferenceBackend}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("threads", [3, None])
def test_kt_num_threads_holds_for_torchs_own_work(monkeypatch, name, threads):
    """A launcher's OMP_NUM_THREADS=1 holds for the rest of the model."""
    seen = {}
    for method in ("forward", "backward"):
        original = getattr(CLASSES[name], method)

        def spy(self, *args, original=original, method=method, **kwargs):
            seen[method] = torch.get_num_threads()
            return original(self, *args, **kwargs)

        monkeypatch.setattr(CLASSES[name], method, spy)
    experts = MoEExperts(weights(), top_k=2, r=2, config=KTConfig(kt_backend=name, kt_num_threads=threads))
    before = torch.get_num_threads()
    x, index, w = call(experts)
    experts(x, index, w).sum().backward()
    assert seen == dict.fromkeys(("forward", "backward"), threads or before)
    assert torch.get_num_threads() == before

    def fails(self, *args, **kwargs):
        raise RuntimeError("in between")

    monkeypatch.setattr(CLASSES[name], "forward", fails)
    with pytest.raises(RuntimeError, match="in between"):
        experts(x, index, w)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("omp", "threads", "said"), [("1", None, 1), ("1", 1, 0), ("4", None, 1), (None, None, 0), ("8", 8, 0)]
)
def test_fewer_threads_than_cores_are_said_once(monkeypatch, recwarn, omp, threads, said):
    monkeypatch.setattr(backends, "usable_cores", lambda nodes=None: 8)
    monkeypatch.setattr("ktmoe.notices._said", set())
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if omp:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    config = KTConfig(kt_backend="torch", kt_num_threads=threads)
    for _ in range(2):
        backends.build(plan(config, SMALL), weights(), SMALL, 1.0)
    lines = [str(w.message) for w in recwarn if "OMP_NUM_THREADS" in str(w.message)]
    assert len(lines) == said
    used = torch.get_num_threads()
    assert all(f"{used} of 8 cores: OMP_NUM_THREADS is {omp}" in s and "kt_num_threads: 8 gives" in s for s in lines)


FORKED = """
import os, signal
from helpers import call, weights
from ktmoe import KTConfig, MoEExperts

config = KTConfig(kt_backend="{name}", kt_num_threads={threads})
experts = MoEExperts(weights(), top_k=2, r=4, config=config)
x, i, w = call(experts, tokens=4096)
experts(x, i, w)
if os.fork() == 0:
    signal.alarm(20)
    try:
        experts(x, i, w)
    except Exception as error:
        print(f"{{type(error).__name__}}: {{error}}", flush=True)
    os._exit(0)
print(os.wait()[1])
"""


@pytest.mark.parametrize(("name", "omp", "threads"), [("torch", 2, None), ("reference", 2, None), ("torch", 1, 2)])
def test_a_forked_child_gets_an_error_where_it_would_hang(name, omp, threads):
    """The threads of OpenMP do not survive a fork."""
    code = FORKED.format(name=name, threads=threads)
    environment = {**os.environ, "OMP_NUM_THREADS": str(omp)}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    error, code = done.stdout.splitlines()
    assert error.startswith("KTError: The routed experts were called in a forked process")
    assert code == "0"


@pytest.mark.parametrize("name", CLASSES)
def test_only_several_threads_are_missed_after_a_fork(monkeypatch, name):
    experts = MoEExperts(weights(), top_k=2, r=2, config=KTConfig(kt_backend=name, kt_num_threads=1))
    x, index, w = call(experts)
    out = experts(x, index, w)
    monkeypatch.setattr(interface, "_MADE_HERE", set())  # as in a child
    experts(x, index, w).sum().backward()
    experts._backend.threads = 2
    with pytest.raises(KTError, match="in a forked process"):
        experts(x, index, w)
    with pytest.raises(KTError, match="in a forked process"):
        out.sum().backward()


def test_a_copy_belongs_to_the_process_that_made_it():
    """As experts that were sent to a spawned process."""
    backend = module("torch")._backend
    with copy.copy(backend).working():
        pass
