"""Reduction of sequences on planted failures: the minimum is reached, and nothing illegal is ever run.

Scope: pure functions and the reducer, without ranks. A pass says nothing about sequences whose faults need more than a
neighbourhood of steps at once.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from accelerated.registry import backend
from conformance.cases import Case, SequenceCase
from conformance.engine.reducer import Reducer
from conformance.engine.sequence_steps import exchanges, fewer_steps, folded, plainer, size, without
from conformance.selftest.suite.sequence_examples import EVERY, every_step, replays
from conformance.sequence_cases import Check, Combine, Delay, Dispatch, Poison, Recreate, Replay, Sequence, Step
from conformance.suite.kinds import legal

CASE = every_step("mori-standin", "IntraNode", "free-running")
REPLAYED = replays("mori-standin", "InterNodeV1", "drained")
MADE = backend("mori-standin")


def kinds(case: SequenceCase, *wanted: type[Step]) -> int:
    """Steps of these kinds."""
    return sum(isinstance(step, wanted) for step in case.sequence)


def test_examples_are_legal() -> None:
    assert legal(MADE, CASE, "gfx942")
    assert legal(MADE, REPLAYED, "gfx942")


def test_without_takes_along_what_refers_to_a_step() -> None:
    less = without(CASE, {0, 8})
    assert len(less.rounds) == len(CASE.rounds) - 1
    assert less.rounds == CASE.rounds[1:]
    assert [s.round for s in less.sequence if isinstance(s, Dispatch)] == [0, 1, 2]
    assert all(isinstance(less.sequence[s.of], Dispatch | Combine) for s in less.sequence if isinstance(s, Check))
    lost = (Dispatch(0, 0), Combine(0), Poison("inputs", 0), Poison("ids", 0), Poison("experts", 8))
    gone = [s for s in CASE.sequence if s in lost or s in (Check(0), Check(8))]
    assert len(less.sequence) == len(CASE.sequence) - len(gone)
    assert legal(MADE, less, "gfx942")


def test_without_a_round_goes_without_its_replays() -> None:
    less = without(REPLAYED, {0, 1, 4, 9})
    assert kinds(less, Replay) == 0
    assert less.rounds == REPLAYED.rounds[1:]


def test_exchanges_pair_dispatches_with_their_combines() -> None:
    assert exchanges(CASE) == [(0, 8), (2, 6), (11, 14), (17, 19)]
    assert exchanges(REPLAYED) == [(0, 1), (2, 4), (5, 6), (7, 9)]


@pytest.mark.parametrize("case", [CASE, REPLAYED], ids=["every step", "replays"])
def test_candidates_are_whole(case: SequenceCase) -> None:
    found = [*fewer_steps(case), *plainer(case)]
    assert len(found) > 20
    for one in found:
        assert kinds(one, Dispatch) == len(one.rounds)
        assert all(s.of < n for n, s in enumerate(one.sequence) if isinstance(s, Check | Poison))
    runnable = [one for one in found if legal(MADE, one, "gfx942")]
    assert len(runnable) > len(found) / 3
    assert sum(size(one) < size(case) for one in runnable) > 5


def test_narrower_keeps_the_delays_of_the_ranks_that_stay() -> None:
    assert Delay(0, 2) in folded(CASE, range(1, 2)).sequence
    assert kinds(folded(CASE, range(1)), Delay) == 0


def needs(*wanted: Callable[[Sequence], bool]) -> Callable[[Case], bool]:
    """A failure that shows where all of this holds; it must never be asked of an illegal case."""

    def fails(case: Case) -> bool:
        assert isinstance(case, SequenceCase)
        assert legal(MADE, case, "gfx942")
        return all(one(case.sequence) for one in wanted)

    return fails


def recreated_between(steps: Sequence) -> bool:
    """Operator 1 was used, recreated, and used again."""
    used = [n for n, s in enumerate(steps) if isinstance(s, Dispatch) and s.op == 1]
    made = [n for n, s in enumerate(steps) if s == Recreate(1)]
    return bool(used and made) and used[0] < made[0] < used[-1]


def looks_behind_the_other(steps: Sequence) -> bool:
    """What an operator received is looked at after the other one combined."""
    for number, step in enumerate(steps):
        target = steps[step.of] if isinstance(step, Check) else None
        if isinstance(step, Check) and isinstance(target, Dispatch):
            between = steps[step.of : number]
            if any(isinstance(other, Combine) and other.op != target.op for other in between):
                return True
    return False


@pytest.mark.parametrize(
    ("fails", "minimum"),
    [
        (lambda s: any(isinstance(x, Poison) and x.what == "tail" for x in s), 3),
        (recreated_between, 5),
        (looks_behind_the_other, 5),
        (lambda s: sum(isinstance(x, Dispatch) for x in s) >= 3, 6),
    ],
)
def test_reducer_reaches_the_minimum_by_legal_cases_only(fails: Callable[[Sequence], bool], minimum: int) -> None:
    found = Reducer(needs(fails), lambda case: legal(MADE, case, "gfx942"), 20.0).reduce(CASE)
    assert isinstance(found.case, SequenceCase)
    assert len(found.case.sequence) == minimum
    assert found.case.tokens == 0
    assert found.case.cell.world_size == 1
    assert not found.exhausted


def test_reducer_needs_no_second_operator_where_the_order_does_not_matter() -> None:
    twice = needs(lambda s: sum(isinstance(x, Dispatch) for x in s) >= 2)
    apart = (Dispatch(0, 0), Combine(0), Dispatch(1, 1), Combine(1))
    for case in (CASE, msgspec.structs.replace(CASE, rounds=CASE.rounds[:2], sequence=apart)):
        found = Reducer(twice, lambda case: legal(MADE, case, "gfx942"), 20.0).reduce(case)
        assert isinstance(found.case, SequenceCase)
        assert found.case.sequence == (Dispatch(0, 0), Combine(0), Dispatch(0, 1), Combine(0))
        assert found.case.cell.second == 0


def test_reducer_prefers_a_dispatch_to_a_replay() -> None:
    twice = needs(lambda s: sum(isinstance(x, Dispatch | Replay) for x in s) >= 2)
    found = Reducer(twice, lambda case: legal(MADE, case, "gfx942"), 20.0).reduce(REPLAYED)
    assert isinstance(found.case, SequenceCase)
    assert found.case.sequence == (Dispatch(0, 0), Combine(0), Dispatch(0, 1), Combine(0))
    assert found.case.cell.modes == ()


def test_reducer_keeps_the_replay_that_a_failure_needs() -> None:
    late = needs(
        lambda s: any(isinstance(x, Replay) and x.round == 0 and Dispatch(0, 1) in s[:n] for n, x in enumerate(s))
    )
    found = Reducer(late, lambda case: legal(MADE, case, "gfx942"), 20.0).reduce(REPLAYED)
    assert isinstance(found.case, SequenceCase)
    assert [type(step) for step in found.case.sequence] == [Dispatch, Combine, Dispatch, Combine, Replay, Combine]
    assert found.case.cell.modes == ("handle",)


def test_operators_change_places_when_that_is_plainer() -> None:
    steps = (Dispatch(1, 0), Combine(1))
    one = msgspec.structs.replace(CASE, rounds=CASE.rounds[:1], sequence=steps)
    found = Reducer(needs(lambda s: len(s) >= 2), lambda case: legal(MADE, case, "gfx942"), 20.0).reduce(one)
    assert isinstance(found.case, SequenceCase)
    assert found.case.sequence == (Dispatch(0, 0), Combine(0))
    assert found.case.cell.second == 0
    assert len(EVERY) == len(CASE.sequence)
