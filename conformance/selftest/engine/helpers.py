"""Cases spelt out, process trees from /proc, and waiting for a condition. Proves nothing by itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from conformance.cases import Case, Cell, Explicit, Round
from conformance.row_cases import Mode
from conformance.selftest.engine.backends import MODULE, Defect

T = TypeVar("T")
#: Seconds after which nothing of a killed process may be left.
ORPHAN_LIMIT_S = 5.0
PATIENCE_S = 60.0


def cell(
    factory: str = "Defective", world_size: int = 4, mode: Mode = "drained", kernel_type: str = "one-level"
) -> Cell:
    """A small cell of a backend of this directory."""
    return Cell(
        check="round_trip",
        backend=f"{MODULE}:{factory}",
        kernel_type=kernel_type,
        world_size=world_size,
        nodes=1,
        hidden=16,
        experts=4 * world_size,
        top_k=2,
        capacity=8,
        dtype="float32",
        mode=mode,
    )


def case(where: Cell, defect: Defect | None = None, *, rank: int = 0, rounds: int = 1, seed: int = 0) -> Case:
    """Every rank sends one token across; in the last round ``rank`` also asks for a defect."""
    plain: list[tuple[tuple[int, ...], ...]] = [((r, where.experts - 1 - r),) for r in range(where.world_size)]
    asking: list[tuple[tuple[int, ...], ...]] = [*plain]
    if defect is not None:
        asking[rank] = (*plain[rank], (int(defect), int(defect)))
    drawn = [*[plain] * (rounds - 1), asking]
    return Case(where, tuple(Round(Explicit(tuple(rows)), seed=seed) for rows in drawn))


def wait_until(condition: Callable[[], T | None], limit_s: float = PATIENCE_S) -> T:
    """Poll until the condition is true; its value.

    Raises:
        TimeoutError: it did not become true.
    """
    deadline = time.monotonic() + limit_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {getattr(condition, '__name__', condition)} after {limit_s} s")
        time.sleep(0.01)
    return value


def alive(pids: Sequence[int]) -> list[int]:
    """Those of the processes that run; a zombie does not."""
    return [pid for pid in pids if (found := _stat(pid)) is not None and found[0] not in "ZX"]


def children(pid: int) -> list[int]:
    """Processes whose parent is ``pid``."""
    everyone = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [other for other in everyone if (found := _stat(other)) is not None and found[1] == pid]


def descendants(pid: int) -> list[int]:
    """Children, their children, and so on."""
    direct = children(pid)
    return direct + [below for child in direct for below in descendants(child)]


def ranks_of(driver: int) -> list[int]:
    """Rank processes of a driver: they are forked from its forkserver."""
    servers = [pid for pid in children(driver) if b"forkserver" in _command_line(pid)]
    return [rank for server in servers for rank in children(server)]


def _stat(pid: int) -> tuple[str, int] | None:
    """State and parent."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name, in parentheses, may hold anything.
    fields = text[text.rindex(")") + 2 :].split()
    return fields[0], int(fields[1])


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""
