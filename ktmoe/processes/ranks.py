"""The processes of a launcher: who they are, and the one on each host that owns the routed experts."""

from __future__ import annotations

import atexit
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ktmoe.errors import KernelError, KTError
from ktmoe.processes.calling import Answering, Caller
from ktmoe.processes.launched import check_launch, number
from ktmoe.processes.meeting import Meeting


_T = TypeVar("_T")

_LONG = timedelta(days=7)  # a launcher ends what hangs; loading a large model may take an hour
_LAST = 45  # seconds that the owner waits for the others at its end: launchers end them when one has ended in an error


@dataclass(frozen=True)
class Ranks:
    """The processes of this host, and all.

    Attributes:
        rank: of this process among all.
        on_host: of the processes of this host, in order; the first owns the experts.
        everyone: all processes, by gloo: expert LoRA is on the CPU.
        here: those of this host.
        meeting: where their calls meet; on the owner.
        caller: to the owner; on the others.
    """

    rank: int
    on_host: tuple[int, ...]
    everyone: dist.ProcessGroup
    here: dist.ProcessGroup
    meeting: Meeting | None
    caller: Caller | None

    @property
    def world(self) -> int:
        """The number of all processes."""
        return dist.get_world_size(self.everyone)

    @property
    def owner(self) -> int:
        """The rank of the process that owns the experts."""
        return self.on_host[0]

    @property
    def is_owner(self) -> bool:
        """Whether this process does."""
        return self.rank == self.owner

    def agree(self, decide: Callable[[], _T]) -> _T:
        """What the owner decides, or refuses, on every process of the host. To be called on all.

        Raises:
            KTError: it was refused.
            KernelError: the kernel failed a check.
        """
        made: list[Any] = [None, None]
        if self.is_owner:
            try:
                made[0] = decide()
            except (KTError, KernelError) as error:
                made[1] = error
        if len(self.on_host) > 1:
            dist.broadcast_object_list(made, src=self.owner, group=self.here)
        if made[1] is not None:
            raise made[1]
        decided: _T = made[0]
        return decided

    def ask(self, function: Callable[..., _T], *args: Any) -> _T:
        """Calls a function in the owner's process.

        Raises:
            KTError: from the function, or the owner is gone.
            KernelError: from the function.
            RuntimeError: the function failed otherwise.
        """
        if self.caller is None:
            return function(*args)
        try:
            answer, error = self.caller(function, args)
        except (EOFError, OSError) as lost:
            raise KTError(
                f"Rank {self.owner}, whose process owns the routed experts of this host, does not answer: it has "
                f"ended, and said why if it could. ({str(lost) or 'It closed the connection.'})"
            ) from lost
        if error is not None:
            raise error
        found: _T = answer
        return found


_joined: Ranks | None = None


def join() -> Ranks | None:
    """The processes of this host; None if there is one process in all. To be called on all of them.

    Raises:
        KTError: several processes that do not know of each other, or a way of sharding that is not built.
    """
    global _joined
    check_launch()
    if number() < 2:
        return None
    if _joined is None:
        _joined = _join()
    return _joined


def _join() -> Ranks:
    rank, size = dist.get_rank(), dist.get_world_size()
    everyone = dist.new_group(backend="gloo", timeout=_LONG)
    named: list[Any] = [None] * size
    # torchrun's number of the node too: containers may have one host name between them.
    dist.all_gather_object(named, (socket.gethostname(), os.environ.get("GROUP_RANK", "")), group=everyone)
    hosts = [tuple(r for r in range(size) if named[r] == host) for host in dict.fromkeys(named)]
    groups = [dist.new_group(list(ranks), backend="gloo", timeout=_LONG) for ranks in hosts]  # every process makes all
    on_host, here = next((r, g) for r, g in zip(hosts, groups, strict=True) if rank in r)
    # Several processes on CPUs alone: accelerate calls the device "cpu:0", and the Trainer has torch.load map its
    # optimizer there when it resumes. torch does not know that name.
    torch.serialization.register_package(100, _no_tag, _on_cpu)
    meeting = caller = None
    if len(on_host) > 1 and rank == on_host[0]:
        meeting = Meeting(on_host)
        _answer(meeting, len(on_host) - 1, here)
    elif len(on_host) > 1:
        caller = _reach(on_host[0], here)
    return Ranks(rank, on_host, everyone, here, meeting, caller)


def _answer(meeting: Meeting, others: int, here: dist.ProcessGroup) -> None:
    """Has the owner answer the others."""
    answering = Answering(others)
    dist.broadcast_object_list([answering.address], src=dist.get_rank(), group=here)
    answering.start(_guarded)

    def leave() -> None:  # at the end of this process, which stays until nobody can ask any more
        if getattr(sys, "last_type", None) is None:  # else it failed: the others would wait for it in vain
            answering.wait(_LAST)
        meeting.close()

    atexit.register(leave)


def _reach(owner: int, here: dist.ProcessGroup) -> Caller:
    """Connects another process to the owner."""
    address = [""]
    dist.broadcast_object_list(address, src=owner, group=here)
    return Caller(address[0])


def _no_tag(storage: Any) -> None:
    """For torch.save: as it names storages itself."""


def _on_cpu(storage: Any, location: str) -> Any:
    """For torch.load: a storage of `cpu:0` and the like stays where it was read to; None for others."""
    return storage if location.startswith("cpu:") else None


def _guarded(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, Exception | None]:
    """In the owner's process. Errors come back as what they are: torch would make texts of them, with tracebacks."""
    try:
        return function(*args), None
    except (KTError, KernelError) as error:
        return None, error
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        return None, RuntimeError(f"Rank {dist.get_rank()}, which computes the routed experts, failed with {text}")
