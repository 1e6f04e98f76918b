"""Body of a rank process: join the process group, open the backend, answer commands until told to stop.

A rank dies with its driver: the kernel sends it SIGKILL when the lifeline pipe closes, which needs no thread of ours
and so works in a native wait too. Stacks are dumped to a file on SIGUSR1, and by a C watchdog shortly before a case's
limit for waits that block signals. What a rank never does: draw cases, or judge another rank.
"""

from __future__ import annotations

import faulthandler
import fcntl
import mmap
import os
import resource
import signal
import struct
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import msgspec

from conformance.engine.protocol import Answer, Build, Canary, Run, Status, Stop, pack, unpack_command

if TYPE_CHECKING:
    from conformance.rank.session import RankSession

_F_SETSIG = 10
_PHASE = struct.Struct("=i28s")
#: Phase of a starting rank from which on the backend's code runs; what fails before it is not the product's fault.
BACKEND_PHASE = "open backend"
PHASE_BYTES = _PHASE.size
Note = Callable[[str, int], None]


class RankSetup(msgspec.Struct, frozen=True):
    """Everything a rank needs to start; picklable."""

    rank: int
    world_size: int
    device: str  # "cpu" or "cuda:<position in the visible list>"
    backend: str
    arch: str
    directory: str  # of this pool generation: store, phase files, stack files
    environment: tuple[tuple[str, str], ...]
    rendezvous: str = ""  # prefix in torchrun's store, if the world was launched from outside; "" is a file


#: Answers commands until told to stop: setup, pipe, phase, file of stacks, and whether torch was there before.
Serve = Callable[[RankSetup, Connection, Note, TextIO, bool], None]


def write_phase(buffer: mmap.mmap, name: str, index: int) -> None:
    """Publish what the rank is doing; readable even after it was killed."""
    buffer[:PHASE_BYTES] = _PHASE.pack(index, name.encode()[:28])


def read_phase(path: Path) -> str:
    """Last published phase of a rank, e.g. ``finalize of round 2``."""
    try:
        index, name = _PHASE.unpack(path.read_bytes()[:PHASE_BYTES])
    except (OSError, struct.error):
        return "unknown"
    return f"{name.rstrip(bytes(1)).decode()} of round {index}"


def die_with(lifeline: Connection) -> None:
    """Have the kernel kill this process as soon as the other end of ``lifeline`` is closed."""
    fd = lifeline.fileno()
    fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(fd, _F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_ASYNC | os.O_NONBLOCK)
    if lifeline.poll(0):
        os._exit(1)  # closed before the signal was armed


def main(setup: RankSetup, connection: Connection, lifeline: Connection, serve: Serve | None = None) -> None:
    """Entry point of a rank process; ``serve`` answers its commands, those of the suite by default."""
    preloaded = "torch" in sys.modules
    die_with(lifeline)
    # Writing a core file may outlast the grace period, and then a blocked rank would seem to have failed first.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver decides when a rank ends
    os.environ.update(dict(setup.environment))
    directory = Path(setup.directory)
    # Whatever a library prints before it aborts belongs into the report.
    with (directory / f"stderr-{setup.rank}.txt").open("wb") as stderr:
        os.dup2(stderr.fileno(), 2)
    with (
        (directory / f"stack-{setup.rank}.txt").open("w") as stacks,
        (directory / f"phase-{setup.rank}").open("w+b") as phase_file,
    ):
        phase_file.truncate(mmap.PAGESIZE)
        buffer = mmap.mmap(phase_file.fileno(), mmap.PAGESIZE)
        faulthandler.enable(stacks)
        faulthandler.register(signal.SIGUSR1, stacks, all_threads=True)
        (serve or _serve)(setup, connection, lambda name, index: write_phase(buffer, name, index), stacks, preloaded)
    # Interpreter teardown with live process groups is where unrelated hangs come from.
    os._exit(0)


def _serve(
    setup: RankSetup,
    connection: Connection,
    phase: Note,
    stacks: TextIO,
    preloaded: bool,
) -> None:
    from conformance.rank.session import RankSession

    last = "start"

    def noted(name: str, index: int) -> None:
        nonlocal last
        last = name
        phase(name, index)

    noted("start", 0)
    try:
        session = RankSession(setup, noted)
    except Exception as error:  # noqa: BLE001  whatever the library raises is reported, then the rank ends
        status: Status = "raised" if last == BACKEND_PHASE else "harness"
        connection.send_bytes(pack(_failed(setup.rank, 0, status, error)))
        return
    connection.send_bytes(pack(Answer(0, setup.rank, "ready", text="preloaded" if preloaded else "cold")))
    while True:
        command = unpack_command(connection.recv_bytes())
        sequence = command.sequence
        if isinstance(command, Stop):
            connection.send_bytes(pack(_closed(session, setup.rank, sequence)))
            return
        # The C watchdog fires without the GIL and without signals, a little before the driver's own limit.
        faulthandler.dump_traceback_later(command.limit_s * 0.9, file=stacks)
        connection.send_bytes(pack(_answer(session, setup.rank, command)))
        faulthandler.cancel_dump_traceback_later()


def _closed(session: RankSession, rank: int, sequence: int) -> Answer:
    """Finalise; an exception is the backend's, for little else runs here."""
    try:
        session.close()
    except Exception as error:  # noqa: BLE001  reported by the driver as a failure of the teardown
        return _failed(rank, sequence, "raised", error)
    return Answer(sequence, rank, "pass")


def _answer(session: RankSession, rank: int, command: Build | Run | Canary) -> Answer:
    from conformance.rank.guard import BackendError

    try:
        if isinstance(command, Build):
            session.build(command.cell)
            return Answer(command.sequence, rank, "pass")
        if isinstance(command, Canary):
            session.canary(command.sequence)
            return Answer(command.sequence, rank, "pass")
        mismatch, ratio = session.run(command.case)
    except BackendError as error:
        return _failed(rank, command.sequence, "raised", error.__cause__ or error)
    except Exception as error:  # noqa: BLE001  a defect of the harness is reported as one, never as a product failure
        return _failed(rank, command.sequence, "harness", error)
    status: Status = "pass" if mismatch is None else "fail"
    return Answer(command.sequence, rank, status, mismatch=mismatch, ratio=min(ratio, 1e300), kernels=session.kernels)


def _failed(rank: int, sequence: int, status: Status, error: BaseException) -> Answer:
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    return Answer(sequence, rank, status, text=text, kind=type(error).__name__)
