"""The reducer on predicates in pure Python: the minimum it reaches, and how many candidates that takes.

Scope: no ranks and no backend; a predicate stands for "fails the same way". A pass does not prove that every defect's
minimum is reached, only those of the shapes written here.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import msgspec
import pytest

from conformance.case_files import validate
from conformance.cases import Case, CaseError, Cell, Explicit, Recipe, Round, Rows
from conformance.engine import steps
from conformance.engine.reducer import Reducer, Reduction
from conformance.row_cases import Mode
from reference.problem import ProblemError

Predicate = Callable[[Case], bool]


def cell(world_size: int = 4, *, top_k: int = 2, per_rank: int = 2, capacity: int = 64, mode: Mode = "drained") -> Cell:
    return Cell(
        "round_trip", "none", "IntraNode", world_size, 1, 64, per_rank * world_size, top_k, capacity, "bfloat16", mode
    )


def recipe(of: Cell, counts: tuple[int, ...], seed: int = 3) -> Round:
    return Round(Recipe("uniform", counts, 0, seed), values="wide", seed=77, delays_ms=(2,) + (0,) * (len(counts) - 1))


def well_formed(case: Case) -> bool:
    try:
        validate(case)
    except (CaseError, ProblemError):
        return False
    return True


def reduce(case: Case, fails: Predicate, budget_s: float = 60.0, candidates: int = 2000) -> Reduction[Case]:
    assert fails(steps.explicit(case))
    done = Reducer(fails, well_formed, budget_s, candidates).reduce(case)
    assert fails(done.case)
    return done


def rows(case: Case) -> tuple[Rows, ...]:
    return tuple(steps.rows_of(a_round) for a_round in case.rounds)


def owners(case: Case, row: tuple[int, ...]) -> set[int]:
    return {e // (case.cell.experts // case.cell.world_size) for e in row if e >= 0}


def crossing(case: Case, index: int = 0) -> list[tuple[int, tuple[int, ...]]]:
    """(rank, row) of the tokens of a round that leave their rank."""
    if index >= len(case.rounds):
        return []
    placed = [(r, row) for r, tokens in enumerate(rows(case)[index]) for row in tokens]
    return [(r, row) for r, row in placed if owners(case, row) - {r}]


@pytest.mark.parametrize("world_size", [2, 4, 6, 8, 32])
def test_a_crossing_row_ends_at_two_ranks(world_size: int) -> None:
    of = cell(world_size)
    done = reduce(Case(of, (recipe(of, (64,) * world_size),)), lambda case: bool(crossing(case)))
    assert rows(done.case) == ((((1,),), ()),)
    assert (done.case.cell.top_k, done.case.cell.experts) == (1, 2)
    assert done.case.rounds[0] == Round(Explicit((((1,),), ())))
    assert done.tried <= 20


def test_two_distant_ranks_keep_their_distance() -> None:
    """The only crossing row is from rank 0 to rank 4 of 8: folding must not bring both onto one rank."""
    of = cell(8, top_k=1)
    routing: Rows = (((8,),), *((((2 * r,),) * 3) for r in range(1, 8)))
    done = reduce(Case(of, (Round(Explicit(routing)),)), lambda case: bool(crossing(case)))
    assert rows(done.case) == ((((1,),), ()),)
    assert done.tried <= 30


def test_a_large_recipe_is_cut_quickly() -> None:
    of = cell(8, top_k=8, per_rank=8, capacity=256)
    done = reduce(Case(of, (recipe(of, (256,) * 8),)), lambda case: sum(map(len, rows(case)[0])) >= 3)
    assert done.case.tokens == 3
    assert (done.case.cell.world_size, done.case.cell.top_k, done.case.cell.experts) == (1, 1, 1)
    assert rows(done.case) == ((((0,),) * 3,),)
    assert done.tried <= 60


def test_the_capacity_shrinks_where_it_is_the_cause() -> None:
    of = cell(4, capacity=256)
    full: Predicate = lambda case: any(case.cell.capacity in counts for counts in case.token_counts())  # noqa: E731
    done = reduce(Case(of, (recipe(of, (17, 256, 0, 255)),)), full)
    assert (done.case.cell.capacity, rows(done.case)) == (1, ((((0,),),),))
    assert done.tried <= 40


def test_the_capacity_stays_where_it_is_not() -> None:
    of = cell(4)
    done = reduce(Case(of, (recipe(of, (64,) * 4),)), lambda case: case.tokens > 1)
    assert done.case.cell.capacity == 64


def test_all_tokens_needed_ends_quickly() -> None:
    """No token can be spared and the capacity cannot shrink: only bulk steps help."""
    of = cell(2, capacity=128)
    done = reduce(Case(of, (recipe(of, (128, 0)),)), lambda case: case.token_counts()[0][0] == 128)
    assert set(rows(done.case)[0][0]) == {(0,)}
    assert done.case.cell.world_size == 1
    assert done.tried <= 900


def test_a_sequence_moves_to_the_first_rank_as_a_whole() -> None:
    """Round 1 needs a row on the rank that got one in round 0; both have to move at once."""

    def stale(case: Case) -> bool:
        reached = set().union(*(owners(case, row) for tokens in rows(case)[0] for row in tokens), set())
        return any(reached & (owners(case, row) - {r}) for r, row in crossing(case, 1))

    of = cell(4, mode="free-running")
    done = reduce(Case(of, tuple(recipe(of, (64, 3, 0, 64), seed) for seed in range(4))), stale)
    assert rows(done.case) == ((((1,),), ()), (((1,),), ()))
    assert done.case.cell.mode == "drained"
    assert done.tried <= 90


def test_duplicates_become_distinct_ids() -> None:
    of = cell(4, top_k=4, per_rank=4)
    routing: Rows = (((9, 9, 9, 9), (5, 9, 5, 9)), (), ((0, 0, 1, 1),), ())
    twice: Predicate = lambda case: any(  # noqa: E731
        len(owners(case, row)) < len(row) for tokens in rows(case)[0] for row in tokens
    )
    done = reduce(Case(of, (Round(Explicit(routing)),)), twice)
    assert rows(done.case) == ((((0, 1),),),)
    assert done.tried <= 40


def test_a_mask_that_is_the_cause_stays() -> None:
    of = cell(2)
    routing: Rows = (((0, 1), (-1, 3)), ((2, -1),))
    done = reduce(
        Case(of, (Round(Explicit(routing)),)),
        lambda case: any(-1 in row for tokens in rows(case)[0] for row in tokens),
    )
    assert rows(done.case) == ((((-1,),),),)


def test_two_nodes_stay_where_they_are_the_cause() -> None:
    of = msgspec.structs.replace(cell(8), nodes=2)

    def both_nodes(case: Case) -> bool:
        per_node = case.cell.world_size // case.cell.nodes
        named = [{o // per_node for o in owners(case, row)} for tokens in rows(case)[0] for row in tokens]
        return case.cell.nodes == 2 and any(len(nodes) == 2 for nodes in named)

    done = reduce(Case(of, (recipe(of, (16,) * 8),)), both_nodes)
    assert (done.case.cell.world_size, done.case.cell.nodes) == (2, 2)
    assert rows(done.case) == ((((0, 1),), ()),)


def test_no_tokens_at_all_is_found_with_few_failing_candidates() -> None:
    """Each failing candidate of a hang costs a pool: bold steps come first."""
    failing = 0

    def idle_rank(case: Case) -> bool:
        nonlocal failing
        hangs = case.cell.world_size > 1 and 0 in case.token_counts()[0]
        failing += hangs
        return hangs

    of = cell(8, top_k=8, per_rank=8)
    done = reduce(Case(of, (recipe(of, (64, 0, 64, 1, 2, 3, 4, 5)),)), idle_rank)
    assert rows(done.case) == (((), ()),)
    assert failing <= 7


def test_free_running_stays_where_a_drained_run_passes() -> None:
    of = cell(2, mode="free-running")
    done = reduce(Case(of, (recipe(of, (4, 4)), recipe(of, (4, 4)))), lambda case: case.cell.mode == "free-running")
    assert done.case.cell.mode == "free-running"
    assert done.case.tokens == 0


def test_round_robin_placement_becomes_linear_with_the_same_traffic() -> None:
    of = msgspec.structs.replace(cell(2, top_k=1), placement="round_robin")
    case = Case(of, (Round(Explicit((((1,),), ()))),))  # physical position 2: rank 1
    assert rows(steps.linear(case)) == ((((2,),), ()),)


def test_a_rare_failure_is_reduced_with_repeats() -> None:
    random = Random(5)
    of = cell(4)

    def rare(case: Case) -> bool:
        return case.tokens > 0 and any(random.random() < 0.03 for _ in range(256))

    done = Reducer(rare, well_formed, 60.0).reduce(Case(of, (recipe(of, (64,) * 4),)))
    assert rows(done.case) == ((((0,),),),)


def test_the_budget_ends_the_search_with_the_best_so_far() -> None:
    of = cell(8)
    done = reduce(Case(of, (recipe(of, (64,) * 8),)), lambda case: case.tokens >= 5, candidates=4)
    assert done.exhausted
    assert done.tried == 4
    assert done.case.cell.world_size < 8


def test_a_minimum_is_left_alone() -> None:
    of = cell(1, top_k=1, per_rank=1)
    case = Case(msgspec.structs.replace(of, hidden=32), (Round(Explicit((((0,),),))),))
    done = reduce(case, lambda candidate: candidate.tokens == 1)
    assert done.case == case
    assert done.tried <= 2


def test_wires_codecs_and_modes_are_left_out_unless_they_matter() -> None:
    manner = {"wire": "mxfp4", "codec": "fp8_blockwise", "scale_dim": 4, "modes": ("expert count", "capped")}
    of = msgspec.structs.replace(cell(2), hidden=256, **manner)
    tokens = ((((0, 1), (2, 3)), ((1, 2),)),)
    case = Case(of, tuple(Round(Explicit(rows_), "normal", 5, hidden=128) for rows_ in tokens))
    whatever = reduce(case, lambda one: one.tokens > 0).case
    assert (whatever.cell.wire, whatever.cell.codec, whatever.cell.modes) == ("", "", ())
    assert (whatever.rounds[0].hidden, whatever.rounds[0].values) == (0, "integers")
    scaled = reduce(case, lambda one: one.tokens > 0 and one.cell.wire != "").case
    assert (scaled.cell.wire, scaled.cell.codec, scaled.cell.hidden) == (steps.PLAIN_WIRE, "", steps.PLAIN_HIDDEN)
    coded = reduce(case, lambda one: one.tokens > 0 and one.cell.codec != "").case
    assert (coded.cell.codec, coded.cell.scale_dim, coded.rounds[0].values) == ("fp8_blockwise", 1, "edges")
    counted = reduce(case, lambda one: one.tokens > 0 and "expert count" in one.cell.modes).case
    assert counted.cell.modes == ("expert count",)
