"""Launched worlds: pools on them, and what ends one.

Scope: agents on one host, which stand for nodes. A pass does not prove anything about a network between hosts, or about
GPUs of other hosts.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import pytest

from conformance import __version__
from conformance.engine import world as world_module
from conformance.engine.driver import Driver, InfraError, WorldEndedError
from conformance.engine.pool import Reply
from conformance.engine.world import LaunchedPool, World, WorldError
from conformance.engine.world_protocol import AuthenticationError, Hello, authenticate, connection_of
from conformance.selftest.engine.agents import TOKEN, agents, free_address, torchruns
from conformance.selftest.engine.backends import MODULE, Defect
from conformance.selftest.engine.helpers import ORPHAN_LIMIT_S, alive, case, cell, children, descendants, wait_until
from conformance.verdicts import Verdict

GOOD = case(cell(world_size=2))


@contextmanager
def driven(
    *, launcher: object = agents, nodes: int = 2, per_node: int = 1
) -> Iterator[tuple[Driver, World, list[subprocess.Popen[bytes]]]]:
    """A driver on a launched world."""
    address = free_address()
    with launcher(address, nodes, per_node) as started:  # type: ignore[operator]
        world = World.gather(address, TOKEN.encode(), limit_s=60)
        driver = Driver(f"{MODULE}:Defective", world=world)
        try:
            yield driver, world, started
        finally:
            driver.close()
            world.leave()


def test_generations_of_ranks_follow_each_other_and_all_agents_go_home(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[Reply] = []
    close = LaunchedPool.close

    def noted(pool: LaunchedPool) -> Reply:
        ended.append(close(pool))
        return ended[-1]

    monkeypatch.setattr(LaunchedPool, "close", noted)
    with driven(launcher=torchruns) as (driver, world, started):
        assert (world.world_size, world.nodes, len(world.hosts)) == (2, 2, 1)
        assert driver.run(GOOD).passed
        ranks = [pid for agent in started for pid in descendants(agent.pid)]
        driver.discard()
        assert not world.ended
        assert [reply.alive for reply in ended] == [True], "ranks that answer are let finalise"
        assert driver.run(case(cell(world_size=2), Defect.DROPPED_ROW)).key == (Verdict.FAIL, "dispatch.count")
        assert driver.run(GOOD).passed
        assert world.generation == 2
        driver.close()
        world.leave()
        assert [agent.wait(10) for agent in started] == [0, 0]
        wait_until(lambda: not alive(ranks), ORPHAN_LIMIT_S)


@pytest.mark.parametrize(
    ("defect", "verdict", "check"),
    [(Defect.SEGMENTATION_FAULT, Verdict.CRASH, "SIGSEGV"), (Defect.PYTHON_WAIT, Verdict.HANG, "hang")],
)
def test_a_crash_or_a_hang_is_told_with_its_stack_and_ends_the_world(
    defect: Defect, verdict: Verdict, check: str
) -> None:
    with driven() as (driver, world, started):
        assert driver.run(GOOD).passed
        ranks = [pid for agent in started for pid in descendants(agent.pid)]
        outcome = driver.run(case(cell(world_size=2), defect, rank=1), limit_s=3)
        assert outcome.key == (verdict, check)
        assert "selftest/engine/backends.py" in outcome.stacks[1]
        assert world.ended == driver.ended != ""
        with pytest.raises(WorldEndedError, match=r"the launched world is over: rank \d .*start its agents again"):
            driver.run(GOOD)
        # The forkservers stay for as long as the agents do.
        servers = [pid for agent in started for pid in children(agent.pid)]
        wait_until(lambda: set(alive(ranks)) <= set(servers), 10)
        world.leave()
        assert [agent.wait(10) for agent in started] == [0, 0]


@pytest.mark.parametrize("lost", ["killed", "stopped"])
def test_a_lost_agent_is_infrastructure(lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world_module, "LOOK_LIMIT_S", 2.0)
    with driven() as (driver, world, _):
        assert driver.run(GOOD).passed
        pid = world.members[1].hello.pid
        os.kill(pid, signal.SIGKILL if lost == "killed" else signal.SIGSTOP)
        with pytest.raises(InfraError, match="an agent of the launched world is gone during case: rank 1 on "):
            driver.run(case(cell(world_size=2), seed=1), limit_s=3)
        assert "an agent is gone" in world.ended


def test_ranks_end_with_the_torchrun_that_started_them() -> None:
    with driven(launcher=torchruns) as (driver, world, started):
        assert driver.run(GOOD).passed
        below = descendants(started[1].pid)
        started[1].kill()
        wait_until(lambda: not alive(below), 10)
        with pytest.raises(InfraError, match=r"rank 1 on .*: its connection ended"):
            driver.run(GOOD)
    assert "an agent is gone" in world.ended


def test_agents_end_with_their_driver() -> None:
    address = free_address()
    with agents(address, 2, 1) as started:
        world = World.gather(address, TOKEN.encode(), limit_s=60)
        for member in world.members:
            member.connection.close()
        assert [agent.wait(10) for agent in started] == [1, 1]
        assert started[0].stderr is not None
        assert b"the driver is gone" in started[0].stderr.read()


def test_an_agent_with_another_token_is_refused() -> None:
    address = free_address()
    with agents(address, 1, 1, token="0" * 32) as started:
        with pytest.raises(WorldError, match=r"no agent called .* within 3 s; the last caller was refused"):
            World.gather(address, TOKEN.encode(), limit_s=3)
        assert started[0].wait(20) == 1


def test_a_world_that_does_not_come_together_names_the_ranks() -> None:
    address = free_address()
    with agents(address, 2, 2, count=3), pytest.raises(WorldError, match=r"3 of 4 agents .* not those of ranks 3"):
        World.gather(address, TOKEN.encode(), limit_s=5)


def hello(**change: object) -> Hello:
    given = {"rank": 0, "world_size": 2, "local_rank": 0, "local_world_size": 1, "host": "a", "pid": 1}
    return Hello(**{**given, "version": __version__, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (hello(), "rank 0 called twice"),
        (hello(rank=1, world_size=4), "start one world only"),
        (hello(rank=1, local_rank=1), "the same --nproc-per-node"),
        (hello(rank=1, version="0"), "has suite 0 and pytest"),
    ],
)
def test_callers_that_do_not_belong_together(second: Hello, said: str) -> None:
    address = free_address()
    called: list[Connection] = []

    def calling() -> None:
        from conformance.agent import call

        called.extend(call(address, TOKEN.encode(), each, 10) for each in (hello(), second))

    caller = threading.Thread(target=calling)
    caller.start()
    with pytest.raises(WorldError, match=said):
        World.gather(address, TOKEN.encode(), limit_s=10)
    caller.join()
    for connection in called:
        connection.close()


def _pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return socket.create_connection(server.getsockname()), server.accept()[0]


@pytest.mark.parametrize(
    ("ours", "theirs", "roles"),
    [
        (b"a" * 16, b"b" * 16, (b"driver", b"agent")),
        (b"a" * 16, b"a" * 16, (b"driver", b"driver")),
    ],
)
def test_neither_another_token_nor_ones_own_words_prove_anything(
    ours: bytes, theirs: bytes, roles: tuple[bytes, bytes]
) -> None:
    left, right = (connection_of(end, limited=True) for end in _pair())
    failed: list[str] = []

    def prove(connection: Connection, token: bytes, role: bytes) -> None:
        try:
            authenticate(connection, token, role)  # type: ignore[arg-type]
        except AuthenticationError:
            failed.append(role.decode())

    other = threading.Thread(target=prove, args=(right, theirs, roles[1]))
    other.start()
    prove(left, ours, roles[0])
    other.join()
    assert sorted(failed) == sorted(role.decode() for role in roles)


def test_kernels_are_compiled_on_the_other_hosts_and_the_compiler_is_quoted() -> None:
    with driven() as (driver, world, _):
        assert world.compile(["InterNodeV1"]) == [], "this host compiles without an agent"
        (failed,) = world.compile(["InterNodeV1"], here="elsewhere")
        assert failed.startswith(f"rank 0 on {world.hosts[0]}: ")
        assert "mori is missing" in failed
        assert driver.run(GOOD).passed
