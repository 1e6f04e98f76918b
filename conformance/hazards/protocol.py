"""Messages of a pool of probes, over the pipes and with the sequence numbers of the engine's own.

Scope: data. What a rank saw travels in the text of the engine's answer.
"""

from __future__ import annotations

import msgspec

from conformance.engine.protocol import Canary, Stop


class Ask(msgspec.Struct, tag="ask"):
    """Look for one hazard on every rank."""

    sequence: int
    limit_s: float
    module: str
    function: str
    kernel_types: tuple[str, ...]
    rounds: int = 1
    environment: tuple[tuple[str, str], ...] = ()  # while the probe runs


class Seen(msgspec.Struct, frozen=True):
    """What one rank saw: in how many rounds, and what."""

    times: int
    text: str


Command = Ask | Canary | Stop

_commands = msgspec.msgpack.Decoder(Command)
_seen = msgspec.json.Decoder(Seen)


def pack(command: Command) -> bytes:
    """Serialise a command."""
    return msgspec.msgpack.encode(command)


def unpack(data: bytes) -> Command:
    """Read what the driver sent."""
    command: Command = _commands.decode(data)
    return command


def read_seen(text: str) -> Seen:
    """Read what a rank saw."""
    return _seen.decode(text)


def write_seen(seen: Seen) -> str:
    """What a rank saw, for its answer."""
    return msgspec.json.encode(seen).decode()
