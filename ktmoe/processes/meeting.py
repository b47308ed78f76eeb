"""Where the calls of a host's processes meet: those for one layer are computed together, and none waits for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any


_PATIENCE = 0.5  # seconds; what a process costs that comes no more, once


@dataclass(eq=False)
class Call:
    """One process's call.

    Attributes:
        rank: whose.
        about: calls with equal ones are computed together.
        position: where in a step. If every process waits for something else, the earliest goes first: it may catch up.
        expected: the processes that may bring the same.
        compute: takes what all calls of a group give, in the order of their ranks. Returns an answer for each.
        given: for `compute`.
    """

    rank: int
    about: Hashable
    position: float
    expected: frozenset[int]
    compute: Callable[[Sequence[Any]], Sequence[Any]]
    given: Any
    answer: Future[Any] = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)


class Meeting:
    """Computes calls, one group at a time, on a thread of its own: OpenMP keeps a set of threads for each caller.

    A group begins when everybody who is expected has come; when all processes wait, for whatever; or when the missing
    were waited for in vain. Who was is not waited for again until it comes by itself: a process that evaluates alone,
    has stopped early or has no more batches costs the others half a second, once. So there is no schedule to keep, and
    no order of calls in which two wait for each other.
    """

    def __init__(self, ranks: Sequence[int], patience: float = _PATIENCE) -> None:
        """Starts the thread.

        Args:
            ranks: the processes.
            patience: seconds that a call waits for others while nothing is computed.
        """
        self._ranks = frozenset(ranks)
        self._patience = patience
        self._absent: set[int] = set()
        self._waiting: list[Call] = []
        self._idle = time.monotonic()  # since when nothing is computed
        self._open = True
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="ktmoe experts", daemon=True)
        self._thread.start()

    def call(self, call: Call) -> Any:
        """Waits for the answer.

        Raises:
            RuntimeError: the meeting is over.
            Exception: whatever `compute` raised, to everybody of the group.
        """
        with self._changed:
            if not self._open:
                raise RuntimeError("The process that owns the routed experts is at its end.")
            self._absent.discard(call.rank)
            self._waiting.append(call)
            self._changed.notify()
        return call.answer.result()

    def close(self) -> None:
        """Ends the thread after what has been asked for."""
        with self._changed:
            self._open = False
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while group := self._group():
            try:
                answers = group[0].compute([call.given for call in group])
            except BaseException as error:  # theirs, not this thread's
                for call in group:
                    call.answer.set_exception(error)
            else:
                for call, answer in zip(group, answers, strict=True):
                    call.answer.set_result(answer)
            self._idle = time.monotonic()

    def _group(self) -> list[Call]:
        """Waits for the next group, by rank; none when it is over."""
        with self._changed:
            while self._open or self._waiting:
                found, patience = self._next()
                if found:
                    self._waiting = [call for call in self._waiting if call not in found]
                    return sorted(found, key=lambda call: call.rank)
                self._changed.wait(patience)
        return []

    def _next(self) -> tuple[list[Call], float | None]:
        """A group that is ready, or for how long to wait for one."""
        groups: dict[Hashable, dict[int, Call]] = {}
        for call in self._waiting:  # a process with two threads may bring the same twice
            groups.setdefault(call.about, {}).setdefault(call.rank, call)
        if not groups:
            return [], None
        oldest = min(groups.values(), key=lambda group: _first(group).since)
        for group in groups.values():
            if _first(group).expected - self._absent <= group.keys():
                return list(group.values()), None
        here = {call.rank for call in self._waiting}
        if self._ranks - self._absent <= here or not self._open:
            return list(min(groups.values(), key=lambda group: _first(group).position).values()), None
        left = max(_first(oldest).since, self._idle) + self._patience - time.monotonic()
        if left > 0:
            return [], left
        self._absent |= _first(oldest).expected - here
        return list(oldest.values()), None


def _first(group: dict[int, Call]) -> Call:
    return next(iter(group.values()))
