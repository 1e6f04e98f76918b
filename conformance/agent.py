"""The agent of one rank of a launched world: ``torchrun ... -m conformance.agent HOST:PORT``, the same on every node.

An agent calls the driver (``pytest conformance --world HOST:PORT``), starts the rank's process when it is told to,
hands messages on, and says how the process ended. It imports no torch, so nothing that a library does can take it down.
The rank ends with its agent, the agent with its driver or with the torchrun that started it. What an agent never does:
run a case, or judge one.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType

import msgspec

from conformance import __version__
from conformance.engine.pool import KILL_LIMIT_S, RankProcess, stop_forkserver, trace_of
from conformance.engine.protocol import Trace
from conformance.engine.world_protocol import (
    TOKEN_VARIABLE,
    AuthenticationError,
    Compile,
    Compiled,
    Died,
    End,
    Examine,
    Examined,
    Heard,
    Hello,
    Look,
    Relay,
    Seen,
    Start,
    ToAgent,
    TokenError,
    authenticate,
    connection_of,
    parent_handle,
    read_token,
    receive_as_agent,
    send,
    split_address,
)
from conformance.rank.main import RankSetup

#: Seconds that an agent waits for its driver to listen.
CALL_LIMIT_S = 600.0
_RETRY_S = 0.2


class _Rank:
    """The rank's process of one generation and the directory it writes to."""

    def __init__(self, generation: int, setup: RankSetup) -> None:
        self.generation, self.number = generation, setup.rank
        self.directory = Path(tempfile.mkdtemp(prefix="ep-rank-"))
        self.running = RankProcess(msgspec.structs.replace(setup, directory=str(self.directory)))
        self.speaks = True

    def sources(self) -> list[Connection | int]:
        """What to wait for."""
        pipes = [self.running.connection] if self.speaks else []
        return [*pipes, self.running.process.sentinel]

    def heard(self) -> bytes | None:
        """A waiting answer, or None."""
        try:
            return self.running.connection.recv_bytes() if self.speaks and self.running.connection.poll() else None
        except (EOFError, OSError):
            self.speaks = False
            return None

    def trace(self, *, stack: bool) -> Trace:
        """What the rank is doing, or did last."""
        process = self.running.process
        return trace_of(self.directory, self.number, process.pid if process.is_alive() else None, stack=stack)

    def end(self) -> Died:
        """Kill the process if it lives; how it ended, and what it left."""
        process = self.running.process
        if process.is_alive():
            process.kill()
        process.join(KILL_LIMIT_S)
        died = Died(self.generation, process.exitcode, self.trace(stack=True))
        self.running.reap(time.monotonic())
        shutil.rmtree(self.directory, ignore_errors=True)
        return died


def serve(driver: Connection, parent: int) -> int:
    """Do what the driver says until it sends the agent home; the exit status of the agent.

    Args:
        driver: authenticated connection.
        parent: descriptor that becomes readable when torchrun ends.
    """
    rank: _Rank | None = None
    try:
        while True:
            ready = wait([driver, parent, *(rank.sources() if rank is not None else ())])
            if parent in ready:
                return _say("torchrun is gone")
            if rank is not None and (answer := rank.heard()) is not None:
                send(driver, Heard(rank.generation, answer))
            elif rank is not None and rank.running.process.sentinel in ready:
                send(driver, rank.end())
                rank = None
            if driver not in ready:
                continue
            message = receive_as_agent(driver)
            if isinstance(message, Start):
                if rank is not None:
                    rank.end()
                rank = _Rank(message.generation, message.setup)
            elif isinstance(message, Relay | Look | End):
                rank = _handled(driver, message, rank)
            elif isinstance(message, Compile):
                send(driver, Compiled(compile_kernels(message.kernel_types)))
            elif isinstance(message, Examine):
                send(driver, examine(message))
            else:
                return 0
    except (EOFError, OSError) as error:
        return _say(f"the driver is gone ({type(error).__name__})")
    finally:
        driver.close()  # first: the driver learns that the agent is lost before it hears of other ranks
        if rank is not None:
            rank.end()


