"""The reducer of captured calls on predicates in pure Python: the minimum it reaches.

Scope: no ranks and no backend; a predicate stands for "fails the same way". A pass does not prove that every defect's
minimum is reached, only those of the shapes written here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from accelerated.contract import CAPTURES, Contract, MaskedSlots, ReceiveLayout, RowOrder
from conformance.cases import Case, GraphCase, GraphCell, Rows
from conformance.engine import steps
from conformance.engine.graph_reducer import GraphReducer
from conformance.graph_cases import slots_of
from conformance.graph_generation import first_case
from conformance.suite.kinds import captured
from reference.problem import ProblemError

_CELL = GraphCell("graphs", "none", "IntraNode", 4, 1, 64, 8, 2, 5, "bfloat16", "free-running")


def contract(captures: frozenset[str] = frozenset(CAPTURES)) -> Contract:
    return Contract(ReceiveLayout.DENSE_ROWS, RowOrder.ANY, MaskedSlots.DROPPED, captures=captures)


def reduced(fails: Callable[[GraphCase], bool], **form: Any) -> GraphCase:
    case = first_case(msgspec.structs.replace(_CELL, **form), contract())

    def failing(candidate: Case) -> bool:
        assert isinstance(candidate, GraphCase)
        return fails(candidate)

    def allowed(candidate: Case) -> bool:
        assert isinstance(candidate, GraphCase)
        try:
            candidate.cell.problem()
        except ProblemError:
            return False
        return captured(candidate, contract())

    assert fails(case)
    done = GraphReducer(failing, allowed, 60.0).reduce(case)
    assert not done.exhausted
    assert isinstance(done.case, GraphCase)
    assert fails(done.case)
    assert allowed(done.case)
    return done.case


def rows(case: GraphCase) -> tuple[Rows, ...]:
    return tuple(steps.rows_of(a_round) for a_round in case.rounds)


def graphs(case: GraphCase) -> list[int]:
    return [a_round.graph for a_round in case.rounds]


FORMS: list[dict[str, Any]] = [{}, {"length": 3}, {"length": 2, "warm": False}, {"halves": True}]


@pytest.mark.parametrize("form", FORMS)
def test_a_replay_of_one_token(form: dict[str, Any]) -> None:
    case = reduced(lambda c: any(r.graph >= 0 and any(steps.rows_of(r)) for r in c.rounds), **form)
    assert rows(case) == ((((0,),),),)
    cell = case.cell
    assert (cell.world_size, cell.length, cell.halves, cell.warm, cell.mode) == (1, 1, False, True, "drained")
    assert (graphs(case), case.rebuilt) == ([0], 0)


@pytest.mark.parametrize("form", FORMS)
def test_a_second_replay_with_a_token(form: dict[str, Any]) -> None:
    def fails(case: GraphCase) -> bool:
        slots = slots_of(case)
        again = [i for i, slot in enumerate(slots) if slot[0] >= 0 and slot in slots[:i]]
        return any(any(steps.rows_of(case.rounds[i])) for i in again)

    case = reduced(fails, **form)
    assert rows(case) == ((((0,),),),) * 2, "tokens go from both replays at once"
    assert graphs(case) == [0, 0]


def test_tokens_go_from_all_replays_of_a_graph_at_once() -> None:
    def fails(case: GraphCase) -> bool:
        slots = slots_of(case)
        again = [i for i, slot in enumerate(slots) if slot[0] >= 0 and slot in slots[:i]]
        return any(len(tokens) >= 2 for i in again for tokens in steps.rows_of(case.rounds[i]))

    case = reduced(fails, capacity=64)
    assert rows(case) == ((((0,), (0,)),),) * 2


@pytest.mark.parametrize("form", FORMS)
def test_two_graphs_with_a_token_each(form: dict[str, Any]) -> None:
    def fails(case: GraphCase) -> bool:
        return len({r.graph for r in case.rounds if r.graph >= 0 and any(steps.rows_of(r))}) == 2

    case = reduced(fails, **form)
    assert rows(case) == ((((0,),),),) * 2
    assert graphs(case) == [0, 1], "graphs are numbered in the order of their replays"


def test_what_matters_stays() -> None:
    cold = reduced(lambda c: not c.cell.warm, warm=False)
    assert (cold.cell.warm, cold.tokens) == (False, 0)
    odd = reduced(lambda c: c.cell.length == 3, length=3)
    assert (odd.cell.length, len(odd.rounds), odd.cell.world_size) == (3, 3, 1)
    dropped = reduced(lambda c: c.rebuilt > 0)
    assert (dropped.rebuilt, len(dropped.rounds)) == (1, 2)
    halves = reduced(lambda c: c.cell.halves, halves=True)
    assert len(halves.rounds) == 1
    eager = reduced(lambda c: any(a.graph == -1 and b.graph >= 0 for a, b in zip(c.rounds, c.rounds[1:], strict=False)))
    assert graphs(eager) == [-1, 0]


def test_full_rank_lowers_the_capacity() -> None:
    case = reduced(lambda c: any(c.cell.capacity in counts for counts in c.token_counts()))
    assert (case.cell.capacity, case.tokens, len(case.rounds)) == (1, 1, 1)


@pytest.mark.parametrize("captures", [frozenset(CAPTURES), frozenset({"contents"})])
def test_rows_of_a_frozen_routing_change_in_all_replays(captures: frozenset[str]) -> None:
    cell = msgspec.structs.replace(_CELL, modes=("handle",) if "routing" not in captures else ())
    case = first_case(cell, contract(captures))

    def fails(candidate: Case) -> bool:
        return sum(bool(sum(map(len, steps.rows_of(r)))) for r in candidate.rounds) >= 2

    done = GraphReducer(fails, lambda c: captured(c, contract(captures)), 60.0).reduce(case)  # type: ignore[arg-type]
    assert isinstance(done.case, GraphCase)
    assert rows(done.case) == ((((0,),),),) * 2
    assert done.case.cell.modes == cell.modes or "routing" in captures
