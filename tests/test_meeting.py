"""Calls of several processes meet, are computed together, and end whatever comes in whatever order."""

import itertools
import random
import signal
import threading
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import SMALL, draw, plan

from ktmoe import KTConfig
from ktmoe.backends import build
from ktmoe.processes.asking import Asking, about
from ktmoe.processes.meeting import Call, Meeting
from ktmoe.processes.serving import Served
from ktmoe.types import Inputs, Lora


def at_once(*functions, timeout=60):
    """Runs each on a thread of its own. Returns what they return; fails if one does not end."""
    results, errors = [None] * len(functions), []

    def one(i):
        try:
            results[i] = functions[i]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=one, args=(i,), daemon=True) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    end = time.monotonic() + timeout
    for thread in threads:
        thread.join(max(0, end - time.monotonic()))
    assert not any(thread.is_alive() for thread in threads), "a call was never answered"
    if errors:
        raise errors[0]
    return results


class Groups:
    """Notes what was computed together."""

    def __init__(self):
        self.seen = []

    def compute(self, given):
        self.seen.append(sorted(given))
        return [10 * g for g in given]


def meet(meeting, groups, rank, about="layer", position=0, expected=(0, 1)):
    return meeting.call(Call(rank, about, position, frozenset(expected), groups.compute, rank))


def test_those_who_bring_the_same_are_computed_together():
    meeting, groups = Meeting([0, 1], patience=30), Groups()
    assert at_once(lambda: meet(meeting, groups, 1), lambda: meet(meeting, groups, 0)) == [10, 0]
    assert groups.seen == [[0, 1]]
    meeting.close()


def test_who_does_not_come_is_waited_for_once():
    meeting, groups = Meeting([0, 1], patience=0.3), Groups()
    start = time.monotonic()
    meet(meeting, groups, 0)
    assert time.monotonic() - start > 0.25
    start = time.monotonic()
    for _ in range(5):
        meet(meeting, groups, 0)
    assert time.monotonic() - start < 0.2
    assert at_once(lambda: meet(meeting, groups, 1, "other"), lambda: meet(meeting, groups, 0)) == [10, 0]
    at_once(lambda: meet(meeting, groups, 1), lambda: meet(meeting, groups, 0))  # it is back
    assert groups.seen[-1] == [0, 1]
    meeting.close()


def test_if_all_wait_for_something_else_the_earliest_goes_first():
    """So that who is behind can catch up; with a patience that would outlast the test."""
    meeting, groups = Meeting([0, 1], patience=100), Groups()

    def behind():
        for layer in range(3):
            meet(meeting, groups, 1, layer, layer)

    at_once(lambda: meet(meeting, groups, 0, 2, 2), behind)
    assert groups.seen == [[1], [1], [0, 1]]
    meeting.close()


def test_an_error_is_everybodys_and_the_next_call_is_answered():
    meeting, groups = Meeting([0, 1]), Groups()

    def broken(given):
        raise MemoryError("no room")

    def ask(rank):
        return lambda: meeting.call(Call(rank, "layer", 0, frozenset([0, 1]), broken, rank))

    for _ in range(2):
        with pytest.raises(MemoryError, match="no room"):
            at_once(ask(0), ask(1))
    at_once(lambda: meet(meeting, groups, 0), lambda: meet(meeting, groups, 1))
    assert groups.seen == [[0, 1]]
    meeting.close()
    with pytest.raises(RuntimeError, match="at its end"):
        meet(meeting, groups, 0)


def test_ctrl_c_of_the_owner_leaves_nobody_waiting():
    meeting, groups = Meeting([0, 1], patience=30), Groups()

    def interrupt(*about):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            meet(meeting, groups, 0)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert at_once(lambda: meet(meeting, groups, 1)) == [10]
    meeting.close()


