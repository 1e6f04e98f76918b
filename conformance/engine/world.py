"""A world launched from outside: one agent per rank, started by torchrun, and the pools that run on it.

The driver listens, the agents call (:mod:`conformance.agent`), each for one rank; the ranks themselves are processes
of the agents, so a crash ends a rank and not torchrun. A pool here is one generation of ranks: it ends in order and
another one may follow, but a world in which ranks had to be killed is over, because nobody knows what state the other
nodes' devices and connections are in. An agent that is lost is hung up on, so that nothing waits for it; a host that
falls silent is noticed within seconds (:data:`conformance.engine.world_protocol.SILENT_HOST_S`). What a world does not
do: restart, shrink a crash, or lease GPUs of other hosts.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait

import msgspec

from conformance import __version__
from conformance.engine.callers import Callers, Refused
from conformance.engine.pool import KILL_LIMIT_S, START_LIMIT_S, PoolKey, Progress, Ranks, Reply
from conformance.engine.protocol import Trace, unpack_answer
from conformance.engine.world_protocol import (
    MESSAGE_LIMIT_S,
    Compile,
    Compiled,
    Died,
    End,
    Examine,
    Examined,
    Heard,
    Hello,
    Leave,
    Look,
    Relay,
    Seen,
    Start,
    ToAgent,
    ToDriver,
    hang_up,
    receive_as_driver,
    send,
    split_address,
)
from conformance.rank.main import RankSetup

#: Seconds that all agents have to call.
GATHER_LIMIT_S = 300.0
#: Seconds that an agent has to say what its rank is doing: stacks take some. Who does not answer is lost.
LOOK_LIMIT_S = 20.0
#: Seconds that an agent has to say what its host is: torch is imported there, and MoRI.
EXAMINE_LIMIT_S = 600.0
_UNEXPLAINED = Trace()


class WorldError(RuntimeError):
    """The world did not come together, or is not one that cases can run on. The message says what is missing."""


@dataclass
class Member:
    """One agent."""

    hello: Hello
    connection: Connection
    lost: str = ""  # how it was noticed that the agent is gone

    def send(self, message: ToAgent) -> None:
        """Send, unless the agent is gone."""
        if self.lost:
            return
        try:
            send(self.connection, message)
        except OSError as error:
            self.lose(f"it takes no message ({error.strerror or type(error).__name__})")

    def receive(self) -> ToDriver | None:
        """One message, or None because the agent is gone."""
        try:
            return receive_as_driver(self.connection)
        except (EOFError, OSError, ValueError) as error:  # ValueError: what came is no message of ours
            self.lose(f"its connection ended ({type(error).__name__})")
            return None

    def lose(self, why: str) -> None:
        """Note that the agent is gone, and hang up: who waits for its connection wakes."""
        self.lost = self.lost or why
        hang_up(self.connection)

    @property
    def name(self) -> str:
        return f"rank {self.hello.rank} on {self.hello.host}"


@dataclass
class World:
    """Agents of all ranks, in their order."""

    members: list[Member]
    generation: int = 0
    ended: str = ""  # why no case can run any more
    hosts: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.hosts = tuple(dict.fromkeys(member.hello.host for member in self.members))

    @property
    def world_size(self) -> int:
        return len(self.members)

    @property
    def nodes(self) -> int:
        """Nodes that torchrun was given; agents on one host may be several."""
        return self.world_size // self.members[0].hello.local_world_size

    @classmethod
    def gather(
        cls,
        address: str,
        token: bytes,
        *,
        limit_s: float = GATHER_LIMIT_S,
        progress: Callable[[str], None] = lambda text: None,
    ) -> World:
        """Listen on ``address`` until every agent has called.

        Raises:
            WorldError: they did not, or are not the ranks of one world.
            ValueError: ``address`` is none.
        """
        host, port = split_address(address)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            server = socket.create_server((host, port), family=family, backlog=256)
        except OSError as error:
            why = f"--world {address} cannot be listened on ({error.strerror}); give an address of this host"
            raise WorldError(f"{why} and a free port") from error
        found: dict[int, Member] = {}
        refused = ""
        deadline, told = time.monotonic() + limit_s, time.monotonic()
        server.settimeout(1.0)  # a caller may be gone again before it is accepted
        try:
            with server, Callers(token) as callers:
                while not found or len(found) < next(iter(found.values())).hello.world_size:
                    if wait([server], max(0.01, min(callers.patience_s, deadline - time.monotonic()))):
                        try:
                            callers.admit(server.accept()[0])
                        except OSError as error:
                            refused = f"; the last caller was lost: {error}"
                    for answer in callers.answers():
                        if isinstance(answer, Refused):
                            refused = f"; the last caller was refused: {answer.why}"
                        else:
                            _enter(Member(*answer), found)
                    if time.monotonic() > deadline:
                        raise WorldError(f"{_absent(found, address)} within {limit_s:.0f} s{refused}")
                    if time.monotonic() - told > 10:
                        told = time.monotonic()
                        progress(_absent(found, address) + " yet")
        except BaseException:
            for member in found.values():
                member.connection.close()
            raise
        return cls([found[rank] for rank in sorted(found)])

    def holds(self, world_size: int, nodes: int) -> bool:
        """Whether a cell runs here: on all ranks, and no node of its spans two of the world's."""
        return world_size == self.world_size and nodes % self.nodes == 0

    def compile(self, kernel_types: Sequence[str], here: str = socket.gethostname()) -> list[str]:
        """Have MoRI's kernels compiled on every host but ``here``, the driver's own; what went wrong.

        There is no limit: what interrupts a compiler leaves a lock behind that blocks every later run.
        """
        asked = [member for member in self._firsts() if member.hello.host != here]
        for member in asked:
            member.send(Compile(tuple(kernel_types)))
        failed = []
        for member, message in zip(asked, _answers(asked, None), strict=True):
            error = message.error if isinstance(message, Compiled) else member.lost or "it answers something else"
            if error:
                failed.append(f"{member.name}: {error}")
        return failed

    def examine(self, request: Examine) -> list[Examined]:
        """Have every agent say what its host is, in the order of the ranks; one of each host checks all of it."""
        firsts = {id(member) for member in self._firsts()}
        for member in self.members:
            ranks = sum(other.hello.host == member.hello.host for other in self.members)
            member.send(msgspec.structs.replace(request, ranks=ranks, whole=id(member) in firsts))
        found = []
        for member, message in zip(self.members, _answers(self.members, EXAMINE_LIMIT_S), strict=True):
            error = member.lost or "it answers something else"
            found.append(message if isinstance(message, Examined) else Examined(error=error))
        return found

    def _firsts(self) -> list[Member]:
        """The agent of the lowest rank of each host."""
        first = {member.hello.host: member for member in reversed(self.members)}
        return [first[host] for host in self.hosts]

    def leave(self) -> None:
        """Send every agent home."""
        for member in self.members:
            member.send(Leave())
            member.connection.close()
            member.lost = member.lost or "the run is over"
        self.ended = self.ended or "the run is over"


