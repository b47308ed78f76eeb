"""What was so when a run began and is no more: cores taken away, threads moved, a quota that stops the process."""

from __future__ import annotations

import time
from pathlib import Path
from threading import Lock

from ktmoe.backends import kt
from ktmoe.cgroups import ROOT
from ktmoe.cores import periods, quota, running_threads, usable_cores
from ktmoe.notices import say_once


_EVERY = 30.0  # seconds between two looks
_OFTEN = 0.1  # of the periods of a quota in which the process was stopped


class Watch:
    """Looks now and then while the experts compute, and says once what does not hold any more."""

    def __init__(self, root: Path = ROOT) -> None:
        """Nothing is looked at before the first call.

        Args:
            root: where `/proc` and `/sys` are.
        """
        self._root = root
        self._lock = Lock()
        self._next = 0.0
        self._mask: set[int] = set()
        self._periods: list[tuple[int, int]] = []

    def look(self) -> None:
        """Looks, if it is time."""
        now = time.monotonic()
        if now < self._next or not self._lock.acquire(blocking=False):
            return
        try:
            first, self._next = not self._next, now + _EVERY
            if not first:
                self._look_at_cores()
                self._look_at_quota()
            self._mask, self._periods = _cpus(), periods(self._root)
        finally:
            self._lock.release()

    def _look_at_cores(self) -> None:
        now = _cpus()
        if lost := self._mask - now:
            kt.bind_again(now)
            say_once(
                f"ktmoe: CPUs {_listed(lost)} were taken from this process, which has {_listed(now)} now. The number "
                "of threads stays what it was chosen to be: start again if that is for long."
            )
        elif moved := kt.bind_again():
            say_once(
                f"ktmoe: {moved} of the kernel's threads had been moved from their cores by somebody else, and are "
                "back on them: leave them out of taskset -a and the like.",
                about="moved threads",
            )

    def _look_at_quota(self) -> None:
        for (was, stopped_was), (now, stopped) in zip(self._periods, periods(self._root), strict=False):
            part = (stopped - stopped_was) / max(1, now - was)
            if part > _OFTEN:
                cores = usable_cores(self._root)
                say_once(
                    f"ktmoe: the quota of {quota(self._root) or 0:g} CPUs of this container or job stopped it "
                    f"in {part:.0%} of its time slices: more threads run than it grants. Try kt_num_threads: "
                    f"{max(1, cores - 1)} and OMP_NUM_THREADS={cores}, or a larger quota.",
                    about="quota",
                )


def _cpus() -> set[int]:
    """What any thread of the process may run on: what is lost here was taken from all of them.

    The mask of one thread says less: OpenMP may have bound it.
    """
    return set().union(*(cpus for _, cpus in running_threads().values()))


def _listed(cpus: set[int]) -> str:
    """`0-3,8`, as Linux writes them."""
    spans: list[list[int]] = []
    for cpu in sorted(cpus):
        if spans and cpu == spans[-1][-1] + 1:
            spans[-1].append(cpu)
        else:
            spans.append([cpu])
    return ",".join(str(s[0]) if len(s) == 1 else f"{s[0]}-{s[-1]}" for s in spans)


WATCH = Watch()
