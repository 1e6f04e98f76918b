"""Messages between the driver and its ranks: one pipe per rank, msgpack, a sequence number on every message.

Tensors never travel. An answer that carries another sequence number than the last command is lost lockstep, which is a
defect of the harness and never of the product.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from conformance.cases import AnyCase, AnyCell


class Mismatch(msgspec.Struct):
    """One failed check on one rank, with the coordinates of one bad element. -1 means "not applicable"."""

    check: str
    round: int  # of a sequence's case: the round that the step dispatched or combined
    message: str
    source_rank: int = -1
    token: int = -1
    slot: int = -1
    element: int = -1
    got: str = ""
    wanted: str = ""
    bound: str = ""
    routed: str = ""
    step: int = -1  # of a sequence

    def text(self) -> str:
        """One readable paragraph."""
        places = [
            f"{name} {value}"
            for name, value in (
                ("step", self.step),
                ("round", self.round),
                ("source rank", self.source_rank),
                ("token", self.token),
                ("slot", self.slot),
                ("element", self.element),
            )
            if value >= 0
        ]
        lines = [f"{self.check}: {self.message}", "at " + ", ".join(places)]
        if self.routed:
            lines.append(f"token routed to experts {self.routed}")
        if self.got:
            lines.append(f"got {self.got}, wanted {self.wanted}" + (f", accepted {self.bound}" if self.bound else ""))
        return "\n".join(lines)


class Build(msgspec.Struct, tag="build"):
    """Close the operator if there is one and build the cell's."""

    sequence: int
    cell: AnyCell
    limit_s: float


class Run(msgspec.Struct, tag="run"):
    """Run one case on the operator."""

    sequence: int
    case: AnyCase
    limit_s: float


class Canary(msgspec.Struct, tag="canary"):
    """Exchange rank numbers over the process group and check them."""

    sequence: int
    limit_s: float


class Stop(msgspec.Struct, tag="stop"):
    """Close operator and session, leave the process group and end."""

    sequence: int


Command = Build | Run | Canary | Stop


class Trace(msgspec.Struct):
    """What is left of a rank that died or did not answer. Empty where nothing is known."""

    phase: str = "unknown"
    stderr: str = ""  # its last lines: libraries that abort say why there
    stack: str = ""


Status = Literal["ready", "pass", "fail", "raised", "harness"]


class Answer(msgspec.Struct):
    """What a rank says to one command.

    ``raised`` is an exception in the backend, ``harness`` one in our own code; both carry the traceback in ``text``.
    """

    sequence: int
    rank: int
    status: Status
    mismatch: Mismatch | None = None
    ratio: float = 0.0
    text: str = ""
    kind: str = ""  # exception type of "raised" and "harness"
    phase: str = ""
    kernels: tuple[str, ...] = ()  # that the backend says it launched


_encoder = msgspec.msgpack.Encoder()
_commands = msgspec.msgpack.Decoder(Command)
_answers = msgspec.msgpack.Decoder(Answer)


def pack(message: Command | Answer) -> bytes:
    """Serialise a message."""
    return _encoder.encode(message)


def unpack_command(data: bytes) -> Command:
    """Read what the driver sent."""
    command: Command = _commands.decode(data)
    return command


def unpack_answer(data: bytes) -> Answer:
    """Read what a rank sent."""
    return _answers.decode(data)
