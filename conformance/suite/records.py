"""Records: JSON lines, one file per process, a begin line before a case is sent and an end line after it.

Lines go straight to an append-only descriptor, so what was written survives a crash of anything.
An unmatched begin is a case that was under way when its worker died. Reports and gates read only records.
"""

from __future__ import annotations

import enum
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from conformance.cases import AnyCase, AnyCell
from conformance.verdicts import Verdict


class WaiverRecord(msgspec.Struct):
    """An entry of the user's file of waivers, and what it is to this run."""

    entry: int
    issue: str
    reason: str
    state: str  # "applied", "idle" (not about what this run consists of) or "stale" (about nothing there is)
    cells: int  # of the run that it covers
    detail: str = ""  # why it is not applied


class WaivedRecord(msgspec.Struct):
    """What a waiver did in a cell."""

    entry: int
    issue: str
    reason: str
    verdict: Verdict
    avoided: int  # distinct cases that were drawn and taken out
    sampled: int  # of which so many were run
    failed: int  # and so many failed as the waiver says


class RunRecord(msgspec.Struct, tag="run"):
    """Opening line of a run, written by the controller."""

    suite_version: str
    tier: str
    backends: tuple[str, ...]
    standins: tuple[str, ...]
    device: str
    arch: str
    fingerprint: dict[str, str]
    planned: tuple[str, ...]
    unsupported: tuple[dict[str, Any], ...]
    unclaimed: tuple[str, ...] = ()  # planned cells whose failure is a finding
    yardsticks: tuple[str, ...] = ()  # planned cells by which the others are judged
    caveats: tuple[str, ...] = ()  # what the results of a backend that is no stand-in do not say on this device
    waivers: tuple[WaiverRecord, ...] = ()
    transport: str = ""  # of MoRI's puts within a host
    world: str = ""  # sizes and hosts of a launched world; empty where the suite started the ranks


class BeginRecord(msgspec.Struct, tag="begin"):
    """A case is about to be sent."""

    case_id: str
    cell: str
    origin: str  # generated, repeat, reduction, replay, waived, capability
    case: AnyCase


class EndRecord(msgspec.Struct, tag="end"):
    """A case was answered for."""

    case_id: str
    cell: str
    origin: str
    verdict: Verdict
    check: str
    ratio: float
    seconds: float
    tokens: int
    classes: tuple[str, ...] = ()
    expected: bool = False  # a waiver of the case says that it fails so
    kernels: tuple[str, ...] = ()  # of combine, as the backend names what it launched


class CellRecord(msgspec.Struct, tag="cell"):
    """A cell is finished."""

    label: str
    cell: AnyCell
    verdict: Verdict
    standin: bool
    companion: bool
    distinct: int
    planned: int
    ratio: float
    seconds: float
    reason: str = ""
    failure: str = ""  # directory of the failure
    summary: str = ""  # one line
    waived: tuple[WaivedRecord, ...] = ()
    lacking: int = 0  # cases that the budget had and that waivers left nothing to be drawn for


class Capability(str, enum.Enum):
    """What became of a combination that was tried."""

    RUNS = "runs"
    WRONG = "wrong"  # it answers, and not as the reference does
    REFUSED = "refused"
    CRASHES = "crashes"
    HANGS = "hangs"
    NOT_BUILT = "not built"  # the library does not initialise, or lacks it
    UNKNOWN = "unknown"  # the harness or the machine failed
    QUARANTINED = "quarantined"  # a waiver says that it is never launched


class CapabilityRecord(msgspec.Struct, tag="capability"):
    """What this build can do on this machine, for one combination."""

    backend: str
    kernel_type: str
    world_size: int
    nodes: int
    standing: str  # claimed, unclaimed, refused, or refused in part (of some sizes): what the contract says
    state: Capability
    message: str = ""
    manner: str = ""  # wire format, combine codec and modes, where they are not plain
    standin: bool = False
    cell: str = ""
    case_id: str = ""
    seconds: float = 0.0
    tried: bool = True


class HazardBeginRecord(msgspec.Struct, tag="hazard begin"):
    """A hazard is about to be looked for."""

    hazard: str
    backend: str
    reference: str  # of the written contract
    kernel_types: tuple[str, ...]
    world_size: int
    nodes: int
    arch: str
    environment: tuple[tuple[str, str], ...] = ()


class HazardRecord(msgspec.Struct, tag="hazard"):
    """What became of looking for a hazard."""

    hazard: str
    backend: str
    reference: str
    state: str  # PRESENT, ABSENT or UNTESTED
    text: str  # what was seen, or why it was not looked for
    standin: bool = False
    arch: str = ""
    kernel_types: tuple[str, ...] = ()
    world_size: int = 0
    nodes: int = 1
    times: int = 0  # rounds that showed it
    rounds: int = 0  # of so many, where more than one is needed
    rate: float = 0.0  # that so many rounds exclude at 95 %
    seconds: float = 0.0
    tried: bool = True
    broken: bool = False  # the machine or the harness failed
    unexpected: bool = False  # ranks ended in another way than the hazard's
    stacks: tuple[str, ...] = ()
    command: str = ""  # that repeats the probe


Record = RunRecord | BeginRecord | EndRecord | CellRecord | CapabilityRecord | HazardBeginRecord | HazardRecord

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Record)


class RecordWriter:
    """Appends records to one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def write(self, record: Record) -> None:
        """Append one line.

        Raises:
            OSError: it cannot be written, in full or at all.
        """
        rest = memoryview(_encoder.encode(record) + b"\n")
        while rest:
            try:
                written = os.write(self._fd, rest)
            except OSError as error:
                raise self._unwritable(error.errno or 0, str(error.strerror)) from error
            if written <= 0:
                raise self._unwritable(errno.ENOSPC, "nothing more is taken")
            rest = rest[written:]

    def _unwritable(self, number: int, reason: str) -> OSError:
        return OSError(number, f"records cannot be written to {self.path} ({reason}); make room, or give --output-dir")

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def read_records(directory: Path) -> Iterator[Record]:
    """Every readable record of a run, file by file; a torn last line (a killed writer) is skipped."""
    for path in sorted(directory.glob("*.jsonl")):
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines):
            if not line:
                continue
            try:
                yield _decoder.decode(line)
            except msgspec.MsgspecError as error:
                if number < len(lines) - 1:
                    raise ValueError(f"{path}:{number + 1} is not a record: {error}; remove the file") from error
