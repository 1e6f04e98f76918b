"""Body of a rank process that probes hazards: open the backend, look when asked, end when told or when it dies of it.

Like the suite's own ranks (:mod:`conformance.rank.main`) it dies with its driver, says what it is doing, and has its
stderr and its stacks in files. What it does not do: judge; what a death or a silence means is the catalogue's to say.
"""

from __future__ import annotations

import faulthandler
import importlib
import mmap
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from conformance.engine.protocol import Answer, Canary, Status, Stop, pack
from conformance.hazards.protocol import Ask, unpack, write_seen
from conformance.rank.main import BACKEND_PHASE, PHASE_BYTES, RankSetup, die_with, write_phase

if TYPE_CHECKING:
    from conformance.hazards.rank.bench import ProbeSession

Note = Callable[[str, int], None]


def main(setup: RankSetup, connection: Connection, lifeline: Connection) -> None:
    """Entry point of a rank process."""
    preloaded = "torch" in sys.modules
    die_with(lifeline)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # writing a core file outlasts the driver's patience
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(dict(setup.environment))
    directory = Path(setup.directory)
    with (directory / f"stderr-{setup.rank}.txt").open("wb") as stderr:
        os.dup2(stderr.fileno(), 2)
    with (
        (directory / f"stack-{setup.rank}.txt").open("w") as stacks,
        (directory / f"phase-{setup.rank}").open("w+b") as phases,
    ):
        phases.truncate(mmap.PAGESIZE)
        buffer = mmap.mmap(phases.fileno(), mmap.PAGESIZE)
        assert len(buffer) >= PHASE_BYTES
        faulthandler.enable(stacks)
        faulthandler.register(signal.SIGUSR1, stacks, all_threads=True)
        _serve(setup, connection, lambda name, index: write_phase(buffer, name, index), preloaded)
    os._exit(0)  # the teardown of an interpreter with live process groups may hang


def _serve(setup: RankSetup, connection: Connection, note: Note, preloaded: bool) -> None:
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
    try:
        function = getattr(importlib.import_module(command.module), command.function)
    except (ImportError, AttributeError) as error:
        return _failed(rank, command.sequence, False, error)
    try:
        with _environment(command.environment):
            seen = function(session.bench(command.kernel_types, command.rounds))
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
