"""Which cases a cell of experts or of a layer gets: the ladder leaves nothing out, drawn cases are legal.

Scope: conformance/layer_generation.py, suite/layer_coverage.py, the layer's part of cases.py. A pass does not prove
that these inputs find anything.
"""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, seed, settings

from accelerated.contract import MaskedSlots
from conformance.case_files import decode, validate, validate_layer
from conformance.cases import CaseError, Explicit, LayerCase, LayerCell, encode, expand
from conformance.layer_generation import ladder, layer_cases, layer_ladder, strata_of
from conformance.layer_rules import RELATIONS, relations_of, takes
from conformance.selftest.suite.layer_cells import (
    TOKEN,
    experts_cell,
    experts_contract,
    layer_cell,
    layer_contract,
    one,
)
from conformance.suite import layer_coverage
from conformance.suite.describe import describe


def check(case: LayerCase) -> None:
    validate(case)
    validate_layer(case)
    assert decode(encode(case), "there") == case


@pytest.mark.parametrize("placement", ["linear", "round_robin"])
@pytest.mark.parametrize("duplicates", [True, False])
def test_the_ladder_hits_every_class_it_must(placement: str, duplicates: bool) -> None:
    cell, contract = experts_cell(placement=placement, top_k=2), experts_contract(takes_duplicates=duplicates)
    cases = list(ladder(cell, contract))
    for case in cases:
        check(case)
        assert takes(contract, case)
    hit = {name for case in cases for name in layer_coverage.classes(case)}
    relations = relations_of(contract, cell)
    assert relations == RELATIONS
    least = layer_coverage.required(
        cell, short=False, masked=True, quantised=True, duplicates=duplicates, relations=relations
    )
    assert least <= hit
    assert {f"relation {name}" for name in RELATIONS} <= least


def test_the_ladder_takes_both_sides_of_a_boundary_and_the_long_buffer() -> None:
    cell = experts_cell(buffer=17_000, capacity=300)
    cases = list(ladder(cell, experts_contract(boundaries=(21,))))
    counts = {len(expand(c.cell, c.rounds[0].routing)[0]) for c in cases}
    assert {0, 1, 16, 17, 21, 22, 32, 33, 255, 256, 257, 300} <= counts
    assert max(c.rounds[0].tail for c in cases) == 4 * 4095


def test_slots_come_apart_where_experts_have_left_their_first_path() -> None:
    cases = ladder(experts_cell(capacity=300), experts_contract(boundaries=(16, 32, 100)))
    (apart,) = (case for case in cases if case.rounds[0].relation == "slots apart")
    assert apart.token_counts() == [(33,)]


def test_no_buffer_is_longer_than_the_cell_says() -> None:
    cell = experts_cell(buffer=50)
    for case in ladder(cell, experts_contract()):
        assert len(expand(cell, case.rounds[0].routing)[0]) + case.rounds[0].tail <= cell.rows == 50
    assert cell.expert_problem().capacity == 50
    with pytest.raises(CaseError, match="tail of 50"):
        decode(encode(one(cell, (0, 1, 2, 3), tail=50)), "there")


def test_experts_move_between_the_first_rounds_of_every_cell_with_replicas() -> None:
    cell = layer_cell(experts=12, redundant=4, check="eplb")
    (case,) = layer_ladder(cell, layer_contract())
    check(case)
    tables = [a_round.physical for a_round in case.rounds]
    assert len(set(tables)) == 3
    per_rank = cell.experts // cell.world_size
    for rank in range(cell.world_size):
        held = [table[rank * per_rank : (rank + 1) * per_rank] for table in tables[1:]]
        assert held[0] != held[1]
    assert {"experts moved", "sizes change"} <= set(layer_coverage.classes(case))
    still = one(cell, (0, 1))
    assert "experts moved" not in layer_coverage.classes(still)
    (free,) = layer_ladder(layer_cell(mode="free-running"), layer_contract())
    assert "sizes change" in layer_coverage.classes(free)


def test_capacities_are_swept_with_one_routing() -> None:
    routings = []
    for capacity in (1, 16, 256):
        (case,) = layer_ladder(layer_cell(capacity=capacity), layer_contract())
        check(case)
        routings.append(case.rounds)
    assert routings[0] == routings[1] == routings[2]
    assert len(routings[0]) == 1


@pytest.mark.parametrize(
    ("change", "gone"),
    [
        ({"takes_num_rows": False}, "rows beyond the count"),
        ({"wire": None}, "quantised rows"),
        ({"drops_masked": False}, "masked slot"),
        ({"takes_empty": False}, "nothing at all"),
    ],
)
def test_the_ladder_asks_for_nothing_that_is_not_taken(change: dict[str, Any], gone: str) -> None:
    contract = experts_contract(**change)
    cases = list(ladder(experts_cell(), contract))
    assert all(takes(contract, case) for case in cases)
    everything = list(ladder(experts_cell(), experts_contract()))
    assert not all(takes(contract, case) for case in everything)
    assert gone not in {name for case in cases for name in layer_coverage.classes(case)}


