"""The kernel's threads at rest between tasks. On their own they spin for 50 ms, on cores that torch needs by then.

A thread that gets the signal chosen here reads from an event counter in the signal's handler, and so waits until a
task is to come. The handler is glibc's own `eventfd_read(fd, value)`. A handler's first argument is the signal's
number: the counter's file descriptor has that number. The second is where Linux describes the signal: nobody reads it.
"""

from __future__ import annotations

import ctypes
import functools
import os
import signal
from collections.abc import Iterable
from contextlib import suppress


_libc = ctypes.CDLL(None)
_libc.signal.argtypes, _libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
_resting = 0  # threads that wait, or are about to: of all pools


def rest(threads: Iterable[int]) -> None:
    """Makes threads of this process wait until `wake`. The caller holds the lock under which tasks run.

    Args:
        threads: their system ids.
    """
    global _resting
    number = _signal()
    if number is None:
        return
    pid = os.getpid()
    for thread in threads:
        _resting += 1  # before it is so: one that wakes for nothing spins, one that nobody wakes never comes back
        if _libc.tgkill(pid, thread, number):
            _resting -= 1


def wake() -> None:
    """Lets every waiting thread go on; also those that have not seen their signal yet."""
    global _resting
    number = _signal()
    if _resting and number is not None:
        os.eventfd_write(number, _resting)
        _resting = 0


@functools.cache
def _signal() -> int | None:
    """A signal without a handler whose number is free as a file descriptor, with both in place.

    None where there is no such number: the threads spin then, as kt_kernel has it.
    """
    for number in range(signal.SIGRTMAX - 1, signal.SIGRTMIN, -1):
        with suppress(OSError):
            os.fstat(number)
            continue  # an open file has that number
        if other := _libc.signal(number, ctypes.cast(_libc.eventfd_read, ctypes.c_void_p)):
            _libc.signal(number, other)  # somebody uses it
            continue
        _count_at(number)
        return number
    return None


def _count_at(number: int) -> None:
    counter = os.eventfd(0, os.EFD_SEMAPHORE | os.EFD_CLOEXEC)
    os.dup2(counter, number, inheritable=False)
    os.close(counter)


def _forked() -> None:
    """The threads are the parent's, and so is the counter: a child makes its own."""
    global _resting
    _resting = 0
    if _signal.cache_info().currsize and (number := _signal()) is not None:
        _count_at(number)


os.register_at_fork(after_in_child=_forked)
