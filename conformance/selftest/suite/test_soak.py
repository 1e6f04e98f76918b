"""Soaks: what is drawn of them, and what their rounds allow to say.

Scope: generation and arithmetic, no ranks. A pass says nothing about the faults that a soak meets.
"""

from __future__ import annotations

from itertools import pairwise
from random import Random

import msgspec
import pytest
from hypothesis import HealthCheck, given, seed, settings

from accelerated.contract import Contract, MaskedSlots, ReceiveLayout, RowOrder
from conformance.case_files import validate
from conformance.cases import Case, Cell
from conformance.generation import cases
from conformance.soak_generation import DELAYS_MS, ROUNDS, STRETCH
from conformance.suite.records import BeginRecord, EndRecord
from conformance.suite.sequence_plan import plain_cell
from conformance.suite.soak_summary import CONFIDENCE, one_in, soak_lines, soaked_rounds
from conformance.verdicts import Verdict

CELL = plain_cell("mori-standin", "IntraNode", (4, 1), "free-running", "soak")
CONTRACT = Contract(ReceiveLayout.DENSE_ROWS, RowOrder.ANY, MaskedSlots.DROPPED, narrow_rows=True)


def drawn(cell: Cell, contract: Contract = CONTRACT) -> list[Case]:
    """A few cases of a cell."""
    found: list[Case] = []

    @seed(1)
    @settings(max_examples=8, database=None, suppress_health_check=[HealthCheck.too_slow], deadline=None)
    @given(case=cases(cell, contract))
    def draw(case: Case) -> None:
        found.append(case)

    draw()
    return found


def test_soaks_swing_between_full_and_nearly_empty() -> None:
    for case in drawn(CELL):
        validate(case)
        assert len(case.rounds) == ROUNDS == 100
        counts = case.token_counts()
        full = [max(one) > 2 for one in counts]
        swings = sum(a != b for a, b in pairwise(full))
        assert swings >= ROUNDS // STRETCH - 1, "big, small, big"
        assert {CELL.capacity, 0, 1} <= {count for one in counts for count in one}
        assert {ms for r in case.rounds for ms in r.delays_ms} == set(DELAYS_MS), "jitter is data of the case"
        assert len({r.seed for r in case.rounds}) > 90
    assert len({case.id for case in drawn(CELL)}) > 1


def test_soaks_take_what_their_cell_and_contract_ask_for() -> None:
    handled = msgspec.structs.replace(CELL, modes=("handle",))
    strict = Contract(ReceiveLayout.DENSE_ROWS, RowOrder.ANY, MaskedSlots.DROPPED, idle_ranks=False)
    for case in drawn(handled, strict):
        assert len(case.rounds) == 8
        assert all(0 not in counts for counts in case.token_counts())
    coded = msgspec.structs.replace(CELL, codec="fp8_direct_cast")
    assert all(r.values != "bits" for case in drawn(coded) for r in case.rounds)


@pytest.mark.parametrize(("rounds", "rate"), [(1, 1), (100, 33), (1000, 334), (5000, 1669)])
def test_the_rarest_fault_that_would_have_been_seen(rounds: int, rate: int) -> None:
    assert one_in(rounds) == rate
    assert 1 - (1 - 1 / rate) ** rounds >= CONFIDENCE or rate == 1
    assert 1 - (1 - 1 / (rate + 1)) ** rounds < CONFIDENCE


def test_the_rate_is_what_a_simulation_sees() -> None:
    random, rounds = Random(0), 100
    struck = sum(any(random.random() < 1 / one_in(rounds) for _ in range(rounds)) for _ in range(4000))
    # Three standard deviations of a binomial of 4000 at 0.95.
    assert abs(struck / 4000 - 0.95) < 0.013


def _records(case: Case, verdict: Verdict, origin: str = "generated") -> tuple[BeginRecord, EndRecord]:
    label = case.cell.label
    end = EndRecord(case.id, label, origin, verdict, "", 0.0, 0.1, case.tokens, ())
    return BeginRecord(case.id, label, origin, case), end


def test_rounds_of_passed_soaks_count_and_nothing_else() -> None:
    first, second, unknown, *_ = drawn(CELL)
    other = msgspec.structs.replace(first, cell=msgspec.structs.replace(CELL, check="rounds"))
    told = [
        _records(first, Verdict.PASS),
        _records(second, Verdict.PASS),
        _records(unknown, Verdict.INFRA),
        _records(other, Verdict.PASS),
    ]
    begun = {(begin.cell, begin.case_id): begin for begin, _ in told}
    repeat = _records(first, Verdict.PASS, "repeat")[1]
    found = soaked_rounds([*(end for _, end in told), repeat], begun)
    assert found == {("mori-standin", "IntraNode"): 200}
    (line,) = soak_lines(found)
    assert line == (
        "soak mori-standin IntraNode: 200 rounds: a fault that strikes one round in 67 or more would have been seen "
        "with 95%"
    )
    assert soak_lines({}) == []


@pytest.mark.parametrize(
    ("verdict", "origin"), [(Verdict.FAIL, "generated"), (Verdict.CRASH, "replay"), (Verdict.HANG, "waived")]
)
def test_nothing_is_said_of_a_path_of_which_a_soak_failed(verdict: Verdict, origin: str) -> None:
    first, failed, *_ = drawn(CELL)
    apart = msgspec.structs.replace(first, cell=msgspec.structs.replace(CELL, kernel_type="AsyncLL"))
    told = [_records(first, Verdict.PASS), _records(failed, verdict, origin), _records(apart, Verdict.PASS)]
    begun = {(begin.cell, begin.case_id): begin for begin, _ in told}
    for ends in ([end for _, end in told], [end for _, end in reversed(told)]):
        assert soaked_rounds(ends, begun) == {("mori-standin", "AsyncLL"): 100}
