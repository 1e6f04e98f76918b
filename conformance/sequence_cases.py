"""Steps of a sequence on one or two operators: plain data.

A sequence says in which order every rank makes its calls; the rounds of its case say with what. Which orders are legal
is the business of :mod:`conformance.sequence_rules`. What a step does not hold: tensors, and what has to come out.
"""

from __future__ import annotations

from typing import Literal, get_args

import msgspec

#: What the caller overwrites with poison, because nobody has promised it to anybody any more: the rows, weights and
#: scales that it gave to a dispatch, after the call; the ids that it gave, after the combine; received rows from the
#: count on, before the combine; the experts' rows, after the combine; the combined rows, which are the caller's.
Poisoned = Literal["inputs", "ids", "tail", "experts", "output"]
POISONED: tuple[Poisoned, ...] = get_args(Poisoned)

#: Operators of a sequence: 0, and 1 where the cell has a second one.
OPERATORS = 2
#: A row's tag counts the step that dispatched it, and has a byte for it.
MAX_STEPS = 250
#: Longest delay: what is late for longer looks like a hang on a slow machine.
MAX_DELAY_MS = 100


class Dispatch(msgspec.Struct, frozen=True, tag="dispatch"):
    """Dispatch a round on an operator."""

    op: int
    round: int


class Combine(msgspec.Struct, frozen=True, tag="combine"):
    """Combine what the operator dispatched last."""

    op: int


class Replay(msgspec.Struct, frozen=True, tag="replay"):
    """Dispatch new rows, weights and scales along the routing of a round that the operator dispatched before."""

    op: int
    round: int


class Recreate(msgspec.Struct, frozen=True, tag="recreate"):
    """Destroy an operator and build it again; collective, and a barrier, as building is one."""

    op: int


class Delay(msgspec.Struct, frozen=True, tag="delay"):
    """One rank is late."""

    rank: int
    ms: int


class Poison(msgspec.Struct, frozen=True, tag="poison"):
    """Overwrite what belongs to the step numbered ``of``."""

    what: Poisoned
    of: int


class Check(msgspec.Struct, frozen=True, tag="check"):
    """Compare what the step numbered ``of`` returned, a dispatch, replay or combine, with what it held then."""

    of: int


Step = Dispatch | Combine | Replay | Recreate | Delay | Poison | Check
Sequence = tuple[Step, ...]
#: Names of the kinds of steps, as case files spell them.
STEP_KINDS: tuple[str, ...] = tuple(kind.__struct_config__.tag for kind in get_args(Step))


def kind_of(step: Step) -> str:
    """Name of a step's kind."""
    return str(step.__struct_config__.tag)


def told(step: Step) -> str:
    """A step in words."""
    match step:
        case Dispatch():
            return f"dispatch round {step.round} on operator {step.op}"
        case Replay():
            return f"replay round {step.round} on operator {step.op}"
        case Combine():
            return f"combine on operator {step.op}"
        case Recreate():
            return f"destroy and recreate operator {step.op}"
        case Delay():
            return f"delay rank {step.rank} by {step.ms} ms"
        case Poison():
            return f"poison {step.what} of step {step.of}"
        case Check():
            return f"check what step {step.of} returned"


def moved(step: Step, places: dict[int, int]) -> Step:
    """The step with what it refers to renumbered.

    Raises:
        KeyError: that step has no place.
    """
    return msgspec.structs.replace(step, of=places[step.of]) if isinstance(step, Poison | Check) else step
