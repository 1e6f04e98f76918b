"""Callers of a launched world's driver, each checked in a thread of its own.

A connection that says nothing holds up neither the agents beside it nor the driver: it has :data:`CALLER_LIMIT_S`, and
is hung up when the driver stops listening. What a checked caller does not prove: that it is of this world
(:mod:`conformance.engine.world` looks at what it says of itself).
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType

from conformance.engine.world_protocol import AuthenticationError, Hello, authenticate, connection_of, receive_as_driver

#: Seconds that a caller has to prove itself and say who it is, however it spreads its bytes.
CALLER_LIMIT_S = 10.0
_POLL_S = 0.05
_IDLE_S = 1.0


@dataclass(frozen=True)
class Refused:
    """A caller that is no agent with this token, in words."""

    why: str


class Callers:
    """Those that called and are not part of the world yet; leaving the context hangs up on them."""

    def __init__(self, token: bytes) -> None:
        self._token = token
        self._lock = threading.Lock()
        self._checked: dict[socket.socket, float] = {}  # a handle on each connection, and when its time is up
        self._answers: queue.SimpleQueue[tuple[Hello, Connection] | Refused] = queue.SimpleQueue()
        self._closed = False

    def __enter__(self) -> Callers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._closed = True
            for handle in self._checked:
                _shut(handle)
        for answer in self._drained():
            if not isinstance(answer, Refused):
                answer[1].close()

    @property
    def patience_s(self) -> float:
        """How long the next caller may be waited for before answers are looked at."""
        return _POLL_S if self._checked else _IDLE_S

    def admit(self, made: socket.socket) -> None:
        """Begin to check a caller."""
        handle = made.dup()
        with self._lock:
            self._checked[handle] = time.monotonic() + CALLER_LIMIT_S
        threading.Thread(target=self._check, args=(made, handle), name="ep-caller", daemon=True).start()

    def answers(self) -> Iterator[tuple[Hello, Connection] | Refused]:
        """Callers whose check has ended since; those whose time is up are hung up on."""
        with self._lock:
            for handle, until in self._checked.items():
                if time.monotonic() > until:
                    _shut(handle)
        yield from self._drained()

    def _drained(self) -> Iterator[tuple[Hello, Connection] | Refused]:
        with contextlib.suppress(queue.Empty):
            while True:
                yield self._answers.get_nowait()

    def _check(self, made: socket.socket, handle: socket.socket) -> None:
        connection = connection_of(made, limited=True)
        answer: tuple[Hello, Connection] | Refused
        try:
            authenticate(connection, self._token, b"driver")
            hello = receive_as_driver(connection)
            if not isinstance(hello, Hello):
                raise ValueError(f"{type(hello).__name__} came in place of a greeting")
            answer = hello, connection
        except (AuthenticationError, EOFError, OSError, ValueError) as error:
            connection.close()
            answer = Refused(str(error) or type(error).__name__)
        with self._lock:
            del self._checked[handle]
            handle.close()
            if not self._closed:
                self._answers.put(answer)
            elif not isinstance(answer, Refused):
                connection.close()


def _shut(handle: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the other end may have hung up before
        handle.shutdown(socket.SHUT_RDWR)
