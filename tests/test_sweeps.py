"""Several runs in one process: the kernel's packed weights cannot be given back (K22), so they are used again."""

import dataclasses
import warnings

import pytest
from helpers import KERNEL_BACKENDS, SMALL, limits

from ktmoe.backends.kt import kernel as module
from ktmoe.backends.kt.extension import Host
from ktmoe.backends.kt.kernel import KernelBackend
from ktmoe.gate import contract


SHAPE = dataclasses.replace(SMALL, hidden_size=128)  # of no other test: their idle objects would do too


@pytest.fixture
def created(monkeypatch):
    found, create = [], module.create
    monkeypatch.setattr(module, "create", lambda *args: found.append(args) or create(*args))
    return found


@pytest.mark.parametrize("name", KERNEL_BACKENDS)
def test_smaller_ranks_shorter_calls_and_other_scales_use_what_is_there(name, created):
    for rank, max_len, scaling in ((8, 128, 2.0), (4, 128, 2.0), (8, 64, 0.5), (1, 32, 1.0), (8, 128, 2.0)):
        shape = dataclasses.replace(SHAPE, rank=rank)
        case = contract.draw_case(shape, 80, seed=rank)
        case = dataclasses.replace(case, lora=dataclasses.replace(case.lora, scaling=scaling))
        backend = KernelBackend(name, case.weights, shape, scaling=scaling, max_len=max_len)
        rows = contract.measure(case, contract.answer(backend, case), contract.specification(case))
        assert contract.violations(rows, limits(name)) == [], (rank, max_len)
        backend.close()
        assert len([args for args in created if args[2].num_experts > 1]) == 1


@pytest.mark.parametrize("name", KERNEL_BACKENDS)
def test_what_stays_behind_is_said_with_the_figure(name, monkeypatch):
    monkeypatch.setattr(Host, "_hosts", {})  # what other tests left behind is not asked about
    shape = dataclasses.replace(SHAPE, hidden_size=192)
    case = contract.draw_case(shape, 8, seed=0)
    for rank, threads, said in ((4, 1, False), (2, 1, False), (8, 1, True), (8, 2, True), (4, 2, False)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            other = dataclasses.replace(shape, rank=rank)
            KernelBackend(name, case.weights, other, max_len=32, threads=threads).close()
        lines = [str(w.message) for w in caught if "packed experts of an earlier model" in str(w.message)]
        assert bool(lines) is said, (rank, threads)
        assert all("begin with the largest" in line and " GB " in line for line in lines)