def _handled(driver: Connection, message: ToAgent, rank: _Rank | None) -> _Rank | None:
    """Answer a message about the rank; what is left of the rank."""
    if rank is None:
        return None  # its end was told already
    if isinstance(message, Relay):
        rank.running.send(message.data)
    elif isinstance(message, Look):
        send(driver, Seen(rank.generation, rank.trace(stack=message.stack)))
    else:
        send(driver, rank.end())
        return None
    return rank


def compile_kernels(kernel_types: Sequence[str]) -> str:
    """Compile MoRI's kernels in a process that nothing of ours kills; its last words if it fails."""
    command = [sys.executable, "-m", "accelerated.mori_ep.warmup", *kernel_types]
    done = subprocess.run(command, capture_output=True, text=True, check=False, start_new_session=True)
    return " | ".join(done.stderr.strip().splitlines()[-4:]) if done.returncode else ""


def examine(request: Examine) -> Examined:
    """What this host is, asked of a process of its own, which opens the devices as a rank would."""
    command = [sys.executable, "-m", "conformance.suite.host", msgspec.json.encode(request).decode()]
    # Its search path is that of the ranks.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(p or os.getcwd() for p in sys.path))}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        return Examined(error=" | ".join(done.stderr.strip().splitlines()[-4:]) or f"exit {done.returncode}")
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=Examined)


def call(address: str, token: bytes, hello: Hello, limit_s: float) -> Connection:
    """Connect to the driver, who may begin to listen later.

    Raises:
        AuthenticationError: it holds another token.
        TimeoutError: nobody who knows the token listened in time.
    """
    host, port = split_address(address)
    deadline = time.monotonic() + limit_s
    while True:
        with contextlib.suppress(OSError, EOFError):
            made = socket.create_connection((host, port), timeout=_RETRY_S * 25)
            driver = connection_of(made, limited=True)
            try:
                authenticate(driver, token, b"agent")
                send(driver, hello)
            except BaseException:
                driver.close()
                raise
            return driver
        if time.monotonic() > deadline:
            raise TimeoutError(f"nobody listens on {address} for {limit_s:.0f} s; start pytest --world {address}")
        time.sleep(_RETRY_S)


def hello_of(environment: Mapping[str, str]) -> Hello:
    """Who this agent is.

    Raises:
        KeyError: it was not started by torchrun.
    """
    return Hello(
        rank=int(environment["RANK"]),
        world_size=int(environment["WORLD_SIZE"]),
        local_rank=int(environment["LOCAL_RANK"]),
        local_world_size=int(environment["LOCAL_WORLD_SIZE"]),
        host=socket.gethostname(),
        pid=os.getpid(),
        version=__version__,
    )


def _say(text: str) -> int:
    print(f"conformance.agent, rank {os.environ.get('RANK', '?')}: {text}", file=sys.stderr, flush=True)
    return 1


def _terminated(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)  # through the finally clauses, so that rank and directory go


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m conformance.agent", description="One rank of a launched world.")
    parser.add_argument("address", metavar="HOST:PORT", help="where pytest --world listens")
    parser.add_argument("--wait", type=float, default=CALL_LIMIT_S, metavar="S", help="seconds to wait for pytest")
    given = parser.parse_args(arguments)
    parent = parent_handle()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _terminated)
    try:
        token = read_token(os.environ)
        hello = hello_of(os.environ)
        os.environ.pop(TOKEN_VARIABLE, None)  # no library of the rank has any use for it
        driver = call(given.address, token, hello, given.wait)
    except KeyError as error:
        return _say(f"{error} is not set; start the agent with torchrun")
    except (AuthenticationError, TokenError, TimeoutError, ValueError) as error:
        return _say(str(error))
    try:
        return serve(driver, parent)
    finally:
        stop_forkserver()


if __name__ == "__main__":
    sys.exit(main())
