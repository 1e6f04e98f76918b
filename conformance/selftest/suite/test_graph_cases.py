"""Cases of captured calls: what is legal, what a contract promises of them, and how they are drawn.

Scope: plain data; no ranks. A case that is legal here is not proven to run.
"""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, seed, settings

from accelerated.contract import CAPTURES, Contract, MaskedSlots, ReceiveLayout, RowOrder
from conformance.case_files import decode
from conformance.cases import CaseError, Explicit, GraphCase, GraphCell, GraphRound, encode
from conformance.graph_cases import first_rounds, misfit, replays_of, slots_of
from conformance.graph_generation import first_case, graph_cases
from conformance.suite import graph_coverage
from conformance.suite.describe import describe
from conformance.suite.graph_plan import FORMS

_CELL = GraphCell("graphs", "mori-standin", "IntraNode", 2, 1, 64, 4, 2, 8, "bfloat16", "drained")
EVERY = frozenset(CAPTURES)
FROZEN = frozenset({"contents"})


def contract(captures: frozenset[str] = EVERY, **changes: Any) -> Contract:
    return Contract(
        ReceiveLayout.DENSE_ROWS, RowOrder.ANY, MaskedSlots.DROPPED, captures=captures, capture_refusal="no", **changes
    )


def a_round(graph: int, tokens: int = 1, expert: int = 0) -> GraphRound:
    return GraphRound(Explicit((((expert, 1),) * tokens, ())), graph=graph)


def case(*graphs: int, cell: GraphCell = _CELL, rebuilt: int = 0) -> GraphCase:
    return GraphCase(cell, tuple(a_round(graph) for graph in graphs), rebuilt)


def with_cell(of: GraphCase, **changes: Any) -> GraphCase:
    return msgspec.structs.replace(of, cell=msgspec.structs.replace(of.cell, **changes))


def test_a_case_comes_back_from_its_file() -> None:
    of = case(0, -1, 0, 1, rebuilt=2)
    assert decode(encode(of), "here") == of
    assert b'"type":"graph"' in encode(of)


def test_rounds_belong_to_positions_of_graphs() -> None:
    of = with_cell(case(1, 1, 1, 1, -1, 0, 0), length=2)
    assert slots_of(of) == [(1, 0), (1, 1), (1, 0), (1, 1), (-1, 4), (0, 0), (0, 1)]
    assert list(replays_of(of)) == [(0, 2), (2, 2), (4, 1), (5, 2)]
    assert first_rounds(of) == {0: 5, 1: 0}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (with_cell(case(0), length=4), "length is 4; give 1 to 3"),
        (with_cell(case(0, 0), length=2, halves=True), "length is 2; give 1 to 3 rounds, or 1 with halves"),
        (with_cell(case(0, 0, 0), length=2), "round 2 begins a replay of graph 0 that ends early; give 2 rounds"),
        (with_cell(case(0, -1, 0), length=2), "round 0 begins a replay of graph 0 that ends early"),
        (with_cell(case(0), modes=("zero-copy",)), "leave all but 'handle' out"),
        (with_cell(case(0), modes=("handle",), warm=False), "make warm true"),
        (case(*(0,) * 13), "13 rounds of captured calls; give at most 12"),
        (case(0, 3), r"rounds are of the graphs \[0, 3\]; give -1 for eager ones to 2"),
        (case(-2), r"rounds are of the graphs \[-2\]"),
        (case(0, 0, rebuilt=2), "rebuilt is 2; give 0, or where a replay or an eager round begins"),
        (GraphCase(_CELL, (a_round(0), a_round(0, 2))), r"round 1 has \(2, 0\) tokens per rank"),
        (GraphCase(_CELL, (msgspec.structs.replace(a_round(0), hidden=32),)), "give hidden 0"),
    ],
)
def test_what_is_illegal_is_told(bad: GraphCase, message: str) -> None:
    with pytest.raises(CaseError, match=message):
        decode(encode(bad), "here")


def test_contracts_promise_more_or_less() -> None:
    moved = GraphCase(_CELL, (a_round(0), a_round(0, expert=2)))
    cold = with_cell(case(0), warm=False)
    handle = with_cell(moved, modes=("handle",))
    assert misfit(moved, contract()) == misfit(cold, contract()) == ""
    assert misfit(case(0), contract(frozenset())) == "no"
    assert "warm it up" in misfit(cold, contract(EVERY - {"cold"}))
    assert "give the mode handle" in misfit(moved, contract(FROZEN))
    assert "changes the routing" in misfit(handle, contract(FROZEN))
    assert misfit(with_cell(case(0, 0), modes=("handle",)), contract(FROZEN)) == ""


def test_captures_name_what_there_is() -> None:
    with pytest.raises(ValueError, match="give 'contents' and some of"):
        contract(frozenset({"routing"}))
    with pytest.raises(ValueError, match="give 'contents' and some of"):
        contract(frozenset({"contents", "sizes"}))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("promised", [EVERY, FROZEN], ids=["routing", "frozen"])
def test_a_cell_begins_with_what_it_needs(form: Any, world_size: int, promised: frozenset[str]) -> None:
    if promised == FROZEN and not form.warm:
        return
    changes = msgspec.structs.asdict(_CELL) | vars(form) | {"world_size": world_size, "experts": 2 * world_size}
    cell = GraphCell(**changes | {"modes": () if promised == EVERY else ("handle",)})
    of = first_case(cell, contract(promised))
    assert decode(encode(of), "here") == of
    assert misfit(of, contract(promised)) == ""
    required = graph_coverage.required(cell, contract(promised))
    assert required <= set(graph_coverage.classes(of))
    assert ("cold capture" in required) == (not cell.warm)


@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("begins", [0, -1])
def test_only_the_first_call_of_an_operator_that_was_not_warmed_up_is_a_cold_capture(warm: bool, begins: int) -> None:
    hit = graph_coverage.classes(with_cell(case(begins, 0), warm=warm))
    assert ("begins with a replay" in hit) == (begins == 0)
    assert ("cold capture" in hit) == (begins == 0 and not warm)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("promised", [EVERY, FROZEN], ids=["routing", "frozen"])
def test_drawn_cases_are_legal(form: Any, promised: frozenset[str]) -> None:
    if promised == FROZEN and not form.warm:
        return
    modes = () if promised == EVERY else ("handle",)
    cell = GraphCell(**msgspec.structs.asdict(_CELL) | vars(form) | {"modes": modes})
    hit: set[str] = set()

    @seed(1)
    @settings(max_examples=60, deadline=None, database=None)
    @given(graph_cases(cell, contract(promised)))
    def one(of: GraphCase) -> None:
        assert decode(encode(of), "here") == of
        assert misfit(of, contract(promised)) == ""
        assert any(r.graph == 0 for r in of.rounds)
        hit.update(graph_coverage.classes(of))

    one()
    assert {"several sizes", "replayed again", "operator dropped", "begins with a replay"} <= hit
    assert ("cold capture" in hit) == (not cell.warm)
    assert ("replay with another routing" in hit) == (promised == EVERY)


def test_a_report_says_how_rounds_ran() -> None:
    text = "\n".join(describe(case(0, -1, 0, rebuilt=1)))
    assert "1 round(s) in a graph, captured after a warm-up" in text
    assert "round 0: replayed by graph 0\n" in text
    assert "round 1: eager; before it everything was dropped and made anew" in text
