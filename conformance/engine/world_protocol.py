"""Messages between the driver and the agents of a launched world, and how the two prove that they belong together.

One TCP connection per rank. Commands and answers of the ranks travel inside unchanged, sequence numbers included; what
is new here is about the processes: start one, end it, say what is left of it. Both ends prove that they hold the same
token (HMAC-SHA-256 of the other's nonce, with the roles in it, so that nothing can be played back). What this does not
do: encrypt. Whoever reads the network reads cases and verdicts; the token never travels.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import socket
import struct
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import msgspec

from conformance.engine.protocol import Trace
from conformance.rank.main import RankSetup

#: Environment variables that carry the token, or name a file that holds it.
TOKEN_VARIABLE = "EP_CONFORMANCE_TOKEN"
TOKEN_FILE_VARIABLE = "EP_CONFORMANCE_TOKEN_FILE"
SHORTEST_TOKEN = 16
#: Seconds that the other end may take to prove itself, or to send the rest of a message.
MESSAGE_LIMIT_S = 20
#: Seconds after which a host that acknowledges nothing is gone: probes of an idle connection, and unacknowledged data.
SILENT_HOST_S = 60
_PROBES = 4
_NONCE_BYTES = 32

Role = Literal[b"driver", b"agent"]


class AuthenticationError(ValueError):
    """The other end does not hold the same token."""


class TokenError(ValueError):
    """There is no usable token here. The message says which variable to set."""


class Hello(msgspec.Struct, tag="hello"):
    """What an agent says of itself, from torchrun's environment."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    host: str
    pid: int
    version: str  # of the suite


class Start(msgspec.Struct, tag="start"):
    """Start the rank's process; the agent gives it a directory of its own."""

    generation: int
    setup: RankSetup


class Relay(msgspec.Struct, tag="relay"):
    """Hand a command to the rank."""

    generation: int
    data: bytes


class Look(msgspec.Struct, tag="look"):
    """Say what the rank is doing."""

    generation: int
    stack: bool


class End(msgspec.Struct, tag="end"):
    """Kill the rank if it lives."""

    generation: int


class Compile(msgspec.Struct, tag="compile"):
    """Have MoRI compile the kernels of these types on the agent's host, however long it takes."""

    kernel_types: tuple[str, ...]


class Examine(msgspec.Struct, tag="examine", frozen=True):
    """Say what the agent's host is: asked of a process of its own there (:mod:`conformance.suite.host`)."""

    device: str
    arch: str
    backends: tuple[str, ...]
    transport: str
    hosts: int
    ranks: int  # on the agent's host
    whole: bool = False  # the checks of the host, too, which one of its agents makes


class Leave(msgspec.Struct, tag="leave"):
    """The run is over."""


class Heard(msgspec.Struct, tag="heard"):
    """The rank answered."""

    generation: int
    data: bytes


class Died(msgspec.Struct, tag="died"):
    """The rank's process ended; None: it outlives SIGKILL."""

    generation: int
    exit_code: int | None
    trace: Trace


class Compiled(msgspec.Struct, tag="compiled"):
    """The kernels are compiled; otherwise the compiler's last words."""

    error: str = ""


class Examined(msgspec.Struct, tag="examined"):
    """Versions and environment of the agent's host, the GPUs it sees, and what it lacks; or why nothing is known."""

    fingerprint: dict[str, str] = {}
    devices: tuple[dict[str, Any], ...] = ()  # fields of :class:`conformance.suite.preflight.Device`
    findings: tuple[tuple[str, str], ...] = ()  # what, and its remedy
    error: str = ""


class Seen(msgspec.Struct, tag="seen"):
    """Answer to :class:`Look`."""

    generation: int
    trace: Trace


ToAgent = Start | Relay | Look | End | Compile | Examine | Leave
ToDriver = Hello | Heard | Died | Seen | Compiled | Examined

