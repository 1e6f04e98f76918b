"""Body of a rank process that probes hazards: open the backend, look when asked, end when told or when it dies of it.

Like the suite's own ranks (:mod:`conformance.rank.main`) it dies with its driver, says what it is doing, and has its
stderr and its stacks in files. What it does not do: judge; what a death or a silence means is the catalogue's to say.
"""

from __future__ import annotations

import importlib
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, TextIO

from conformance.engine.protocol import Answer, Canary, Status, Stop, pack
from conformance.hazards.protocol import Ask, Seen, unpack, write_seen
from conformance.rank.main import BACKEND_PHASE, Note, RankSetup
from conformance.rank.main import main as main_of_a_rank

if TYPE_CHECKING:
    from conformance.hazards.rank.bench import ProbeSession


def main(setup: RankSetup, connection: Connection, lifeline: Connection) -> None:
    """Entry point of a rank process."""
    main_of_a_rank(setup, connection, lifeline, _serve)


def _serve(setup: RankSetup, connection: Connection, note: Note, stacks: TextIO, preloaded: bool) -> None:
    del stacks  # a rank that waits is asked for its stack by a signal
    last = "start"

    def noted(name: str, index: int) -> None:
        nonlocal last
        last = name
        note(name, index)

    noted("start", 0)
    try:
        from conformance.hazards.rank.bench import ProbeSession

        session = ProbeSession(setup, noted)
    except Exception as error:  # noqa: BLE001  reported, then the rank ends
        connection.send_bytes(pack(_failed(setup.rank, 0, last == BACKEND_PHASE, error)))
        return
    connection.send_bytes(pack(Answer(0, setup.rank, "ready", text="preloaded" if preloaded else "cold")))
    while True:
        command = unpack(connection.recv_bytes())
        if isinstance(command, Stop):
            connection.send_bytes(pack(_done(session.close, setup.rank, command.sequence)))
            return
        if isinstance(command, Canary):
            answer = _done(partial(session.canary, command.sequence), setup.rank, command.sequence)
        else:
            answer = _look(session, setup.rank, command)
        connection.send_bytes(pack(answer))


def _look(session: ProbeSession, rank: int, command: Ask) -> Answer:
    """Run a probe; what it raises is told, for nothing but the probe's own calls into the library runs meanwhile."""
    from conformance.hazards.rank.bench import RefusedError

    try:
        function = getattr(importlib.import_module(command.module), command.function)
    except (ImportError, AttributeError) as error:
        return _failed(rank, command.sequence, False, error)
    try:
        with _environment(command.environment):
            seen = function(session.bench(command.kernel_types, command.rounds, command.sequence))
    except RefusedError as error:
        seen = Seen(0, f"refused: {error}")
    except Exception as error:  # noqa: BLE001  the driver says what it means
        return _failed(rank, command.sequence, True, error)
    return Answer(command.sequence, rank, "pass", text=write_seen(seen))


def _done(action: Callable[[], None], rank: int, sequence: int) -> Answer:
    try:
        action()
    except Exception as error:  # noqa: BLE001  the driver says what it means
        return _failed(rank, sequence, False, error)
    return Answer(sequence, rank, "pass")


def _failed(rank: int, sequence: int, theirs: bool, error: BaseException) -> Answer:
    status: Status = "raised" if theirs else "harness"
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    return Answer(sequence, rank, status, text=text, kind=type(error).__name__)


@contextmanager
def _environment(values: Sequence[tuple[str, str]]) -> Iterator[None]:
    """Have variables set for the length of the body."""
    before = {name: os.environ.get(name) for name, _ in values}
    os.environ.update(dict(values))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
