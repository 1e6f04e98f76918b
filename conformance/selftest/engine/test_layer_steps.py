"""Steps and reduction of cases of experts and layers, on predicates in pure Python.

Scope: conformance/engine/layer_steps.py and what steps.py does to a layer's case. A pass does not prove that every
defect's minimum is reached, only those of the shapes written here.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from conformance.case_files import validate, validate_layer
from conformance.cases import Case, CaseError, LayerCase
from conformance.engine import layer_steps, steps
from conformance.engine.reducer import Reducer
from conformance.selftest.suite.layer_cells import experts_cell, layer_cell, one
from reference.problem import ProblemError

FULL = one(
    experts_cell(hidden=256, intermediate=256, shards=4),
    (0, 3, 5, 7),
    (7, 1, 2, 4),
    tail=12,
    counted=True,
    quantised=True,
    relation="slot order",
    weighting="signed",
    values="wide",
    seed=9,
)


def legal(case: Case) -> bool:
    assert isinstance(case, LayerCase)
    try:
        validate(case)
        validate_layer(case)
        case.cell.problem()
    except (CaseError, ProblemError):
        return False
    return True


def reduced(case: LayerCase, fails: Callable[[LayerCase], bool]) -> LayerCase:
    def still(candidate: Case) -> bool:
        assert isinstance(candidate, LayerCase)
        return fails(candidate)

    assert fails(case)
    found = Reducer(still, legal, 60.0).reduce(case).case
    assert isinstance(found, LayerCase)
    return found


def test_every_step_makes_a_case_smaller_or_leaves_it() -> None:
    for make in (layer_steps.settings, layer_steps.fewer_elements):
        changed = [c for c in make(FULL) if c != FULL]
        assert changed
        assert all(steps.size(c) < steps.size(FULL) for c in changed if c.rounds[0].tail < 12 or c.cell != FULL.cell)


def test_what_does_not_matter_goes() -> None:
    found = reduced(FULL, lambda case: case.tokens > 0)
    a_round = found.rounds[0]
    assert (found.cell.shards, found.cell.intermediate, found.cell.hidden, found.cell.top_k) == (1, 32, 32, 1)
    assert (a_round.tail, a_round.counted, a_round.quantised, a_round.relation) == (0, False, False, "")
    assert (a_round.weighting, a_round.values, found.tokens) == ("ones", "integers", 1)


@pytest.mark.parametrize(
    ("fails", "stays"),
    [
        (lambda case: case.rounds[0].tail > 0, {"tail": 1}),
        (lambda case: case.rounds[0].relation == "slot order", {"relation": "slot order"}),
        (lambda case: case.rounds[0].weighting == "signed", {"weighting": "signed"}),
        (lambda case: case.rounds[0].quantised, {"quantised": True}),
    ],
)
def test_what_matters_stays(fails: Callable[[LayerCase], bool], stays: dict[str, object]) -> None:
    found = reduced(FULL, fails).rounds[0]
    assert all(getattr(found, name) == value for name, value in stays.items())


def test_a_layer_of_four_ranks_becomes_one_of_two() -> None:
    case = one(layer_cell(), (0, 7), (2, 5), weighting="signed")
    crosses = lambda c: any(  # noqa: E731
        e // (c.cell.experts // c.cell.world_size) != rank
        for rank, tokens in enumerate(steps.rows_of(c.rounds[0]))
        for row in tokens
        for e in row
    )
    found = reduced(case, crosses)
    assert (found.cell.world_size, found.tokens, found.cell.top_k) == (2, 1, 1)
    assert isinstance(found, LayerCase)


def test_a_placement_that_does_not_matter_goes() -> None:
    cell = layer_cell(experts=12, redundant=4, check="eplb")
    case = one(cell, (0, 1), (3, 4), physical=(*range(8), 0, 0, 1, 1))
    found = reduced(case, lambda c: c.tokens > 0)
    assert found.rounds[0].physical == ()