_encoder = msgspec.msgpack.Encoder()
_to_agent = msgspec.msgpack.Decoder(ToAgent)
_to_driver = msgspec.msgpack.Decoder(ToDriver)


def send(connection: Connection, message: ToAgent | ToDriver) -> None:
    """Send one message.

    Raises:
        OSError: the other end is gone, or takes nothing for :data:`MESSAGE_LIMIT_S`.
    """
    connection.send_bytes(_encoder.encode(message))


def receive_as_agent(connection: Connection) -> ToAgent:
    """Read what the driver sent.

    Raises:
        EOFError, OSError: the driver is gone.
    """
    message: ToAgent = _to_agent.decode(connection.recv_bytes())
    return message


def receive_as_driver(connection: Connection) -> ToDriver:
    """Read what an agent sent.

    Raises:
        EOFError, OSError: the agent is gone, or a message stops half-way.
    """
    message: ToDriver = _to_driver.decode(connection.recv_bytes())
    return message


def read_token(environment: Mapping[str, str]) -> bytes:
    """The token that the environment carries, or the file it names.

    Raises:
        TokenError: there is none, it is too short, or the file cannot be read.
    """
    token, path = environment.get(TOKEN_VARIABLE, ""), environment.get(TOKEN_FILE_VARIABLE, "")
    if not token and path:
        try:
            token = Path(path).read_text().strip()
        except OSError as error:
            raise TokenError(f"{TOKEN_FILE_VARIABLE} {path} cannot be read ({error.strerror})") from error
    if len(token) < SHORTEST_TOKEN:
        raise TokenError(
            f"the token has {len(token)} characters and needs {SHORTEST_TOKEN}; set {TOKEN_VARIABLE} (or "
            f"{TOKEN_FILE_VARIABLE}) to the same secret for pytest and for torchrun on every node, e.g. of "
            "`openssl rand -hex 16`"
        )
    return token.encode()


def authenticate(connection: Connection, token: bytes, role: Role) -> None:
    """Prove this end to the other one and the other one to this.

    Raises:
        AuthenticationError: the other end holds another token, or is no end of ours.
        EOFError, OSError: it is gone, or says nothing.
    """
    nonce = secrets.token_bytes(_NONCE_BYTES)
    connection.send_bytes(nonce)
    challenge = connection.recv_bytes(_NONCE_BYTES)
    connection.send_bytes(_proof(token, role, challenge))
    other: Role = b"agent" if role == b"driver" else b"driver"
    if not hmac.compare_digest(connection.recv_bytes(_NONCE_BYTES), _proof(token, other, nonce)):
        raise AuthenticationError("the other end holds another token")


def _proof(token: bytes, role: Role, challenge: bytes) -> bytes:
    return hmac.new(token, b"ep-conformance " + role + challenge, hashlib.sha256).digest()


def connection_of(made: socket.socket, *, limited: bool) -> Connection:
    """A message connection over a socket that finds out when the other host is gone.

    ``limited`` bounds the seconds of one read or write once it has begun.
    """
    made.setblocking(True)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, SILENT_HOST_S // 2)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, SILENT_HOST_S // 2 // _PROBES)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENT_HOST_S * 1000)
    if limited:
        limit = struct.pack("ll", MESSAGE_LIMIT_S, 0)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
    return Connection(made.detach())


def hang_up(connection: Connection) -> None:
    """Shut a connection down: both ends read its end at once. The descriptor stays open, so it can be waited for."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as made:
        made.shutdown(socket.SHUT_RDWR)


def split_address(text: str) -> tuple[str, int]:
    """Host and port of ``host:port``; an IPv6 address stands in brackets.

    Raises:
        ValueError: it is none.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise ValueError(f"{text!r} is no address; give host:port, such as 127.0.0.1:29600")
    return host.strip("[]"), int(port)


def parent_handle() -> int:
    """A descriptor that becomes readable when this process's parent ends."""
    return os.pidfd_open(os.getppid())
