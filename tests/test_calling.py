"""Calls between the processes of a host: what is sent arrives, and who has ended is noticed."""

import signal
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ktmoe.processes.calling import Answering, Caller


@pytest.fixture
def pair():
    """Of one process with itself: `start(answer)` gives the caller and the owner's side."""
    begun = []

    def start(answer):
        answering = Answering(1)
        connected = []
        reaching = threading.Thread(target=lambda: connected.append(Caller(answering.address)))
        reaching.start()
        answering.start(answer)
        reaching.join()
        begun.append(SimpleNamespace(caller=connected[0], answering=answering))
        return begun[-1]

    yield start
    for one in begun:
        one.caller._connection.close()
        one.answering.wait(5)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 5),
        torch.randn(3, 5).bfloat16().t(),
        torch.randn(4, 6, requires_grad=True)[::2],
        torch.arange(7),
        torch.tensor(True),
        torch.empty(0, 8, dtype=torch.bfloat16),
        torch._neg_view(torch.randn(2, 2)),  # as of a conjugate's imaginary part
    ],
    ids=lambda t: f"{t.dtype}-{tuple(t.shape)}",
)
def test_tensors_arrive_and_are_the_receivers_own(pair, tensor):
    kept = []

    def answer(received):
        kept.append(received.clone())
        received.zero_()
        return {"of": [received + 1]}

    found = pair(answer).caller(tensor)["of"][0]
    assert torch.equal(kept[0], tensor)
    assert kept[0].dtype == tensor.dtype
    assert torch.equal(found, torch.zeros_like(tensor) + 1)
    found.zero_()


def test_an_interrupted_call_leaves_no_answer_for_the_next(pair):
    def answer(seconds):
        time.sleep(seconds)
        return seconds

    caller = pair(answer).caller

    def interrupt(*about):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(KeyboardInterrupt):
            caller(0.5)
    finally:
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(OSError, match="handle is closed"):
        caller(0)


def test_threads_of_one_process_get_their_own_answers(pair):
    caller = pair(lambda number: number).caller
    found = {}

    def ask(number):
        found[number] = [caller(number) for _ in range(50)]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: [number] * 50 for number in range(4)}


def test_the_owner_waits_for_those_who_may_ask(pair):
    one = pair(lambda: None)
    start = time.monotonic()
    one.answering.wait(0.3)
    assert time.monotonic() - start >= 0.3
    one.caller._connection.close()
    one.answering.wait(30)
    assert not one.answering._threads[0].is_alive()


def test_no_folder_is_left_and_a_long_one_is_no_hindrance(pair, monkeypatch, tmp_path):
    long = tmp_path / ("x" * 120)
    long.mkdir()
    for folder in (long, tmp_path):
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        one = pair(lambda text: text)
        assert one.caller("x") == "x"
        assert not Path(one.answering.address).parent.exists()
