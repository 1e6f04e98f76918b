"""A pool of persistent rank processes: start, command, wait, stacks, kill.

On CPU the ranks are forked from a forkserver that has torch preloaded, so a restart is well below a second; on a GPU
they are spawned. The rendezvous is a file in a directory of the pool's own, so there are no ports. The driver waits on
all pipes and all process sentinels at once. What a pool does not decide: whether an answer is a verdict on the product.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from conformance.engine.protocol import Answer, Build, Canary, Command, Run, Stop, Trace, pack, unpack_answer
from conformance.engine.stacks import rank_stack
from conformance.rank.main import RankSetup, main, read_phase

#: Seconds a rank may take to import torch, join the process group and initialise its library, by device. Kernels are
#: compiled before, in a process that nothing kills (accelerated.mori_ep.warmup).
START_LIMIT_S = {"cpu": 120.0, "cuda": 600.0}
#: Seconds between two lines of progress while a command is under way.
PROGRESS_S = 15.0
Progress = Callable[[str], None]
#: Entry point of a rank process.
Body = Callable[[RankSetup, Connection, Connection], None]
#: After the first rank failed, the others get this long before the pool dies.
GRACE_S = 1.0
KILL_LIMIT_S = 30.0
STDERR_LINES = 8
PRELOAD = (
    "torch",
    "torch.distributed",
    "conformance.rank.session",
    "accelerated.aiter_ops.experts",
    "accelerated.aiter_ops.session",
    "accelerated.allgather",
    "accelerated.layer_session",
    "accelerated.mori_ep.adapter",
    "accelerated.replicated",
    "accelerated.standin.mori_ep.jit_config",
    "accelerated.standin.mori_ep.ops",
    "accelerated.standin.mori_ep.shmem",
)


@dataclass
class Reply:
    """What came back for one command.

    ``missing`` are ranks without an answer, ``dead`` maps ranks to exit codes, ``stacks`` and ``phases`` are filled
    for ranks that did not answer, as is the end of their ``stderr``. ``alive`` says whether the pool can be used again.
    """

    answers: dict[int, Answer] = field(default_factory=dict)
    dead: dict[int, int] = field(default_factory=dict)
    missing: list[int] = field(default_factory=list)
    stacks: dict[int, str] = field(default_factory=dict)
    phases: dict[int, str] = field(default_factory=dict)
    stderr: dict[int, str] = field(default_factory=dict)
    lost_lockstep: str = ""
    lost: dict[int, str] = field(default_factory=dict)  # ranks whose agent is gone, and how that was noticed
    alive: bool = True

    def note(self, rank: int, trace: Trace) -> None:
        """Keep what is left of a rank."""
        self.phases[rank], self.stderr[rank] = trace.phase, trace.stderr
        if trace.stack:
            self.stacks[rank] = trace.stack


@dataclass(frozen=True)
class PoolKey:
    """What makes two pools interchangeable."""

    world_size: int
    backend: str
    arch: str = "gfx942"
    device: str = "cpu"
    environment: tuple[tuple[str, str], ...] = ()
    devices: tuple[int, ...] = ()  # positions in the visible list, one per rank; none on CPU


class PoolStartError(RuntimeError):
    """The ranks did not come up. ``answers`` holds what the ranks said, ``reply`` the rest."""

    def __init__(self, message: str, reply: Reply) -> None:
        super().__init__(message)
        self.reply = reply


class Ranks(ABC):
    """Rank processes of one backend: what is common to those of a local pool and of a launched world.

    Pipes, sockets and sentinels are waited for together; a subclass sends, receives and gathers what
    is left of a rank that did not answer.
    """

    def __init__(self, key: PoolKey, progress: Progress | None) -> None:
        self.key = key
        self._progress = progress or (lambda text: None)
        self._sequence = 0
        #: Stacks cost up to seconds per silent rank; a search that only asks whether it hangs does without.
        self.dump_stacks = True

    def command(self, make: type[Build] | type[Run] | type[Canary], limit_s: float, **fields: object) -> Reply:
        """Send one command to every rank and wait for all answers, a death, or the limit."""
        self._sequence += 1
        message: Command = make(sequence=self._sequence, limit_s=limit_s, **fields)  # type: ignore[arg-type]
        self._send(pack(message))
        return self._collect(self._sequence, limit_s)

    def close(self, limit_s: float = 30.0) -> Reply:
        """Let the ranks finalise in order; kill what does not. The reply tells how they ended."""
        self._sequence += 1
        self._send(pack(Stop(self._sequence)))
        reply = self._collect(self._sequence, limit_s)
        self._reap()
        return reply

    def _reap(self) -> None:
        """End what still runs of ranks that were told to finalise.

        Raises:
            TimeoutError: a rank does not die.
        """
        self.kill()

    @abstractmethod
    def kill(self) -> None:
        """End every rank at once.

        Raises:
            TimeoutError: a rank does not die.
        """

    @abstractmethod
    def _send(self, data: bytes) -> None:
        """Send a command to every rank; a rank that is gone shows up in :meth:`_collect`."""

    @abstractmethod
    def _sources(self, waiting: set[int]) -> dict[object, int]:
        """What to wait for, and the rank it is about."""

    @abstractmethod
    def _receive(self, rank: int, sequence: int, reply: Reply) -> bool:
        """Read one message or notice a death; True if nothing more is to come from this rank."""

    @abstractmethod
    def _examine(self, reply: Reply, waiting: set[int]) -> None:
        """Fill in phases, stacks and last words of ranks that died or did not answer."""

    @abstractmethod
    def _where(self, rank: int) -> str:
        """A rank and what it is doing, as far as that is known."""

    def _started(self, reply: Reply) -> None:
        """Kill what did not come up.

        Raises:
            PoolStartError: a rank is not ready.
        """
        if len(reply.answers) < self.key.world_size or any(a.status != "ready" for a in reply.answers.values()):
            self.kill()
            raise PoolStartError(f"{self.key.world_size} ranks of backend {self.key.backend!r} did not start", reply)

    def _collect(self, sequence: int, limit_s: float) -> Reply:
        reply = Reply()
        started = time.monotonic()
        deadline, told = started + limit_s, started
        waiting = set(range(self.key.world_size))
        while waiting:
            sources = self._sources(waiting)
            ready = wait(list(sources), min(PROGRESS_S, max(0.0, deadline - time.monotonic())))  # type: ignore[arg-type]
            if time.monotonic() - told >= PROGRESS_S:
                told = time.monotonic()
                self._progress(f"{told - started:.0f} s: " + ", ".join(self._where(rank) for rank in sorted(waiting)))
            if not ready:
                if time.monotonic() >= deadline:
                    break
                continue
            for rank in sorted({sources[source] for source in ready}):
                if self._receive(rank, sequence, reply):
                    waiting.discard(rank)
            if (
                reply.dead
                or reply.lost
                or reply.lost_lockstep
                or any(a.status in ("raised", "harness") for a in reply.answers.values())
            ):
                deadline = min(deadline, time.monotonic() + GRACE_S)
        # A rank that died by a signal may be noticed after the answer of the rank that it blocked.
        reply.missing = sorted(waiting)
        self._examine(reply, waiting)
        failed = bool(reply.missing or reply.dead or reply.lost or reply.lost_lockstep)
        reply.alive = not failed and all(a.status in ("ready", "pass", "fail") for a in reply.answers.values())
        return reply

    @staticmethod
    def _take(answer: Answer, rank: int, sequence: int, reply: Reply) -> None:
        """Note an answer, or that it is none to the current command."""
        if answer.sequence != sequence or answer.rank != rank:
            reply.lost_lockstep = (
                f"rank {rank} answered command {answer.sequence} as rank {answer.rank}; command {sequence} is current"
            )
        reply.answers[rank] = answer


class Pool(Ranks):
    """``world_size`` rank processes of one backend on this host, whose body is ``target``; ``preload`` is for it."""

    def __init__(
        self, key: PoolKey, progress: Progress | None = None, target: Body = main, preload: Sequence[str] = PRELOAD
    ) -> None:
        super().__init__(key, progress)
        self._directory = Path(tempfile.mkdtemp(prefix="ep-pool-"))
        started = time.monotonic()
        self._ranks: list[RankProcess] = []
        for rank in range(key.world_size):
            where = f"cuda:{key.devices[rank] if key.devices else rank}" if key.device == "cuda" else key.device
            setup = RankSetup(rank, key.world_size, where, key.backend, key.arch, str(self._directory), key.environment)
            self._ranks.append(RankProcess(setup, target, preload))
        reply = self._collect(0, START_LIMIT_S[key.device])
        self.start_seconds = time.monotonic() - started
        self.preloaded = all(a.text == "preloaded" for a in reply.answers.values())
        self._started(reply)

    @property
    def pids(self) -> list[int]:
        """Process ids, by rank."""
        return [rank.process.pid or -1 for rank in self._ranks]

    def _send(self, data: bytes) -> None:
        for rank in self._ranks:
            rank.send(data)

    def kill(self) -> None:
        """SIGKILL every rank, reap it, and remove the pool's directory.

        Raises:
            TimeoutError: a rank does not die; the kernel holds it, as after a GPU hang.
        """
        for rank in self._ranks:
            if rank.process.is_alive():
                rank.process.kill()
        deadline = time.monotonic() + KILL_LIMIT_S
        stuck = [rank.process.pid for rank in self._ranks if not rank.reap(deadline)]
        shutil.rmtree(self._directory, ignore_errors=True)
        if stuck:
            raise TimeoutError(
                f"processes {stuck} outlive SIGKILL by {KILL_LIMIT_S:.0f} s; reset the machine or its GPUs"
            )

    def _sources(self, waiting: set[int]) -> dict[object, int]:
        pipes: dict[object, int] = {self._ranks[r].connection: r for r in waiting}
        return pipes | {self._ranks[r].process.sentinel: r for r in waiting}

    def _where(self, rank: int) -> str:
        return f"rank {rank} in {read_phase(self._directory / f'phase-{rank}')}"

    def _receive(self, rank: int, sequence: int, reply: Reply) -> bool:
        one = self._ranks[rank]
        try:
            if one.connection.poll():
                self._take(unpack_answer(one.connection.recv_bytes()), rank, sequence, reply)
                return True
        except (EOFError, OSError):
            one.process.join(GRACE_S)
        if one.process.exitcode is None:
            return False
        reply.dead[rank] = one.process.exitcode
        return True

    def _examine(self, reply: Reply, waiting: set[int]) -> None:
        for rank in range(self.key.world_size):
            if rank in waiting or rank in reply.dead:
                pid = self._ranks[rank].process.pid if rank in waiting else None
                reply.note(rank, trace_of(self._directory, rank, pid, stack=self.dump_stacks))


class RankProcess:
    """A rank process on this host, its pipe, and the lifeline by which it ends with this process."""

    def __init__(self, setup: RankSetup, target: Body = main, preload: Sequence[str] = PRELOAD) -> None:
        on_cpu = setup.device == "cpu"
        context = multiprocessing.get_context("forkserver" if on_cpu else "spawn")
        if on_cpu:
            context.set_forkserver_preload(list(preload))
        self.connection, theirs = context.Pipe()
        watched, self._lifeline = context.Pipe(duplex=False)
        self.process = context.Process(  # type: ignore[attr-defined]
            target=target, args=(setup, theirs, watched), name=f"ep-rank-{setup.rank}", daemon=True
        )
        self.process.start()
        theirs.close()
        watched.close()

    def send(self, data: bytes) -> None:
        """Send a command; a dead rank is noticed by its sentinel."""
        with contextlib.suppress(OSError):
            self.connection.send_bytes(data)

    def reap(self, deadline: float) -> bool:
        """Wait for a process that was killed and close its pipes; False if it did not die in time."""
        self.process.join(max(0.0, deadline - time.monotonic()))
        for end in (self.connection, self._lifeline):
            end.close()
        return self.process.exitcode is not None


def trace_of(directory: Path, rank: int, pid: int | None, *, stack: bool) -> Trace:
    """What a rank left in its pool's directory; ``pid`` is None if it is dead."""
    return Trace(
        phase=read_phase(directory / f"phase-{rank}"),
        stderr=_tail(directory / f"stderr-{rank}.txt"),
        stack=rank_stack(directory / f"stack-{rank}.txt", pid) if stack else "",
    )


def _tail(path: Path) -> str:
    """Last lines a rank wrote to stderr: libraries that abort say why there."""
    return "\n".join(path.read_text(errors="replace").splitlines()[-STDERR_LINES:]) if path.exists() else ""


def signal_name(exit_code: int) -> str:
    """``SIGSEGV`` for -11, ``exit code 3`` for 3."""
    if exit_code < 0:
        try:
            return signal.Signals(-exit_code).name
        except ValueError:
            return f"signal {-exit_code}"
    return f"exit code {exit_code}"


def stop_forkserver() -> None:
    """End this process's forkserver, so that nothing outlives the session."""
    from multiprocessing import forkserver

    server: Any = getattr(forkserver, "_forkserver", None)
    if getattr(server, "_forkserver_pid", None) is not None:
        with contextlib.suppress(OSError):  # it may have ended with its last client
            os.kill(server._forkserver_pid, signal.SIGKILL)
            # Wait without reaping: multiprocessing looks for itself, and must not find it alive any more.
            os.waitid(os.P_PID, server._forkserver_pid, os.WEXITED | os.WNOWAIT)