def _answers(asked: Sequence[Member], limit_s: float | None) -> list[ToDriver | None]:
    """One message of each agent, which are waited for together; None of one that is gone, or says nothing in time."""
    found: dict[int, ToDriver | None] = {}
    deadline = None if limit_s is None else time.monotonic() + limit_s
    while waiting := [i for i, member in enumerate(asked) if i not in found and not member.lost]:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready = wait([asked[i].connection for i in waiting], left)
        for i in waiting:
            if not ready:
                asked[i].lose(f"it says nothing for {limit_s:.0f} s")
            elif asked[i].connection in ready:
                found[i] = asked[i].receive()
    return [found.get(i) for i in range(len(asked))]


def _enter(member: Member, found: dict[int, Member]) -> None:
    """Take a member in.

    Raises:
        WorldError: it does not belong to those that came before.
    """
    try:
        _fits(member, found)
    except WorldError:
        member.connection.close()
        raise
    found[member.hello.rank] = member


def _fits(member: Member, found: dict[int, Member]) -> None:
    """Check a member against those that came before.

    Raises:
        WorldError: it is of another world or version, or torchrun placed the ranks otherwise than the suite counts
            them.
    """
    hello = member.hello
    if hello.version != __version__:
        raise WorldError(f"{member.name} has suite {hello.version} and pytest {__version__}; install the same on both")
    if hello.rank in found:
        raise WorldError(f"rank {hello.rank} called twice, from {found[hello.rank].hello.host} and {hello.host}")
    sizes = hello.world_size, hello.local_world_size
    for other in found.values():
        if (other.hello.world_size, other.hello.local_world_size) != sizes:
            raise WorldError(f"{member.name} is one of {sizes} ranks, {other.name} is not; start one world only")
    if hello.world_size % hello.local_world_size or hello.rank % hello.local_world_size != hello.local_rank:
        raise WorldError(
            f"{member.name} has local rank {hello.local_rank} of {hello.local_world_size}; give every node the same "
            "--nproc-per-node"
        )


def _absent(found: dict[int, Member], address: str) -> str:
    if not found:
        return f"no agent called {address}: start torchrun -m conformance.agent {address} on every node"
    world_size = next(iter(found.values())).hello.world_size
    absent = [str(rank) for rank in range(world_size) if rank not in found]
    return f"{len(found)} of {world_size} agents called {address}, not those of ranks {', '.join(absent)}"