@seed(1)
@settings(max_examples=150, deadline=None, database=None)
@given(case=layer_cases(experts_cell(), experts_contract()))
def test_drawn_calls_are_legal(case: LayerCase) -> None:
    check(case)
    assert takes(experts_contract(), case)


@pytest.mark.parametrize(
    "cell", [layer_cell(), layer_cell(mode="free-running"), layer_cell(experts=12, redundant=4, check="eplb")]
)
@pytest.mark.parametrize("masked", [MaskedSlots.DROPPED, MaskedSlots.UNMODELLED])
def test_drawn_layers_are_legal(cell: LayerCell, masked: MaskedSlots) -> None:
    contract = layer_contract(masked)

    @seed(2)
    @settings(max_examples=60, deadline=None, database=None)
    @given(case=layer_cases(cell, contract))
    def draw(case: LayerCase) -> None:
        check(case)
        assert takes(contract, case)
        assert all(set(r.physical) == set(range(cell.logical)) for r in case.rounds if cell.redundant)
        assert masked is MaskedSlots.DROPPED or not any(
            -1 in row for r in case.rounds for tokens in expand(cell, r.routing) for row in tokens
        )

    draw()


def test_masked_slots_have_cases_of_their_own() -> None:
    alone = layer_cell(world_size=1)
    assert strata_of(alone, layer_contract(), 4) == [("", 3), ("masked", 1)]
    assert strata_of(alone, layer_contract(MaskedSlots.UNMODELLED), 4) == [("", 4)]
    assert strata_of(alone, layer_contract(drops_masked=False), 4) == [("", 4)]


def test_every_layer_that_can_be_placed_otherwise_is() -> None:
    assert strata_of(layer_cell(), layer_contract(), 4) == [("", 2), ("masked", 1), ("round-robin", 1)]
    assert ("round-robin", 1) not in strata_of(layer_cell(redundant=4), layer_contract(), 4)
    assert ("round-robin", 1) not in strata_of(layer_cell(translated=False), layer_contract(), 4)

    @seed(3)
    @settings(max_examples=20, deadline=None, database=None)
    @given(case=layer_cases(layer_cell(), layer_contract(), "round-robin"))
    def draw(case: LayerCase) -> None:
        check(case)
        assert "round-robin placement" in layer_coverage.classes(case)

    draw()


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (one(experts_cell(shards=3), (0, 1, 2, 3)), "shards is 3"),
        (one(experts_cell(redundant=8), (0, 1, 2, 3)), "redundant is 8"),
        (one(experts_cell(), (0, 1, 2, 3), tail=-1), "tail of -1"),
        (one(layer_cell(redundant=4), (7, 1)), "routes to expert 7"),
        (one(layer_cell(redundant=4), (0, 1), physical=(0, 1, 2, 3, 0, 1)), "fills 6 physical"),
        (one(layer_cell(redundant=4), (0, 1), physical=(0, 1, 2, 0, 0, 1, 1, 2)), "each of 4 experts"),
    ],
)
def test_what_describes_no_input_is_refused_by_name(case: LayerCase, said: str) -> None:
    with pytest.raises(CaseError, match=said):
        decode(encode(case), "there")


def test_a_report_says_what_a_round_has() -> None:
    cell = layer_cell(experts=12, redundant=4, check="eplb")
    case = one(cell, (0, 1), weighting="signed", physical=(*range(8), 0, 0, 1, 1))
    text = "\n".join(describe(case))
    for words in ("4 replicas of 8", "intermediate 32", "weights signed", "physical experts hold [0, 1"):
        assert words in text
    alone = one(experts_cell(), (0, 1, 2, 3), tail=7, relation="repeat", quantised=True)
    text = "\n".join(describe(alone))
    for words in ("2 shards", "7 poisoned rows", "relation repeat", "quantised before"):
        assert words in text


def test_labels_tell_cells_apart() -> None:
    cells = [
        experts_cell(),
        experts_cell(shards=4),
        experts_cell(shared=1),
        experts_cell(intermediate=64),
        layer_cell(),
        layer_cell(redundant=4),
        layer_cell(placement="round_robin"),
        layer_cell(placement="round_robin", translated=False),
    ]
    assert len({cell.label for cell in cells}) == len(cells)
    assert msgspec.structs.replace(cells[0], shards=2).label == cells[0].label


def test_a_routing_names_logical_experts_only() -> None:
    cell = layer_cell(experts=12, redundant=4, check="eplb")
    case = one(cell, (7, 0))
    assert isinstance(case.rounds[0].routing, Explicit)
    check(case)
    assert TOKEN.group == 0
