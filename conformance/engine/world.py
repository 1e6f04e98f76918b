"""A world launched from outside: one agent per rank, started by torchrun, and the pools that run on it.

The driver listens, the agents call (:mod:`conformance.agent`), each for one rank; the ranks themselves are processes
of the agents, so a crash ends a rank and not torchrun. A pool here is one generation of ranks: it ends in order and
another one may follow, but a world in which ranks had to be killed is over, because nobody knows what state the other
nodes' devices and connections are in. What a world does not do: restart, shrink a crash, or lease GPUs of other hosts.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait

from conformance import __version__
from conformance.engine.pool import KILL_LIMIT_S, START_LIMIT_S, PoolKey, Progress, Ranks, Reply
from conformance.engine.protocol import Trace, unpack_answer
from conformance.engine.world_protocol import (
    MESSAGE_LIMIT_S,
    AuthenticationError,
    Compile,
    Compiled,
    Died,
    End,
    Heard,
    Hello,
    Leave,
    Look,
    Relay,
    Seen,
    Start,
    ToAgent,
    ToDriver,
    authenticate,
    connection_of,
    receive_as_driver,
    send,
    split_address,
)
from conformance.rank.main import RankSetup

#: Seconds that all agents have to call.
GATHER_LIMIT_S = 300.0
#: Seconds that an agent has to say what its rank is doing: stacks take some. Who does not answer is lost.
LOOK_LIMIT_S = 20.0
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
            self.lost = f"it takes no message ({error.strerror or type(error).__name__})"

    def receive(self) -> ToDriver | None:
        """One message, or None because the agent is gone."""
        try:
            return receive_as_driver(self.connection)
        except (EOFError, OSError, ValueError) as error:  # ValueError: what came is no message of ours
            self.lost = f"its connection ended ({type(error).__name__})"
            return None

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
        try:
            with server:
                while not found or len(found) < next(iter(found.values())).hello.world_size:
                    server.settimeout(max(0.01, min(1.0, deadline - time.monotonic())))
                    try:
                        member = _welcome(server.accept()[0], token)
                        _fits(member, found)
                        found[member.hello.rank] = member
                    except TimeoutError:
                        pass
                    except (AuthenticationError, EOFError, OSError, ValueError) as error:
                        refused = f"; the last caller was refused: {error or type(error).__name__}"
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
        first = {member.hello.host: member for member in reversed(self.members)}
        asked = [first[host] for host in self.hosts if host != here]
        for member in asked:
            member.send(Compile(tuple(kernel_types)))
        failed = []
        for member in asked:
            wait([member.connection])
            message = None if member.lost else member.receive()
            error = message.error if isinstance(message, Compiled) else member.lost or "it answers something else"
            if error:
                failed.append(f"{member.name}: {error}")
        return failed

    def leave(self) -> None:
        """Send every agent home."""
        for member in self.members:
            member.send(Leave())
            member.connection.close()
            member.lost = member.lost or "the run is over"
        self.ended = self.ended or "the run is over"


def _welcome(made: socket.socket, token: bytes) -> Member:
    """Check a caller.

    Raises:
        AuthenticationError: it holds another token.
        EOFError, OSError, ValueError: it is no agent.
        WorldError: it is of another version of the suite.
    """
    connection = connection_of(made, limited=True)
    try:
        authenticate(connection, token, b"driver")
        hello = receive_as_driver(connection)
        if not isinstance(hello, Hello):
            raise ValueError(f"{type(hello).__name__} came in place of a greeting")
        if hello.version != __version__:
            raise WorldError(f"rank {hello.rank} on {hello.host} has suite {hello.version} and pytest {__version__}")
    except BaseException:
        connection.close()
        raise
    return Member(hello, connection)


def _fits(member: Member, found: dict[int, Member]) -> None:
    """Check a member against those that came before.

    Raises:
        WorldError: it is of another world, or torchrun placed the ranks otherwise than the suite counts them.
    """
    hello = member.hello
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
        """Have the agents kill what still runs, and wait until it is gone.

        Raises:
            TimeoutError: a rank does not die.
        """
        for rank in self._running:
            self._world.members[rank].send(End(self._generation))
        deadline = time.monotonic() + KILL_LIMIT_S + MESSAGE_LIMIT_S
        self._await(self._running, deadline, _is_gone)
        stuck = [self._world.members[rank].name for rank in sorted(self._running)]
        self._running = set()
        if stuck:
            raise TimeoutError(f"{', '.join(stuck)} outlive SIGKILL; reset their machines or GPUs")

    def _await(self, ranks: set[int], deadline: float, enough: Callable[[ToDriver], bool], lost: str = "") -> None:
        """Read messages until every rank sent enough, is gone, or the time is up; those who did are taken out.

        ``lost``: what a member is said to be lost for that did not answer in time.
        """
        members = self._world.members
        while waiting := [rank for rank in ranks if not members[rank].lost]:
            ready = wait([members[rank].connection for rank in waiting], max(0.0, deadline - time.monotonic()))
            if not ready:
                for rank in waiting if lost else ():
                    members[rank].lost = lost
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
        if message is None or isinstance(message, Hello | Compiled) or message.generation != self._generation:
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