class Layer:
    """One layer's backend, and another that judges: its calls would disturb what the first one holds."""

    def __init__(self, name, seed):
        self.case = draw(name, SMALL, 8, seed=seed)
        config = KTConfig(kt_backend=name, kt_num_threads=1)
        self.plan = plan(config, SMALL)
        self.backend, self._judge = (build(self.plan, self.case.weights, SMALL, 1.0) for _ in range(2))
        self._lock = threading.Lock()

    def output(self, inputs):
        with self._lock:
            return self._judge.forward(inputs, save=False)[0]

    def gradients(self, inputs, grad_output):
        with self._lock:
            return self._judge.backward(0, inputs, grad_output)

    def draw(self, rows, rng, lora=True):
        g = torch.Generator().manual_seed(rng.randrange(10**6))
        index = torch.rand(rows, SMALL.num_experts, generator=g).argsort(-1)[:, : SMALL.top_k]
        x = torch.randn(rows, SMALL.hidden_size, generator=g).to(self.backend.compute_dtype)
        return Inputs(x, index, torch.rand(rows, SMALL.top_k, generator=g), self.case.lora if lora else None)


@pytest.fixture(scope="module", params=["reference", "torch"])
def layers(request):
    return [Layer(request.param, seed) for seed in (1, 2)]


class Shared:
    """The layers as every rank has them."""

    def __init__(self, layers, ranks, patience, averaged=True):
        self.meeting = Meeting(range(ranks), patience)
        served = [Served(layer.backend, i, range(ranks), self.meeting) for i, layer in enumerate(layers)]
        self.asking = [
            [
                Asking(about(layer.backend, layer.plan), rank, one.answer, one.holds, lambda: None)
                for layer, one in zip(layers, served, strict=True)
            ]
            for rank in range(ranks)
        ]
        for one in itertools.chain(*self.asking):
            one.averaged = averaged


def close(found, expected):
    """Within the roundings of a backend that computes other rows beside these."""
    limit = 1e-4 if found.dtype == torch.float32 else 0.02
    assert (found - expected).abs().sum() <= limit * expected.abs().sum() + 1e-5


def train(rank, number, layers, asking):
    """Some steps of one process. Returns its LoRA gradients by layer, summed, and what they would be alone."""
    rng = random.Random(f"{number} {rank}")
    sums = [[0.0, 0.0] for _ in layers]
    for _ in range(rng.choice([1, 2, 3, 3])):  # some stop early
        waiting = []
        for i, layer in enumerate(layers):
            inputs, save = layer.draw(rng.choice([0, 1, 3, 5]), rng), rng.random() < 0.8  # else it evaluates
            out, ticket = asking[i].forward(inputs, save=save)
            close(out, layer.output(inputs))
            if save and rng.random() < 0.8:
                waiting.append((i, inputs, ticket))
        for i, inputs, ticket in reversed(waiting):
            grad_output = torch.ones_like(inputs.hidden_states)
            found, expected = (
                asking[i].backward(ticket, inputs, grad_output),
                layers[i].gradients(inputs, grad_output),
            )
            close(found.hidden_states, expected.hidden_states)
            close(found.top_k_weights.to(grad_output.dtype), expected.top_k_weights)
            for which, grads in enumerate((found, expected)):
                sums[i][which] += torch.cat([t.flatten() for t in grads.lora])
    return sums


@pytest.mark.parametrize("block", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 5))])
def test_schedules_of_uneven_and_empty_batches(layers, block):
    """Some stop early, evaluate alone, skip backwards, have no rows; all end, and the sums over ranks are right."""
    for number in range(50 * block, 50 * block + 50):
        ranks = random.Random(number).choice([2, 2, 3, 4])
        shared = Shared(layers, ranks, patience=0.003)
        runs = [partial(train, rank, number, layers, shared.asking[rank]) for rank in range(ranks)]
        found = at_once(*runs)
        shared.meeting.close()
        for i in range(len(layers)):
            together, alone = (sum(sums[i][which] for sums in found) for which in (0, 1))
            if isinstance(alone, torch.Tensor):
                close(together.to(layers[i].backend.compute_dtype), alone)


