"""Sequences that the selftests share. Proves nothing by itself."""

from __future__ import annotations

import msgspec

from conformance.cases import Explicit, Round, Rows, SequenceCase, SequenceCell
from conformance.row_cases import Mode
from conformance.sequence_cases import Check, Combine, Delay, Dispatch, Poison, Recreate, Replay, Sequence
from conformance.suite.sequence_plan import sequence_cell

#: Every kind of step and of poison on views of two operators, with a round of no tokens between two others.
EVERY: Sequence = (
    Dispatch(0, 0),
    Delay(1, 2),
    Dispatch(1, 1),
    Poison("inputs", 0),
    Check(0),
    Poison("tail", 2),
    Combine(1),
    Check(0),
    Combine(0),
    Poison("ids", 0),
    Poison("experts", 8),
    Dispatch(1, 2),
    Check(6),
    Check(8),
    Combine(1),
    Poison("output", 14),
    Recreate(1),
    Dispatch(1, 3),
    Check(8),
    Combine(1),
    Check(19),
)
#: A round that is replayed at once and after another one.
REPLAYS: Sequence = (
    Dispatch(0, 0),
    Combine(0),
    Replay(0, 0),
    Check(2),
    Combine(0),
    Dispatch(0, 1),
    Combine(0),
    Replay(0, 0),
    Poison("inputs", 7),
    Combine(0),
    Check(9),
)

_FULL: Rows = (((3, 0), (1, 2)), ((0, 1),))
_EMPTY: Rows = ((), ())


def every_step(backend: str, kernel_type: str, mode: Mode) -> SequenceCase:
    """A case of two ranks with every kind of step but replays."""
    cell = sequence_cell(backend, kernel_type, (2, 1), mode)
    rows = (_FULL, _FULL, _EMPTY, _FULL)
    return SequenceCase(cell, tuple(Round(Explicit(one), "normal", index) for index, one in enumerate(rows)), EVERY)


def replays(backend: str, kernel_type: str, mode: Mode) -> SequenceCase:
    """A case of two ranks with replays on one operator."""
    cell: SequenceCell = msgspec.structs.replace(
        sequence_cell(backend, kernel_type, (2, 1), mode), modes=("handle",), second=0
    )
    return SequenceCase(cell, (Round(Explicit(_FULL)), Round(Explicit((((2, 2),), ((1, 3),))))), REPLAYS)
