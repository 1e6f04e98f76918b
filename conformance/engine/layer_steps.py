"""Steps of a reduction that only cases of experts and layers have; the others are in :mod:`conformance.engine.steps`.

Scope: pure functions from a case to smaller ones. Nothing here proves that the steps reach every smaller case.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import msgspec

from conformance.cases import LayerCase, Relation, Weighting

#: Intermediate sizes below this are no simpler.
PLAIN_INTERMEDIATE = 32
_WEIGHTINGS: tuple[Weighting, ...] = get_args(Weighting)
_RELATIONS: tuple[Relation, ...] = get_args(Relation)


def size(case: LayerCase) -> tuple[Any, ...]:
    """What a reduction lowers beside what every exchange has."""
    cell, rounds = case.cell, case.rounds
    return (
        bool(cell.router),
        bool(cell.against),
        cell.shards,
        cell.redundant,
        cell.shared,
        cell.intermediate,
        sum(bool(r.physical) for r in rounds),
        sum(_RELATIONS.index(r.relation) for r in rounds),
        sum(r.quantised for r in rounds),
        sum(r.tail for r in rounds),
        sum(r.counted for r in rounds),
        sum(_WEIGHTINGS.index(r.weighting) for r in rounds),
    )


def settings(case: LayerCase) -> Iterator[LayerCase]:
    """Everything plain at once, then one setting of all rounds."""
    choices: tuple[dict[str, Any], ...] = (
        {"relation": ""},
        {"quantised": False},
        {"tail": 0},
        {"tail": 1},
        {"tail": 0, "counted": True},
        {"tail": 0, "counted": False},
        {"weighting": "ones"},
        {"weighting": "positive"},
    )
    yield _each(case, relation="", quantised=False, tail=0, counted=False, weighting="ones", values="integers", seed=0)
    for change in choices:
        yield _each(case, **change)
    if case.cell.router:
        yield _cell(case, router="")
    if case.cell.against:
        yield _cell(case, against="", against_type="")
    if case.cell.shards > 1:
        yield _cell(case, shards=1)
        yield _cell(case, shards=2)
    if case.cell.shared:
        yield _cell(case, shared=0)
    tails = {r.tail for r in case.rounds}
    for tail in sorted(tails):
        yield _each(case, tail=tail // 2)
    if any(r.physical for r in case.rounds):
        yield _each(case, physical=())


def fewer_elements(case: LayerCase) -> Iterator[LayerCase]:
    """A smaller intermediate."""
    intermediate = case.cell.intermediate
    for smaller in dict.fromkeys((PLAIN_INTERMEDIATE, 64, 128, intermediate // 2)):
        if PLAIN_INTERMEDIATE <= smaller < intermediate:
            yield _cell(case, intermediate=smaller)


def _each(case: LayerCase, **changes: Any) -> LayerCase:
    return msgspec.structs.replace(case, rounds=tuple(msgspec.structs.replace(r, **changes) for r in case.rounds))


def _cell(case: LayerCase, **changes: Any) -> LayerCase:
    return msgspec.structs.replace(case, cell=msgspec.structs.replace(case.cell, model="", **changes))
