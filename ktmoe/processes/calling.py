"""Calls from the other processes of a host to the one that owns the experts, over the host's own sockets."""

from __future__ import annotations

import io
import pickle
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


_PATH = 80  # characters: a socket's own may have 107


class Caller:
    """A process's connection to the owner. Any of its threads may call, one at a time."""

    def __init__(self, address: str) -> None:
        """Connects.

        Args:
            address: of the owner's `Answering`.
        """
        self._connection = Client(address, family="AF_UNIX")
        self._one = threading.Lock()

    def __call__(self, *message: Any) -> Any:
        """The answer to a message.

        Raises:
            OSError: the owner is gone, or an earlier call was interrupted.
            EOFError: it went meanwhile.
        """
        with self._one:
            try:
                _send(self._connection, message)
                return _receive(self._connection)
            except BaseException:  # the answer that may still come would be taken for the next call's
                self._connection.close()
                raise


class Answering:
    """The owner's side: a thread for each of the other processes."""

    def __init__(self, others: int) -> None:
        """Waits for nobody yet.

        Args:
            others: how many processes will connect.
        """
        self._others = others
        short = len(tempfile.gettempdir()) <= _PATH
        self._folder = Path(tempfile.mkdtemp(prefix="ktmoe-", dir=None if short else "/tmp"))  # nobody else's
        self._listener = Listener(str(self._folder / "s"), family="AF_UNIX", backlog=others)
        self._threads: list[threading.Thread] = []

    @property
    def address(self) -> str:
        """Of the socket."""
        return str(self._folder / "s")

    def start(self, answer: Callable[..., Any]) -> None:
        """Waits for the others, and answers each from then on.

        Args:
            answer: takes a message.
        """
        for _ in range(self._others):
            about = self._listener.accept(), answer
            self._threads.append(threading.Thread(target=_answer, args=about, name="ktmoe calls", daemon=True))
            self._threads[-1].start()
        self._listener.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def wait(self, seconds: float) -> None:
        """Until all others have ended, or no longer than this."""
        end = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))


def _answer(connection: Connection, answer: Callable[..., Any]) -> None:
    with connection, suppress(EOFError, OSError):  # it has ended
        while True:
            _send(connection, answer(*_receive(connection)))


class _Pickler(pickle.Pickler):
    """Tensors as their bytes, beside the pickle: torch's own way takes two more copies."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        flat = value.detach().resolve_neg().contiguous().view(-1).view(torch.uint8).numpy().data
        return _tensor, (pickle.PickleBuffer(flat), value.dtype, value.shape)


def _tensor(data: Any, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    return torch.frombuffer(data, dtype=dtype).view(shape) if len(data) else torch.empty(shape, dtype=dtype)


def _send(connection: Connection, value: Any) -> None:
    file, buffers = io.BytesIO(), list[pickle.PickleBuffer]()
    _Pickler(file, protocol=5, buffer_callback=buffers.append).dump(value)
    connection.send((file.getvalue(), len(buffers)))
    for buffer in buffers:
        connection.send_bytes(buffer.raw())


def _receive(connection: Connection) -> Any:
    data, number = connection.recv()
    return pickle.loads(data, buffers=[bytearray(connection.recv_bytes()) for _ in range(number)])
