"""Backends that misbehave on demand: the specification's own operator with one defect, chosen by the data.

Scope: what a rank process can do to its driver. A defect is asked for by a token whose slots all name the same expert,
the number of the defect (:class:`Defect`), or by the factory that is named. They prove nothing about numbers.
"""

from __future__ import annotations

import ctypes
import enum
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerated.mori_ep.transports import DISABLE_P2P, ENABLE_SDMA
from accelerated.reference_backend import ReferenceBackend, ReferenceOperation, ReferenceSession
from conformance.engine.protocol import Answer, pack

if TYPE_CHECKING:
    import torch

    from accelerated.interface import Combined, RankContext, Received
    from reference.problem import Problem

MODULE = "conformance.selftest.engine.backends"
#: Held down by a file: while it exists, no round of :class:`Held` goes on.
HOLD_VARIABLE = "EP_CONFORMANCE_SELFTEST_HOLD"


class Defect(enum.IntEnum):
    """What the rank that dispatches the token does; the value is the expert id that asks for it."""

    SEGMENTATION_FAULT = 1
    EXIT = 2
    PYTHON_WAIT = 3
    NATIVE_WAIT = 4
    EXTRA_COLLECTIVE = 5
    EXCEPTION = 6
    FORGED_ANSWER = 7
    DROPPED_ROW = 8


def read_address_zero() -> None:
    ctypes.string_at(0)


def leave_the_process() -> None:
    os._exit(3)


def wait_in_python() -> None:
    threading.Event().wait()


def wait_with_signals_blocked() -> None:
    """Hold the GIL in a native call and let no signal in: neither a Python handler nor a Python thread can run."""
    # Another thread of the process, such as gloo's, would still take what this one blocks.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    ctypes.PyDLL(None).sleep(3600)


def wait_in_a_collective() -> None:
    import torch.distributed as dist

    dist.barrier()


def raise_value_error() -> None:
    raise ValueError("the backend does not like these ids")


def answer_another_command(rank: int) -> None:
    """Send the driver an answer to a command that it never gave, over the rank's own pipe."""
    frame = sys._getframe()
    while "connection" not in frame.f_locals:
        assert frame.f_back is not None
        frame = frame.f_back
    frame.f_locals["connection"].send_bytes(pack(Answer(10_000, rank, "pass")))


_IN_PREPARE: dict[int, Callable[[], None]] = {
    Defect.SEGMENTATION_FAULT: read_address_zero,
    Defect.NATIVE_WAIT: wait_with_signals_blocked,
    Defect.EXCEPTION: raise_value_error,
}
_IN_FINALIZE: dict[int, Callable[[], None]] = {
    Defect.EXIT: leave_the_process,
    Defect.PYTHON_WAIT: wait_in_python,
}


class DefectiveOperation(ReferenceOperation):
    """The specification's operator with the defects of its rank's tokens."""

    def __init__(self, context: RankContext, problem: Problem) -> None:
        super().__init__(context, problem, 1)
        self._rank = context.rank
        self._asked: set[int] = set()

    def prepare(
        self, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor | None = None
    ) -> Received:
        # A row of one slot says nothing, so that ordinary cases stay ordinary.
        self._asked = {row[0] for row in ids.tolist() if len(row) > 1 and len(set(row)) == 1}
        for defect in self._asked & _IN_PREPARE.keys():
            _IN_PREPARE[defect]()
        if Defect.FORGED_ANSWER in self._asked:
            answer_another_command(self._rank)
        received = super().prepare(rows, ids, weights, scales)
        if Defect.DROPPED_ROW in self._asked:
            received.count -= 1
        return received

    def finalize(self, expert_rows: torch.Tensor, received: Received) -> Combined:
        for defect in self._asked & _IN_FINALIZE.keys():
            _IN_FINALIZE[defect]()
        combined = super().finalize(expert_rows, received)
        # Last, so that the other ranks are done with every collective of theirs.
        if Defect.EXTRA_COLLECTIVE in self._asked:
            wait_in_a_collective()
        return combined


class _Session(ReferenceSession):
    def __init__(self, context: RankContext, make: Callable[[RankContext, Problem], ReferenceOperation]) -> None:
        super().__init__(context)
        self._make = make

    def build(self, problem: Any, kernel_type: str) -> ReferenceOperation:
        return self._make(self._context, problem)


_NONE: dict[str, tuple[str, ...]] = {}


class ExchangeBackend(ReferenceBackend):
    """The specification's dispatch/combine alone."""

    operators = _NONE


class Defective(ExchangeBackend):
    """Any :class:`Defect`, by the data."""

    name = "defective"
    kernel_types = ("one-level",)

    def open(self, context: RankContext) -> ReferenceSession:
        return _Session(context, DefectiveOperation)