def test_a_forward_of_several_is_not_run_again_for_their_backwards(monkeypatch):
    layer = Layer("torch", 3)
    shared = Shared([layer], 2, patience=30)
    held, backward = [], layer.backend.backward
    monkeypatch.setattr(
        layer.backend, "backward", lambda t, *a: (held.append(layer.backend.holds(t) and t > 0), backward(t, *a))[1]
    )

    def run(rank):
        one, rng = shared.asking[rank][0], random.Random(rank)
        inputs = layer.draw(4, rng)
        _, ticket = one.forward(inputs, save=True)
        assert one.holds(ticket)
        one.backward(ticket, inputs, torch.ones_like(inputs.hidden_states))

    at_once(partial(run, 0), partial(run, 1))
    shared.meeting.close()
    assert held == [True]


def test_an_evaluation_in_between_leaves_the_ticket(layers):
    """As DPO's reference does: torch's backend keeps what it holds when nothing is saved."""
    layer, shared = layers[0], Shared(layers, 2, patience=30)

    def run(rank):
        one, rng = shared.asking[rank][0], random.Random(rank)
        _, ticket = one.forward(layer.draw(4, rng), save=True)
        one.forward(layer.draw(3, rng), save=False)
        return one.holds(ticket)

    kept = at_once(partial(run, 0), partial(run, 1))
    shared.meeting.close()
    _, ticket = layer.backend.forward(layer.draw(4, random.Random(2)), save=True)
    layer.backend.forward(layer.draw(3, random.Random(3)), save=False)
    assert kept == [layer.backend.holds(ticket)] * 2


def test_the_lora_of_a_step_is_sent_by_its_owner_alone(monkeypatch):
    monkeypatch.setattr("ktmoe.processes.serving._SOON", 30)
    layer = Layer("reference", 4)
    shared, sent = Shared([layer], 3, patience=30), []
    for rank, (one,) in enumerate(shared.asking):
        ask = one._ask
        one._ask = lambda r, ask=ask, rank=rank: (sent.append(rank) if r.lora else None, ask(r))[1]

    def run(rank):
        time.sleep(0.1 * (rank == 0))  # it comes last
        shared.asking[rank][0].forward(layer.draw(3, random.Random(rank)), save=False)

    at_once(*(partial(run, rank) for rank in range(3)))
    shared.meeting.close()
    assert sent == [0]


def test_gradients_that_nobody_averages_are_not_summed(layers):
    """Two processes that train a model each, without DDP."""
    layer, shared = layers[0], Shared(layers, 2, patience=30, averaged=False)

    def run(rank):
        inputs = layer.draw(4, random.Random(rank))
        _, ticket = shared.asking[rank][0].forward(inputs, save=True)
        found = shared.asking[rank][0].backward(ticket, inputs, torch.ones_like(inputs.hidden_states))
        for mine, alone in zip(
            found.lora, layer.gradients(inputs, torch.ones_like(inputs.hidden_states)).lora, strict=True
        ):
            close(mine, alone)

    at_once(partial(run, 0), partial(run, 1))
    shared.meeting.close()


def test_each_computes_with_its_own_lora(layers):
    """A step of one process before the other's: LoRAs are told apart by their numbers."""
    layer, shared = layers[0], Shared(layers, 2, patience=0.05)
    lora = layer.case.lora
    other = Lora({name: 2 * t for name, t in lora.tensors.items()}, lora.scaling)

    def run(rank, one):
        inputs = replace(layer.draw(4, random.Random(7)), lora=one)
        close(shared.asking[rank][0].forward(inputs, save=False)[0], layer.output(inputs))

    for pair in ((lora, other), (other, lora), (None, other), (replace(lora, scaling=3.0), lora)):
        at_once(*(partial(run, rank, one) for rank, one in enumerate(pair)))
    lora.tensors["down_proj.lora_B"][1, 2, 3] += 1  # a step, in place
    at_once(partial(run, 0, lora), partial(run, 1, lora))
    shared.meeting.close()
