"""A rank that dies, waits, raises or answers wrongly becomes the right outcome, and the pool comes back.

Scope: the driver against real rank processes on the CPU. A pass does not prove that a hang on a GPU is recognised.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from conformance.engine.driver import CHECKS, Driver, InfraError, Outcome
from conformance.engine.pool import GRACE_S
from conformance.selftest.engine.backends import MODULE, Defect
from conformance.selftest.engine.helpers import case, cell
from conformance.verdicts import Verdict

LONG_S = 60.0
HANG_S = 2.0
CELL = cell()


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    made = Driver(f"{MODULE}:Defective")
    yield made
    made.close()


def run(driver: Driver, defect: Defect, rank: int, limit_s: float = LONG_S) -> Outcome:
    """The outcome of a defect; a good case passes before it and, on a pool restarted at most once, after it."""
    assert driver.run(case(CELL)).passed
    before = driver.restarts
    outcome = driver.run(case(CELL, defect, rank=rank), limit_s=limit_s)
    assert driver.restarts <= before + 1
    again = driver.run(case(CELL))
    assert again.passed, again.text
    return outcome


def only_in(outcome: Outcome, rank: int, function: str) -> bool:
    """Whether the stack of this rank, and no other, shows the function."""
    return [r for r, stack in sorted(outcome.stacks.items()) if f"in {function}" in stack] == [rank]


def test_a_segmentation_fault_is_a_crash_with_its_stack(driver: Driver) -> None:
    outcome = run(driver, Defect.SEGMENTATION_FAULT, 2)
    assert outcome.key == (Verdict.CRASH, "SIGSEGV")
    assert outcome.rank == 2
    assert "rank 2 died of SIGSEGV during case, in prepare of round 0" in outcome.text
    assert only_in(outcome, 2, "read_address_zero"), outcome.stacks
    assert outcome.seconds < LONG_S / 2, "a crash ends the wait of the others"


def test_an_exit_is_a_crash_with_its_code_and_phase(driver: Driver) -> None:
    outcome = run(driver, Defect.EXIT, 1)
    assert outcome.key == (Verdict.CRASH, "exit code 3")
    assert outcome.phases[1] == "finalize of round 0"
    # Where a rank left without a trace, its phase is all there is, and nothing else is claimed.
    assert outcome.stacks[1] == "no stack: the rank ended without leaving one"


@pytest.mark.parametrize(
    ("defect", "function", "phase"),
    [
        (Defect.PYTHON_WAIT, "wait_in_python", "finalize of round 0"),
        (Defect.NATIVE_WAIT, "wait_with_signals_blocked", "prepare of round 0"),
        (Defect.EXTRA_COLLECTIVE, "wait_in_a_collective", "finalize of round 0"),
    ],
)
def test_a_wait_is_a_hang_with_the_stack_of_the_guilty_rank(
    driver: Driver, defect: Defect, function: str, phase: str
) -> None:
    outcome = run(driver, defect, 3, HANG_S)
    assert outcome.key == (Verdict.HANG, "hang")
    assert only_in(outcome, 3, function), outcome.stacks
    assert outcome.phases[3] == phase
    assert f"rank 3 in {phase}" in outcome.text
    assert outcome.seconds >= HANG_S


def test_only_the_ranks_that_did_not_answer_are_blamed_for_a_hang(driver: Driver) -> None:
    outcome = run(driver, Defect.EXTRA_COLLECTIVE, 2, HANG_S)
    assert outcome.rank == 2
    assert set(outcome.stacks) == {2}


def test_an_exception_is_a_failure_of_its_type_and_the_others_get_the_grace_period(driver: Driver) -> None:
    outcome = run(driver, Defect.EXCEPTION, 1)
    assert outcome.key == (Verdict.FAIL, "raised.ValueError")
    assert outcome.rank == 1
    assert "does not like these ids" in outcome.text
    assert "raise_value_error" in outcome.text, "the traceback is in the text"
    assert GRACE_S <= outcome.seconds < LONG_S / 2
    assert set(outcome.stacks) == {0, 2, 3}, "the others were blocked in the collective"
    assert all("in prepare" in stack for stack in outcome.stacks.values()), outcome.stacks


def test_a_wrong_result_is_a_failure_of_its_check_and_keeps_the_pool(driver: Driver) -> None:
    before = driver.restarts
    outcome = run(driver, Defect.DROPPED_ROW, 2)
    assert outcome.key == (Verdict.FAIL, "dispatch.count")
    assert driver.restarts == before


def test_an_answer_to_another_command_is_never_a_verdict_on_the_product(driver: Driver) -> None:
    assert driver.run(case(CELL)).passed
    with pytest.raises(InfraError, match=r"lost lockstep during case: rank 2 answered command 10000"):
        driver.run(case(CELL, Defect.FORGED_ANSWER, rank=2))
    assert driver.run(case(CELL)).passed


def test_the_phase_names_the_round() -> None:
    driver = Driver(f"{MODULE}:Defective")
    where = cell(world_size=2, mode="free-running")
    try:
        outcome = driver.run(case(where, Defect.EXIT, rank=0, rounds=3))
    finally:
        driver.close()
    assert outcome.phases[0] == "finalize of round 2"


def test_every_check_has_its_place_in_the_order_of_severity() -> None:
    """A failed check without one would end the run as a failure of the harness."""
    ranks = Path(__file__).parents[2] / "rank"
    words = {
        node.value
        for path in ranks.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    subjects = {check.partition(".")[0] for check in CHECKS}
    named = {word for word in words if re.fullmatch(rf"({'|'.join(subjects)})\.[a-z_]+", word)}
    assert len(named) > 30
    assert named <= set(CHECKS)