class RaisesAtOpen(ExchangeBackend):
    """Its library does not initialise on rank 1."""

    def open(self, context: RankContext) -> ReferenceSession:
        if context.rank == 1:
            raise_value_error()
        return super().open(context)


class ExitsAtOpen(ExchangeBackend):
    """Its library ends the process of rank 1."""

    def open(self, context: RankContext) -> ReferenceSession:
        if context.rank == 1:
            leave_the_process()
        return super().open(context)


class _EndsBadly(ReferenceSession):
    def close(self) -> None:
        raise_value_error()


class RaisesAtClose(ExchangeBackend):
    """Correct, but its library does not finalise."""

    kernel_types = ("one-level",)

    def open(self, context: RankContext) -> ReferenceSession:
        return _EndsBadly(context)


class ForgesAtBuild(ExchangeBackend):
    """Rank 0 answers another command while it builds."""

    def open(self, context: RankContext) -> ReferenceSession:
        def make(context: RankContext, problem: Problem) -> ReferenceOperation:
            if context.rank == 0:
                answer_another_command(0)
            return ReferenceOperation(context, problem, 1)

        return _Session(context, make)


class SpoilsTheGroup(ExchangeBackend):
    """Opening it leaves a process group that delivers wrong numbers on rank 0."""

    def open(self, context: RankContext) -> ReferenceSession:
        import torch.distributed as dist

        gather = dist.all_gather

        def wrong(out: list[torch.Tensor], mine: torch.Tensor, group: object = None) -> None:
            gather(out, mine, group=group)
            out[-1] += 1

        if context.rank == 0:
            dist.all_gather = wrong  # type: ignore[assignment]
        return super().open(context)


class _DroppingOperation(ReferenceOperation):
    def __init__(self, context: RankContext, problem: Problem) -> None:
        super().__init__(context, problem, problem.nodes)
        self._rank = context.rank

    def prepare(
        self, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor | None = None
    ) -> Received:
        from reference.dispatch_combine import Dispatched

        received = super().prepare(rows, ids, weights, scales)
        sent = received.state
        assert isinstance(sent, Dispatched)
        if bool((sent.source_rank != self._rank).any()):
            received.count -= 1
        return received


class DropsARow(ExchangeBackend):
    """A rank that receives a row from another rank reports one row too few. Deterministic."""

    name = "drops-a-row"
    kernel_types = ("one-level",)

    def open(self, context: RankContext) -> ReferenceSession:
        return _Session(context, _DroppingOperation)


class DropsARowOnNodes(DropsARow):
    """The same on more than one node."""

    kernel_types = ("node-levels",)


class _CrashingOperation(ReferenceOperation):
    def __init__(self, context: RankContext, problem: Problem) -> None:
        super().__init__(context, problem, problem.nodes)
        self._rank = context.rank

    def prepare(
        self, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor | None = None
    ) -> Received:
        if self._rank == 1 and rows.shape[0]:
            read_address_zero()
        return super().prepare(rows, ids, weights, scales)


class Crashes(ExchangeBackend):
    """Rank 1 dies where it has a token to send."""

    name = "crashes"
    kernel_types = ("node-levels",)

    def open(self, context: RankContext) -> ReferenceSession:
        return _Session(context, _CrashingOperation)


class TellsTransport(ExchangeBackend):
    """Does not initialise, and says which transport it was to use. Takes the double's name, for only MoRI has any."""

    name = "mori-standin"

    def open(self, context: RankContext) -> ReferenceSession:
        raise RuntimeError(" ".join(f"{name}={os.environ.get(name)}" for name in (DISABLE_P2P, ENABLE_SDMA)))


def held_mark(hold: str | Path, pid: int) -> Path:
    """File by which a rank says that it is held."""
    return Path(f"{hold}-{pid}")


class _HeldOperation(ReferenceOperation):
    def prepare(
        self, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor | None = None
    ) -> Received:
        hold = os.environ.get(HOLD_VARIABLE)
        if hold:
            held_mark(hold, os.getpid()).touch()
        while hold and Path(hold).exists():
            time.sleep(0.01)
        return super().prepare(rows, ids, weights, scales)


class Held(ExchangeBackend):
    """Correct, but waits in prepare while the file named by :data:`HOLD_VARIABLE` exists."""

    name = "held"
    kernel_types = ("one-level",)

    def open(self, context: RankContext) -> ReferenceSession:
        return _Session(context, lambda context, problem: _HeldOperation(context, problem, problem.nodes))


class HeldOnNodes(Held):
    """The same on more than one node."""

    kernel_types = ("node-levels",)