class LaunchedPool(Ranks):
    """One generation of ranks on a launched world.

    Raises:
        PoolStartError: they did not come up; the world is over then.
    """

    def __init__(self, world: World, key: PoolKey, progress: Progress | None = None) -> None:
        super().__init__(key, progress)
        self._world = world
        world.generation += 1
        self._generation = world.generation
        self._running = set(range(key.world_size))
        self._traces: dict[int, Trace] = {}
        for rank, member in enumerate(world.members):
            setup = RankSetup(
                rank=rank,
                world_size=key.world_size,
                device=f"cuda:{member.hello.local_rank}" if key.device == "cuda" else key.device,
                backend=key.backend,
                arch=key.arch,
                directory="",  # the agent's choice
                environment=key.environment,
                rendezvous=f"ep-conformance-{self._generation}",
            )
            member.send(Start(self._generation, setup))
        self._started(self._collect(0, START_LIMIT_S[key.device]))

    def kill(self) -> None:
        """Have the agents kill what still runs, and wait until it is gone; the world is over.

        Raises:
            TimeoutError: a rank does not die.
        """
        self._world.ended = self._world.ended or f"ranks of backend {self.key.backend!r} had to be killed"
        self._reap()

    def _reap(self) -> None:
        for rank in self._running:
            self._world.members[rank].send(End(self._generation))
        deadline = time.monotonic() + KILL_LIMIT_S + MESSAGE_LIMIT_S
        self._await(self._running, deadline, _is_gone)
        stuck = [self._world.members[rank].name for rank in sorted(self._running)]
        self._running = set()
        if stuck:
            what = f"{', '.join(stuck)} outlive SIGKILL"
            self._world.ended = self._world.ended or what
            raise TimeoutError(f"{what}; reset their machines or GPUs")

    def _await(self, ranks: set[int], deadline: float, enough: Callable[[ToDriver], bool], lost: str = "") -> None:
        """Read messages until every rank sent enough, is gone, or the time is up; those who did are taken out.

        ``lost``: what a member is said to be lost for that did not answer in time.
        """
        members = self._world.members
        while waiting := [rank for rank in ranks if not members[rank].lost]:
            ready = wait([members[rank].connection for rank in waiting], max(0.0, deadline - time.monotonic()))
            if not ready:
                for rank in waiting if lost else ():
                    members[rank].lose(lost)
                break
            for rank in waiting:
                if members[rank].connection not in ready:
                    continue
                message = self._message(rank)
                if message is not None and enough(message):
                    ranks.discard(rank)
        ranks -= {rank for rank in ranks if members[rank].lost}

    def _message(self, rank: int) -> ToDriver | None:
        """Next message about this generation; None if it was about another one, or the agent is gone."""
        message = self._world.members[rank].receive()
        if not isinstance(message, Heard | Died | Seen) or message.generation != self._generation:
            return None
        if isinstance(message, Died | Seen):
            self._traces[rank] = message.trace
        if isinstance(message, Died) and message.exit_code is not None:
            self._running.discard(rank)
        return message

    def _send(self, data: bytes) -> None:
        for member in self._world.members:
            member.send(Relay(self._generation, data))

    def _sources(self, waiting: set[int]) -> dict[object, int]:
        return {self._world.members[rank].connection: rank for rank in waiting}

    def _where(self, rank: int) -> str:
        return self._world.members[rank].name

    def _receive(self, rank: int, sequence: int, reply: Reply) -> bool:
        member = self._world.members[rank]
        message = None if member.lost else self._message(rank)
        if member.lost:
            reply.lost[rank] = f"{member.name}: {member.lost}"
            return True
        if isinstance(message, Heard):
            self._take(unpack_answer(message.data), rank, sequence, reply)
            return True
        if isinstance(message, Died):
            reply.dead[rank] = message.exit_code or 0
            return True
        return False

    def _examine(self, reply: Reply, waiting: set[int]) -> None:
        if waiting:
            for rank in waiting:
                self._world.members[rank].send(Look(self._generation, self.dump_stacks))
            asked = set(waiting)
            what = f"its agent says nothing for {LOOK_LIMIT_S:.0f} s"
            deadline = time.monotonic() + LOOK_LIMIT_S
            self._await(asked, deadline, lambda message: isinstance(message, Seen | Died), lost=what)
        for rank in sorted(waiting | set(reply.dead)):
            member = self._world.members[rank]
            if member.lost:
                reply.lost[rank] = f"{member.name}: {member.lost}"
            reply.note(rank, self._traces.get(rank, _UNEXPLAINED))

    def _collect(self, sequence: int, limit_s: float) -> Reply:
        reply = super()._collect(sequence, limit_s)
        if not self._world.ended:
            self._world.ended = _why(reply)
        return reply


def _is_gone(message: ToDriver) -> bool:
    return isinstance(message, Died) and message.exit_code is not None


def _why(reply: Reply) -> str:
    """One line on why a world is over; empty if every rank answered, whatever it said."""
    if reply.lost:
        return "an agent is gone: " + "; ".join(reply.lost.values())
    if reply.dead:
        return f"rank {next(iter(reply.dead))} died"
    if reply.missing:
        return f"rank {reply.missing[0]} did not answer"
    return reply.lost_lockstep
