"""Seeded faults that only sequences catch: where each applies, what catches it, and its true minima.

Scope: plain data without torch, as in :mod:`conformance.faults.catalogue`. A fault of two operators may first be met by
a look at an earlier result or by a wrong sum, whichever was drawn: it has a minimum for each. The minima are written
down from the definition of each fault.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from conformance.cases import Rows
from conformance.faults.backends import backend_name
from conformance.sequence_cases import Check, Combine, Dispatch, Poison, Recreate, Replay, Sequence

_ONE: Rows = (((0,),),)
_TWO: Rows = (((0,), (0,)),)
_NONE: Rows = ((),)

#: Kernel types without handles, whose replays would show the same under another name; narrow cells first.
_PLAIN = ("IntraNode", "IntraNodeLL", "AsyncLL", "InterNodeV1LL", "InterNode")


@dataclass(frozen=True)
class SequenceMinimum:
    """The smallest case that shows a fault, on one rank with one expert and one slot.

    Attributes:
        steps: of the sequence.
        rounds: routing ``[round][rank][token][slot]``.
        second: whether there are two operators.
        modes: ways of calling that the fault needs.
    """

    steps: Sequence
    rounds: tuple[Rows, ...]
    second: bool = False
    modes: tuple[str, ...] = ()


@dataclass(frozen=True)
class SequenceFault:
    """A seeded fault of calls in sequence.

    Attributes:
        name: of its factory in :mod:`conformance.faults`.
        description: what goes wrong.
        minima: the true minimum by the name of the failing check.
        kernel_types: whose cells are tried for it, one after another; on others the library has not what is wrong, or
            the same would be shown.
    """

    name: str
    description: str
    minima: dict[str, SequenceMinimum]
    kernel_types: tuple[str, ...]

    @property
    def backend(self) -> str:
        """What ``--backend`` takes."""
        return backend_name(self.name)


def _both(step: Callable[[], tuple[Check, ...]]) -> Sequence:
    """Two operators at once, with a look between the dispatches and the combines."""
    return (Dispatch(0, 0), Dispatch(1, 1), *step(), Combine(0), Combine(1))


def _then(step: Poison) -> Sequence:
    """Two rounds of one operator, and a step between them."""
    return (Dispatch(0, 0), Combine(0), step, Dispatch(0, 1), Combine(0))


_INTERLEAVED = _both(lambda: ())

_FAULTS = (
    SequenceFault(
        "shared_received",
        "a second operator receives into the first one's memory",
        {
            "kept.received": SequenceMinimum(_both(lambda: (Check(0),)), (_ONE, _ONE), second=True),
            "combine.output": SequenceMinimum(_INTERLEAVED, (_ONE, _ONE), second=True),
        },
        ("IntraNode",),
    ),
    SequenceFault(
        "shared_output",
        "a second operator combines into the first one's output",
        {"kept.output": SequenceMinimum((*_INTERLEAVED, Check(2)), (_ONE, _ONE), second=True)},
        ("InterNodeV1",),
    ),
    SequenceFault(
        "scribbled_ids",
        "a combine stages its rows where another operator holds received ids",
        {
            "kept.received": SequenceMinimum(
                (Dispatch(0, 0), Dispatch(1, 1), Combine(0), Check(1), Combine(1)), (_NONE, _ONE), second=True
            ),
            "combine.output": SequenceMinimum(_INTERLEAVED, (_NONE, _ONE), second=True),
        },
        ("InterNode",),
    ),
    SequenceFault(
        "output_in_received",
        "the next dispatch overwrites what combine returned",
        {
            "kept.output": SequenceMinimum(
                (Dispatch(0, 0), Combine(0), Dispatch(0, 1), Check(1), Combine(0)), (_ONE, _ONE)
            )
        },
        ("AsyncLL",),
    ),
    SequenceFault(
        "memory_left",
        "a recreated operator delivers a row of the destroyed one",
        {
            "dispatch.rows": SequenceMinimum(
                (Dispatch(0, 0), Combine(0), Recreate(0), Dispatch(0, 1), Combine(0)), (_ONE, _ONE), second=True
            )
        },
        ("IntraNodeLL",),
    ),
    SequenceFault(
        "replay_of_last_count",
        "a replay sends as many rows as were dispatched last",
        {
            "replay.dispatch.rows": SequenceMinimum(
                (Dispatch(0, 0), Combine(0), Dispatch(0, 1), Combine(0), Replay(0, 0), Combine(0)),
                (_TWO, _ONE),
                modes=("handle",),
            )
        },
        ("InterNodeV1",),
    ),
    SequenceFault(
        "stale_tail",
        "after a small round, the rows of a large one are partly older",
        {
            "dispatch.rows": SequenceMinimum(
                (Dispatch(0, 0), Combine(0), Dispatch(0, 1), Combine(0), Dispatch(0, 2), Combine(0)),
                (_ONE, _NONE, _ONE),
            )
        },
        ("InterNodeV1",),
    ),
    SequenceFault(
        "tail_is_state",
        "combine needs what is behind the last received row",
        {"combine.output": SequenceMinimum((Dispatch(0, 0), Poison("tail", 0), Combine(0)), (_ONE,))},
        ("IntraNode",),
    ),
    SequenceFault(
        "output_is_scratch",
        "the next dispatch relies on what combine returned, which is the caller's",
        {"dispatch.rows": SequenceMinimum(_then(Poison("output", 1)), (_ONE, _ONE))},
        _PLAIN,
    ),
    SequenceFault(
        "late_rows",
        "the next dispatch relies on the experts' rows, which are the caller's again",
        {"dispatch.rows": SequenceMinimum(_then(Poison("experts", 1)), (_ONE, _ONE))},
        _PLAIN,
    ),
    SequenceFault(
        "late_ids",
        "the next dispatch relies on the ids of the one before, which are the caller's again",
        {"dispatch.rows": SequenceMinimum(_then(Poison("ids", 0)), (_ONE, _ONE))},
        _PLAIN,
    ),
    SequenceFault(
        "late_weights",
        "combine reads the caller's weights, which are the caller's again",
        {"combine.weights": SequenceMinimum((Dispatch(0, 0), Poison("inputs", 0), Combine(0)), (_ONE,))},
        ("IntraNodeLL",),
    ),
)

#: Faults of calls in sequence, by name.
SEQUENCE_FAULTS = {fault.name: fault for fault in _FAULTS}
