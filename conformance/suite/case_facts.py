"""Facts of a case that a waiver may ask for, from the case alone; and the fields of cells.

Scope: names and how to work them out. A fact that a kind of case does not have is None and never matches. What a fact
does not tell: why a backend fails.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from conformance.cases import (
    AnyCase,
    AnyCell,
    Case,
    LayerCase,
    Recipe,
    Relation,
    SequenceCase,
    Values,
    Weighting,
    expand,
)
from conformance.rank.routing import wire_rows
from conformance.recipes import ARCHETYPES
from conformance.row_cases import KINDS, RowCase, Weight
from conformance.sequence_cases import STEP_KINDS, kind_of
from conformance.suite import coverage, kinds
from conformance.suite.predicates import Field

#: Properties of cells that are no fields of theirs.
_PROPERTIES = {"label": Field(str), "kernel_type": Field(str), "whole": Field(bool), "logical": Field(int)}


def cell_fields() -> dict[str, Field]:
    """Fields of every kind of cell, and some of their properties."""
    found = dict(_PROPERTIES)
    for kind in get_args(AnyCell):
        for name, hint in get_type_hints(kind).items():
            if not name.startswith("_") and (field := _field(hint)) is not None:
                found[name] = field
    return found


def _field(hint: Any) -> Field | None:
    if get_origin(hint) is Literal:
        return Field(str, get_args(hint))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return Field(str, tuple(str(member.value) for member in hint))
    if get_origin(hint) is tuple and get_args(hint)[0] is str:
        return Field(str)
    return Field(hint) if hint in (str, int, bool) else None


def look_at_cell(cell: AnyCell) -> Callable[[str], object]:
    """Value of a field of a cell; None where it has none."""

    def look(name: str) -> object:
        value = getattr(cell, name, None)
        return value.value if isinstance(value, enum.Enum) else value

    return look


def look_at_case(case: AnyCase) -> Callable[[str], object]:
    """Value of a fact of a case; None where it has none."""
    return lambda name: FACTS[name].of(case)


@dataclass(frozen=True)
class Fact:
    """A fact: what it holds, and how a case tells it."""

    field: Field
    of: Callable[[AnyCase], object]


def _counts(case: AnyCase) -> list[int]:
    """Tokens of every rank in every round, or rows of every call."""
    if isinstance(case, RowCase):
        return [call.rows for call in case.calls]
    return [count for counts in case.token_counts() for count in counts]


def _rounds(case: AnyCase, name: str) -> tuple[Any, ...] | None:
    """One attribute of every round of an exchange, of every call of a row operator; None where they have none."""
    found: tuple[Any, ...] = case.calls if isinstance(case, RowCase) else case.rounds
    return tuple(getattr(one, name) for one in found) if all(hasattr(one, name) for one in found) else None


def _any(case: AnyCase, name: str) -> bool | None:
    values = _rounds(case, name)
    return None if values is None else any(values)


def _largest(case: AnyCase, name: str) -> int | None:
    values = _rounds(case, name)
    return None if values is None else max(values)


def _rows(case: AnyCase) -> Iterator[tuple[tuple[tuple[int, ...], ...], ...]]:
    """Routing of every round, ``[rank][token][slot]``, as dispatched."""
    if isinstance(case, Case):
        for a_round in case.rounds:
            yield wire_rows(case.cell, expand(case.cell, a_round.routing))


def _masked(case: AnyCase) -> bool | None:
    if isinstance(case, RowCase):
        return None
    return any(-1 in row for rows in _rows(case) for tokens in rows for row in tokens)


def _expert_slots(case: AnyCase) -> int | None:
    """Most slots that one expert gets in one round."""
    if isinstance(case, RowCase):
        return None
    named = (Counter(e for tokens in rows for row in tokens for e in row if e >= 0) for rows in _rows(case))
    return max((max(counted.values(), default=0) for counted in named), default=0)


def _received(case: AnyCase) -> int | None:
    """Most tokens that one rank receives in one round, each once."""
    if isinstance(case, RowCase | LayerCase):
        return None  # replicas decide where a layer's tokens go
    per_rank = case.cell.experts // case.cell.world_size
    most = 0
    for rows in _rows(case):
        owners = Counter(owner for tokens in rows for row in tokens for owner in {e // per_rank for e in row if e >= 0})
        most = max(most, max(owners.values(), default=0))
    return most


def _combines(case: AnyCase) -> tuple[str, ...] | None:
    """How a blockwise combine adds up in each round, as far as row lengths and settings decide it."""
    if isinstance(case, RowCase | LayerCase) or not case.cell.codec.endswith("blockwise"):
        return None
    return tuple(coverage.combine_of(case.cell, r.hidden or case.cell.hidden) for r in case.rounds)


def _archetypes(case: AnyCase) -> tuple[str, ...] | None:
    if isinstance(case, RowCase):
        return None
    return tuple(r.routing.archetype for r in case.rounds if isinstance(r.routing, Recipe))


def _steps(case: AnyCase) -> tuple[str, ...] | None:
    return tuple(map(kind_of, case.sequence)) if isinstance(case, SequenceCase) else None


def _patterns(case: AnyCase) -> tuple[str, ...] | None:
    return tuple(p.kind for call in case.calls for p in call.patterns) if isinstance(case, RowCase) else None


FACTS: dict[str, Fact] = {
    "max_tokens": Fact(Field(int), lambda case: max(_counts(case), default=0)),  # on a rank in a round, in a call
    "min_tokens": Fact(Field(int), lambda case: min(_counts(case), default=0)),
    "tokens": Fact(Field(int), lambda case: case.tokens),  # of all ranks and rounds
    "rounds": Fact(Field(int), lambda case: case.steps),  # calls, of a row operator
    "class": Fact(Field(str), kinds.classes),  # an input class, as records and the summary name them
    "masked": Fact(Field(bool), _masked),  # a slot is -1
    "expert_slots": Fact(Field(int), _expert_slots),
    "received": Fact(Field(int), _received),
    "archetype": Fact(Field(str, tuple(ARCHETYPES)), _archetypes),  # of rounds too large to be spelt out
    "values": Fact(Field(str, get_args(Values)), lambda case: _rounds(case, "values")),
    "combine": Fact(Field(str, coverage.COMBINES), _combines),  # of a blockwise codec
    "delayed": Fact(Field(bool), lambda case: _any(case, "delays_ms")),
    "weighting": Fact(Field(str, get_args(Weighting)), lambda case: _rounds(case, "weighting")),
    "tail": Fact(Field(int), lambda case: _largest(case, "tail")),
    "counted": Fact(Field(bool), lambda case: _any(case, "counted")),
    "quantised": Fact(Field(bool), lambda case: _any(case, "quantised")),
    "relation": Fact(Field(str, get_args(Relation)), lambda case: _rounds(case, "relation")),
    "kind": Fact(Field(str, KINDS), _patterns),  # of rows
    "weight": Fact(Field(str, get_args(Weight)), lambda case: _rounds(case, "weight")),
    "step": Fact(Field(str, STEP_KINDS), _steps),  # of a sequence
    "into": Fact(Field(bool), lambda case: _any(case, "into")),
}


def case_fields() -> dict[str, Field]:
    """Facts of cases, by name."""
    return {name: fact.field for name, fact in FACTS.items()}
