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
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from conformance.engine.protocol import Answer, Build, Canary, Command, Run, Stop, pack, unpack_answer
from conformance.engine.stacks import rank_stack
from conformance.rank.main import RankSetup, main, read_phase

#: Seconds a rank may take to import torch, join the process group and initialise its library, by device. Kernels are
#: compiled before, in a process that nothing kills (accelerated.mori_ep.warmup).
START_LIMIT_S = {"cpu": 120.0, "cuda": 600.0}
#: Seconds between two lines of progress while a command is under way.
PROGRESS_S = 15.0
Progress = Callable[[str], None]
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
    alive: bool = True


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


class Pool:
    """``world_size`` rank processes of one backend."""

    def __init__(self, key: PoolKey, progress: Progress | None = None) -> None:
        self.key = key
        self._progress = progress or (lambda text: None)
        self._sequence = 0
        #: Stacks cost up to seconds per silent rank; a search that only asks whether it hangs does without.
        self.dump_stacks = True
        self._directory = Path(tempfile.mkdtemp(prefix="ep-pool-"))
        method = "forkserver" if key.device == "cpu" else "spawn"
        context = multiprocessing.get_context(method)
        if key.device == "cpu":
            context.set_forkserver_preload(list(PRELOAD))
        self._connections: list[Connection] = []
        self._lifelines: list[Connection] = []
        self._processes = []
        started = time.monotonic()
        for rank in range(key.world_size):
            ours, theirs = context.Pipe()
            watched, lifeline = context.Pipe(duplex=False)
            where = f"cuda:{key.devices[rank] if key.devices else rank}" if key.device == "cuda" else key.device
            setup = RankSetup(rank, key.world_size, where, key.backend, key.arch, str(self._directory), key.environment)
            process = context.Process(  # type: ignore[attr-defined]
                target=main, args=(setup, theirs, watched), name=f"ep-rank-{rank}", daemon=True
            )
            process.start()
            theirs.close()
            watched.close()
            self._connections.append(ours)
            self._lifelines.append(lifeline)
            self._processes.append(process)
        reply = self._collect(0, START_LIMIT_S[key.device])
        self.start_seconds = time.monotonic() - started
        self.preloaded = all(a.text == "preloaded" for a in reply.answers.values())
        if len(reply.answers) < key.world_size or any(a.status != "ready" for a in reply.answers.values()):
            self.kill()
            raise PoolStartError(f"{key.world_size} ranks of backend {key.backend!r} did not start", reply)

    @property
    def pids(self) -> list[int]:
        """Process ids, by rank."""
        return [p.pid or -1 for p in self._processes]

    def command(self, make: type[Build] | type[Run] | type[Canary], limit_s: float, **fields: object) -> Reply:
        """Send one command to every rank and wait for all answers, a death, or the limit."""
        self._sequence += 1
        message: Command = make(sequence=self._sequence, limit_s=limit_s, **fields)  # type: ignore[arg-type]
        data = pack(message)
        for connection in self._connections:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a dead rank shows up in _collect
                connection.send_bytes(data)
        return self._collect(self._sequence, limit_s)

    def close(self, limit_s: float = 30.0) -> Reply:
        """Let the ranks finalise in order; kill what does not. The reply tells how they ended."""
        self._sequence += 1
        data = pack(Stop(self._sequence))
        for connection in self._connections:
            with contextlib.suppress(OSError):  # already dead
                connection.send_bytes(data)
        reply = self._collect(self._sequence, limit_s)
        self.kill()
        return reply

    def kill(self) -> None:
        """SIGKILL every rank, reap it, and remove the pool's directory.

        Raises:
            TimeoutError: a rank does not die; the kernel holds it, as after a GPU hang.
        """
        for process in self._processes:
            if process.is_alive():
                process.kill()
        deadline = time.monotonic() + KILL_LIMIT_S
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
        for end in (*self._connections, *self._lifelines):
            end.close()
        shutil.rmtree(self._directory, ignore_errors=True)
        stuck = [process.pid for process in self._processes if process.exitcode is None]
        if stuck:
            raise TimeoutError(
                f"processes {stuck} outlive SIGKILL by {KILL_LIMIT_S:.0f} s; reset the machine or its GPUs"
            )

    def _collect(self, sequence: int, limit_s: float) -> Reply:
        reply = Reply()
        started = time.monotonic()
        deadline, told = started + limit_s, started
        waiting = set(range(self.key.world_size))
        while waiting:
            ends = {self._connections[r]: r for r in waiting}
            sentinels = {self._processes[r].sentinel: r for r in waiting}
            ready = wait([*ends, *sentinels], min(PROGRESS_S, max(0.0, deadline - time.monotonic())))
            if time.monotonic() - told >= PROGRESS_S:
                told = time.monotonic()
                self._progress(f"{told - started:.0f} s: " + ", ".join(self._where(rank) for rank in sorted(waiting)))
            if not ready:
                if time.monotonic() >= deadline:
                    break
                continue
            for rank in sorted({ends[e] if e in ends else sentinels[e] for e in ready}):  # type: ignore[index]
                if self._receive(rank, sequence, reply):
                    waiting.discard(rank)
            if (
                reply.dead
                or reply.lost_lockstep
                or any(a.status in ("raised", "harness") for a in reply.answers.values())
            ):
                deadline = min(deadline, time.monotonic() + GRACE_S)
        self._conclude(reply, waiting)
        return reply

    def _where(self, rank: int) -> str:
        return f"rank {rank} in {read_phase(self._directory / f'phase-{rank}')}"

    def _receive(self, rank: int, sequence: int, reply: Reply) -> bool:
        """Read one message or notice a death; True if nothing more is to come from this rank."""
        try:
            if self._connections[rank].poll():
                answer = unpack_answer(self._connections[rank].recv_bytes())
                if answer.sequence != sequence or answer.rank != rank:
                    reply.lost_lockstep = (
                        f"rank {rank} answered command {answer.sequence} as rank {answer.rank}; "
                        f"command {sequence} is current"
                    )
                reply.answers[rank] = answer
                return True
        except (EOFError, OSError):
            self._processes[rank].join(GRACE_S)
        exit_code = self._processes[rank].exitcode
        if exit_code is None:
            return False
        reply.dead[rank] = exit_code
        return True

    def _conclude(self, reply: Reply, waiting: set[int]) -> None:
        # A rank that died by a signal may be noticed after the answer of the rank that it blocked.
        reply.missing = sorted(waiting)
        for rank in range(self.key.world_size):
            if rank in waiting or rank in reply.dead:
                reply.phases[rank] = read_phase(self._directory / f"phase-{rank}")
                stack_file = self._directory / f"stack-{rank}.txt"
                pid = self._processes[rank].pid if rank in waiting else None
                reply.stderr[rank] = _tail(self._directory / f"stderr-{rank}.txt")
                if self.dump_stacks:
                    reply.stacks[rank] = rank_stack(stack_file, pid)
        failed = bool(reply.missing or reply.dead or reply.lost_lockstep)
        reply.alive = not failed and all(a.status in ("ready", "pass", "fail") for a in reply.answers.values())


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
