"""Launched worlds: pools on them, and what ends one.

Scope: agents on one host, which stand for nodes. A pass does not prove anything about a network between hosts, or about
GPUs of other hosts.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import pytest

from conformance import __version__
from conformance.engine import callers as callers_module
from conformance.engine import world as world_module
from conformance.engine.driver import Driver, InfraError, StartError, WorldEndedError
from conformance.engine.pool import Reply
from conformance.engine.world import LaunchedPool, Member, World, WorldError
from conformance.engine.world_protocol import (
    SILENT_HOST_S,
    AuthenticationError,
    Examine,
    Hello,
    ToAgent,
    authenticate,
    connection_of,
    send,
)
from conformance.selftest.engine.agents import TOKEN, agents, free_address, torchruns
from conformance.selftest.engine.backends import MODULE, Defect
from conformance.selftest.engine.helpers import ORPHAN_LIMIT_S, alive, case, cell, children, descendants, wait_until
from conformance.verdicts import Verdict

GOOD = case(cell(world_size=2))


@contextmanager
def driven(
    *, launcher: object = agents, nodes: int = 2, per_node: int = 1, backend: str = "Defective"
) -> Iterator[tuple[Driver, World, list[subprocess.Popen[bytes]]]]:
    """A driver on a launched world."""
    address = free_address()
    with launcher(address, nodes, per_node) as started:  # type: ignore[operator]
        world = World.gather(address, TOKEN.encode(), limit_s=60)
        driver = Driver(f"{MODULE}:{backend}", world=world)
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


def test_an_agent_that_takes_no_message_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with driven() as (driver, world, _):
        assert driver.run(GOOD).passed
        deaf = world.members[1].connection

        def sent(connection: Connection, message: ToAgent) -> None:
            if connection is deaf:
                raise TimeoutError(11, "Resource temporarily unavailable")
            send(connection, message)

        monkeypatch.setattr(world_module, "send", sent)
        begun = time.monotonic()
        with pytest.raises(InfraError, match=r"rank 1 on .*: it takes no message"):
            driver.run(case(cell(world_size=2), seed=1), limit_s=40)
        assert time.monotonic() - begun < 20


def test_ranks_that_had_to_be_killed_end_the_world() -> None:
    with driven(backend="RaisesAtOpen") as (driver, world, _):
        with pytest.raises(StartError, match="does not like these ids"):
            driver.run(case(cell("RaisesAtOpen", world_size=2)))
        assert "had to be killed" in world.ended
        with pytest.raises(WorldEndedError, match="start its agents again"):
            driver.run(case(cell("RaisesAtOpen", world_size=2)))


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


def test_callers_that_say_nothing_hold_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callers_module, "CALLER_LIMIT_S", 1.0)
    address = free_address()
    host, port = address.split(":")
    silent: list[socket.socket] = []
    ready = threading.Event()

    def call_idly() -> None:
        for _ in range(400):
            try:
                silent.append(socket.create_connection((host, int(port))))
            except OSError:
                time.sleep(0.02)
            if len(silent) == 3:
                return ready.set()

    caller = threading.Thread(target=call_idly)
    caller.start()
    begun = time.monotonic()
    with pytest.raises(WorldError, match=r"no agent called .* within 3 s; the last caller was refused"):
        World.gather(address, TOKEN.encode(), limit_s=3)
    assert time.monotonic() - begun < 6
    caller.join()
    assert ready.is_set()
    for made in silent:
        made.settimeout(5)
        while made.recv(1 << 16):  # until the driver hung up
            pass
        made.close()


def test_an_agent_is_heard_beside_callers_that_say_nothing() -> None:
    address = free_address()
    host, port = address.split(":")
    called: list[Connection | socket.socket] = []

    def calling() -> None:
        from conformance.agent import call

        wait_until(lambda: _connects(called, host, int(port)), 10)
        called.append(call(address, TOKEN.encode(), hello(world_size=1), 10))

    caller = threading.Thread(target=calling)
    caller.start()
    begun = time.monotonic()
    world = World.gather(address, TOKEN.encode(), limit_s=40)
    assert time.monotonic() - begun < callers_module.CALLER_LIMIT_S
    caller.join()
    world.leave()
    for connection in called:
        connection.close()


def _connects(made: list[Connection | socket.socket], host: str, port: int) -> bool:
    """Connect once somebody listens, and say nothing."""
    with contextlib.suppress(ConnectionRefusedError):
        made.append(socket.create_connection((host, port)))
    return bool(made)


def test_a_host_that_falls_silent_is_noticed_within_the_limit() -> None:
    for end in (connection_of(end, limited=limited) for end, limited in zip(_pair(), (True, False), strict=True)):
        with end, socket.socket(fileno=os.dup(end.fileno())) as made:
            idle, interval, probes = (
                made.getsockopt(socket.IPPROTO_TCP, option)
                for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            )
            assert made.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert idle + probes * interval <= SILENT_HOST_S
            assert made.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == SILENT_HOST_S * 1000


def test_nobody_waits_for_the_compiler_of_an_agent_that_is_gone() -> None:
    left, right = (connection_of(end, limited=True) for end in _pair())
    world = World([Member(hello(world_size=1), left, lost="it is gone")])
    failed: list[str] = []
    asking = threading.Thread(target=lambda: failed.extend(world.compile(["IntraNode"], here="b")), daemon=True)
    asking.start()
    asking.join(5)
    assert failed == ["rank 0 on a: it is gone"]
    for end in (left, right):
        end.close()


def test_every_agent_says_what_its_host_is_and_one_of_a_host_checks_it() -> None:
    with driven() as (driver, world, _):
        first, second = world.examine(Examine("cpu", "gfx942", ("mori",), "p2p", 1, 2))
        assert first.fingerprint == second.fingerprint != {}
        assert not first.error
        assert not second.error
        assert any("mori is not installed" in what for what, _ in first.findings)
        assert second.findings == ()
        assert driver.run(GOOD).passed


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
