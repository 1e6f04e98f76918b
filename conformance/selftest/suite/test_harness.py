"""What becomes of a failure: repeated, rated, reduced or not, reported, whatever happens meanwhile.

Scope: the harness over a scripted driver, without rank processes. A pass does not prove anything about the driver.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from conformance.cases import Case, Cell
from conformance.engine.driver import InfraError, Limits, Outcome
from conformance.selftest.engine.helpers import case, cell
from conformance.suite.analysis import RATE_REPEATS
from conformance.suite.cells import PlannedCell
from conformance.suite.failure import ConformanceFailure
from conformance.suite.harness import Harness
from conformance.suite.options import Options
from conformance.suite.records import BeginRecord, CellRecord, EndRecord, RecordWriter, read_records
from conformance.verdicts import Verdict

GOOD = Outcome(Verdict.PASS)
WRONG = Outcome(Verdict.FAIL, "dispatch.rows", 0, text="a row is missing")
CRASH = Outcome(Verdict.CRASH, "SIGKILL", 1, text="rank 1 died of SIGKILL")
WHERE = cell("DropsARow", world_size=2)
PLANNED = PlannedCell(WHERE, 10, claimed=True)


class ScriptedDriver:
    """Answers from a script: a function of the case and of how many were asked before."""

    limits = Limits()
    patient_s = 0.0
    backend = ""
    devices = ()
    teardown = None
    ended = ""

    def __init__(self, script: Callable[[Case, int], Outcome]) -> None:
        self._script = script
        self.asked: list[Case] = []

    def run(self, case: Case, *, limit_s: float | None = None, stacks: bool = True) -> Outcome:
        self.asked.append(case)
        return self._script(case, len(self.asked) - 1)

    def holds(self, cell: Cell) -> bool:
        return True

    def discard(self) -> None:
        return None

    rebuild = close = discard


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "records").mkdir()
    return tmp_path


def options(output: Path, backend: str) -> Options:
    """Options of a run of one backend."""
    return Options(
        backends=(backend,),
        companions=(),
        kernel_types=(),
        operators=(),
        ep_sizes=(2,),
        device="cpu",
        arch="gfx942",
        tier="gate",
        models=(),
        only_models=False,
        require_hardware=False,
        output=output,
        seed=0,
        time_budget_s=1.0,
        reduce_budget_s=60.0,
        replay=(),
    )


def checked(place: Path, script: Callable[[Case, int], Outcome], planned: PlannedCell = PLANNED) -> ScriptedDriver:
    """Check a cell; whatever it raises goes on."""
    harness = Harness(options(place, planned.cell.backend), RecordWriter(place / "records" / "main.jsonl"))
    driver = ScriptedDriver(script)
    driver.backend = planned.cell.backend
    harness._resources._driver = driver  # type: ignore[assignment]
    harness.check(planned)
    return driver


def record(place: Path) -> CellRecord:
    (found,) = (r for r in read_records(place / "records") if isinstance(r, CellRecord))
    return found


def origins(place: Path) -> list[str]:
    return [r.origin for r in read_records(place / "records") if isinstance(r, BeginRecord)]


def test_a_case_is_run_once_however_often_it_is_drawn(place: Path) -> None:
    driver = checked(place, lambda case, asked: GOOD)
    assert len(driver.asked) == len({case.id for case in driver.asked}) == record(place).distinct
    assert record(place).verdict is Verdict.PASS


def test_records_name_the_kernels_that_ran(place: Path) -> None:
    checked(place, lambda case, asked: replace(GOOD, kernels=("one", "other")))
    ends = [r for r in read_records(place / "records") if isinstance(r, EndRecord)]
    assert {r.kernels for r in ends} == {("one", "other")}


@pytest.mark.parametrize("outcome", [WRONG, CRASH], ids=["wrong", "crash"])
def test_a_failure_that_never_comes_back_is_reported_with_its_rate(place: Path, outcome: Outcome) -> None:
    """Hypothesis asks again and must see the same verdict: no flake, no pass."""
    with pytest.raises(ConformanceFailure) as caught:
        checked(place, lambda case, asked: outcome if asked == 2 else GOOD)
    failure = caught.value.failure
    assert (failure.failed, failure.repeats, failure.reproduced) == (1, RATE_REPEATS + 1, False)
    assert f"failed 1 of {RATE_REPEATS + 1} runs" in failure.report()
    assert "did not fail again" in failure.report()
    assert failure.minimal == failure.original
    assert "reduction" not in origins(place), "what never fails again cannot be reduced"
    assert (record(place).verdict, record(place).failure) == (outcome.verdict, str(failure.directory))


def test_a_failure_that_always_comes_back_is_reduced_and_confirmed(place: Path) -> None:
    with pytest.raises(ConformanceFailure) as caught:
        checked(place, lambda case, asked: WRONG if case.tokens >= 2 else GOOD)
    failure = caught.value.failure
    assert failure.failed == failure.repeats
    assert failure.reproduced
    assert failure.minimal.tokens == 2
    assert type(caught.value).__name__ == "FAIL_dispatch_rows"


def test_a_crash_that_comes_back_costs_few_pools_before_it_is_reduced(place: Path) -> None:
    with pytest.raises(ConformanceFailure) as caught:
        checked(place, lambda case, asked: CRASH if case.tokens >= 2 else GOOD)
    assert (caught.value.failure.failed, caught.value.failure.repeats) == (2, 2)


def test_another_failure_does_not_count_as_the_same(place: Path) -> None:
    other = Outcome(Verdict.FAIL, "combine.output", 0, text="a sum is wrong")
    with pytest.raises(ConformanceFailure) as caught:
        checked(place, lambda case, asked: WRONG if asked == 0 else other)
    assert caught.value.failure.outcome.check == "dispatch.rows"
    assert caught.value.failure.failed == 1


def test_a_harness_that_fails_meanwhile_does_not_lose_the_failure(place: Path) -> None:
    def script(case: Case, asked: int) -> Outcome:
        if asked:
            raise InfraError("a fresh pool failed its canary exchange")
        return CRASH

    with pytest.raises(ConformanceFailure) as caught:
        checked(place, script)
    assert "cut short: a fresh pool failed its canary" in caught.value.failure.report()
    assert record(place).verdict is Verdict.CRASH


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (InfraError("lost lockstep"), Verdict.INFRA),
        (OSError("no space left on device"), Verdict.INFRA),
        (KeyboardInterrupt(), Verdict.NOT_RUN),
    ],
    ids=["infra", "unexpected", "interrupted"],
)
def test_a_cell_that_was_cut_off_never_reads_as_passed(place: Path, error: BaseException, verdict: Verdict) -> None:
    def script(case: Case, asked: int) -> Outcome:
        if asked == 0:
            raise error
        return GOOD  # Hypothesis asks again, and must not make a flake of it

    with pytest.raises(type(error)):
        checked(place, script)
    assert record(place).verdict is verdict


def test_in_an_unclaimed_cell_a_failure_is_a_finding(place: Path) -> None:
    checked(place, lambda case, asked: WRONG, PlannedCell(PLANNED.cell, 10, claimed=False))
    assert record(place).verdict is Verdict.FINDING
    assert record(place).summary.startswith("FAIL dispatch.rows")


def test_the_same_case_means_the_same_id() -> None:
    assert case(WHERE).id == case(WHERE).id != case(WHERE, seed=1).id
