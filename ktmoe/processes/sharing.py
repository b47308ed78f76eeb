"""One layer of routed experts that the processes of a host share: what its module needs to know of that."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ktmoe.errors import KTError
from ktmoe.processes.asking import About, Asking, about
from ktmoe.processes.averaging import Averaging
from ktmoe.processes.ranks import Ranks
from ktmoe.processes.serving import Request, Served


if TYPE_CHECKING:
    from ktmoe.backends import Plan
    from ktmoe.interface import Backend

_TO_COME = 3600.0  # seconds that a process may be ahead of the owner
_SHARED: weakref.WeakValueDictionary[str, Sharing] = weakref.WeakValueDictionary()  # of this process, by key
_REGISTERED = threading.Condition()


class Sharing:
    """Of one layer, on every process.

    Attributes:
        lock: held while the layer's backend is loaded.
    """

    def __init__(self, ranks: Ranks, key: str, position: int, module: Any) -> None:
        """Makes the layer known.

        Args:
            ranks: its processes.
            key: the layer's name, the same on every process.
            position: of the layer among all.
            module: which `load(rank, scaling)` loads and whose `plan` says what runs.
        """
        self.ranks, self.key = ranks, key
        self._position = position
        self._module = weakref.ref(module)
        self._served: Served | None = None
        self._about: About | None = None
        self._asking: Asking | None = None
        self._averaging = Averaging(ranks.everyone)
        self.lock = threading.RLock()  # the owner's module is loaded for itself or for another process
        with _REGISTERED:
            _SHARED[key] = self
            _REGISTERED.notify_all()

    @property
    def computes_here(self) -> bool:
        """Whether this process loads the weights."""
        return self.ranks.is_owner

    def share(self, backend: Backend, plan: Plan) -> Backend:
        """A loaded backend of the owner's, for all processes."""
        if self.ranks.meeting is None:
            return backend
        self._served = Served(backend, self._position, self.ranks.on_host, self.ranks.meeting)
        self._about = about(backend, plan)

        def close() -> None:
            self._served = None
            backend.close()

        return self._ask(self._about, close)

    def remote(self, rank: int, scaling: float) -> tuple[Backend, Plan]:
        """The owner's backend, loaded for at least this rank.

        Raises:
            KTError: the owner could not load it.
        """
        what = self.ranks.ask(_loaded, self.key, rank, scaling)
        return self._ask(what, lambda: None), what.plan

    def follow(self, parameters: Iterable[Tensor]) -> None:
        """See `ktmoe.processes.averaging`. To be called in every forward that may be trained on."""
        averaged = self._averaging.follow(parameters)
        if self._asking is not None:
            self._asking.averaged = averaged

    def _ask(self, what: About, close: Any) -> Asking:
        self._asking = Asking(
            what,
            self.ranks.rank,
            lambda request: self.ranks.ask(_answer, self.key, request),
            lambda ticket: self.ranks.ask(_holds, self.key, ticket),
            close,
        )
        return self._asking

    def served(self) -> Served:
        """Of the owner.

        Raises:
            KTError: it is closed.
        """
        if self._served is None:
            raise KTError(f"{self.key}: the process that owns these routed experts has closed them.")
        return self._served

    def loaded(self, rank: int, scaling: float) -> About:
        """Loads the owner's backend, if it is not."""
        module = self._module()
        if module is None:
            raise KTError(f"{self.key}: the process that owns these routed experts has dropped the model.")
        module.load(rank, scaling)
        assert self._about is not None
        return self._about


# Called in the owner's process.


def _found(key: str) -> Sharing:
    with _REGISTERED:
        if not _REGISTERED.wait_for(lambda: key in _SHARED, _TO_COME):
            raise KTError(f"{key}: the process that owns the routed experts of this host has not attached this model.")
        return _SHARED[key]


def _loaded(key: str, rank: int, scaling: float) -> About:
    return _found(key).loaded(rank, scaling)


def _answer(key: str, request: Request) -> Any:
    return _found(key).served().answer(request)


def _holds(key: str, ticket: int) -> bool:
    return _found(key).served().holds(ticket)
