"""Waivers in a cell: what is drawn, what is run, and the verdict of what is waived and of what is not.

Scope: the harness over a scripted driver, without rank processes. The whole runs are in ``test_waiver_runs.py``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from msgspec.structs import replace as replaced

from accelerated.mori_ep.backend import HOSTS_VARIABLE
from conformance.cases import AnyCase, Case
from conformance.engine.driver import Outcome
from conformance.selftest.suite.test_harness import (
    GOOD,
    PLANNED,
    WHERE,
    WRONG,
    ScriptedDriver,
    options,
    origins,
    record,
)
from conformance.selftest.suite.test_waiver_file import entry
from conformance.suite.cells import PlannedCell
from conformance.suite.failure import ConformanceFailure
from conformance.suite.harness import Harness, MistrustedError
from conformance.suite.options import Launched, Options
from conformance.suite.records import CellRecord, EndRecord, RecordWriter, read_records
from conformance.suite.summary import total
from conformance.suite.waived import SAMPLES, UnexpectedPassError
from conformance.suite.waiver_state import waiver_states
from conformance.suite.waivers import read_waivers
from conformance.verdicts import ExitCode, Verdict

FULL = "{ class = 'rank at capacity' }"
SAID = "{ verdict = 'FAIL', check = 'dispatch.rows' }"
OTHER = Outcome(Verdict.FAIL, "combine.output", 0, text="a sum is wrong")
HANG = Outcome(Verdict.HANG, "hang", 0, text="no answer")
EVERYTHING = "{ tokens = { min = 0 } }"
RAISES = "verdict = 'FAIL', check = 'raised.OSError'"
#: A cell of four cases, all of which passed.
PASSED = CellRecord("one", WHERE, Verdict.PASS, True, False, 4, 4, 1.0, 2.0)
#: What pytest's own outcomes are called.
XFAIL, SKIP = pytest.xfail.Exception, pytest.skip.Exception
Script = Callable[[Case, int], Outcome]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "records").mkdir()
    return tmp_path


def full(case: AnyCase) -> bool:
    """Whether the waiver of these tests covers a case."""
    assert isinstance(case, Case)
    return any(case.cell.capacity in counts for counts in case.token_counts())


def with_waivers(place: Path, *texts: str, backend: str = WHERE.backend) -> Options:
    path = place / "known.toml"
    path.write_text("".join(texts))
    return replace(options(place, backend), waivers=read_waivers(path))


def waiver(case: str | None = FULL, expect: str | None = SAID, **more: str) -> str:
    return entry(cell=f"{{ backend = '{WHERE.backend}' }}", case=case, expect=expect, **more)


def checked(
    place: Path, script: Script, *waivers: str, planned: PlannedCell = PLANNED, launched: Launched | None = None
) -> ScriptedDriver:
    """Check a cell; its driver, which knows every case that was run. What pytest calls xfail or skip is no error."""
    chosen = replace(with_waivers(place, *waivers, backend=planned.cell.backend), launched=launched)
    harness = Harness(chosen, RecordWriter(place / "records" / "main.jsonl"))
    driver = ScriptedDriver(script)
    driver.backend = planned.cell.backend
    harness._resources._driver = driver  # type: ignore[assignment]
    try:
        harness.check(planned)
    except (XFAIL, SKIP):
        assert record(place).verdict in (Verdict.XFAIL, Verdict.QUARANTINED)
    return driver


def loses_full_ranks(case: Case, asked: int) -> Outcome:
    return WRONG if full(case) else GOOD


def test_a_known_failure_is_sampled_and_nothing_else_of_it_is_run(place: Path) -> None:
    driver = checked(place, loses_full_ranks, waiver())
    ended = record(place)
    assert ended.verdict is Verdict.XFAIL
    (waived,) = ended.waived
    assert (waived.entry, waived.issue, waived.verdict) == (1, "ROCm/mori#610", Verdict.XFAIL)
    assert waived.sampled == waived.failed == sum(map(full, driver.asked)) == origins(place).count("waived") <= SAMPLES
    assert waived.avoided >= waived.sampled > 0
    assert ended.distinct == sum(not full(case) for case in driver.asked)
    assert "repeat" not in origins(place), "what is known is neither rated nor reduced"


def test_the_other_cases_are_those_that_are_drawn_without_the_waiver(
    place: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    bare = tmp_path_factory.mktemp("bare")
    (bare / "records").mkdir()
    before = checked(bare, lambda case, asked: GOOD)
    after = checked(place, loses_full_ranks, waiver())
    kept = [case.id for case in before.asked if not full(case)]
    ran = [case.id for case in after.asked if not full(case)]
    assert kept
    assert ran[: len(kept)] == kept, "a waiver takes cases away and changes none"
    assert record(place).lacking == 0
    assert len(ran) >= record(bare).distinct, "and the budget is filled up"


def test_a_region_as_large_as_the_cell_leaves_the_budget_lacking(place: Path) -> None:
    checked(place, lambda case, asked: WRONG, waiver(case="{ tokens = { min = 0 } }"))
    ended = record(place)
    assert (ended.verdict, ended.distinct, ended.lacking) == (Verdict.XFAIL, 0, ended.planned)


def test_an_unexpected_pass_is_a_verdict_of_its_own(place: Path) -> None:
    with pytest.raises(UnexpectedPassError, match=r"XPASS: waiver 1 \(ROCm/mori#610\): 0 of"):
        checked(place, lambda case, asked: GOOD, waiver())
    assert record(place).verdict is Verdict.XPASS


def test_a_failure_that_comes_and_goes_may_stay_away(place: Path) -> None:
    checked(place, lambda case, asked: GOOD, waiver(intermittent="true"))
    assert record(place).verdict is Verdict.PASS
    assert (record(place).waived[0].failed, record(place).waived[0].verdict) == (0, Verdict.PASS)


def test_another_failure_of_what_is_not_waived_gates(place: Path) -> None:
    with pytest.raises(ConformanceFailure) as caught:
        checked(place, lambda case, asked: WRONG if case.tokens > 2 else GOOD, waiver())
    assert record(place).verdict is Verdict.FAIL
    assert not full(caught.value.failure.minimal), "the minimum is not what is known"


def test_another_failure_of_what_is_waived_gates_too(place: Path) -> None:
    with pytest.raises(ConformanceFailure) as caught:
        checked(place, lambda case, asked: OTHER if full(case) else GOOD, waiver())
    assert caught.value.failure.outcome.check == "combine.output"
    assert record(place).verdict is Verdict.FAIL


def test_a_search_for_the_minimum_does_not_end_in_what_is_known(place: Path) -> None:
    """Two tokens fail in the same way and are waived: the search ends at three."""
    with pytest.raises(ConformanceFailure) as caught:
        checked(place, lambda case, asked: WRONG if case.tokens >= 2 else GOOD, waiver(case="{ tokens = 2 }"))
    assert caught.value.failure.minimal.tokens == 3


def test_a_hang_as_expected_is_asked_for_once(place: Path) -> None:
    expected = waiver(expect="{ verdict = 'HANG' }")
    driver = checked(place, lambda case, asked: HANG if full(case) else GOOD, expected)
    assert sum(map(full, driver.asked)) == 1
    assert record(place).verdict is Verdict.XFAIL


def test_a_waived_cell_is_sampled_only(place: Path) -> None:
    driver = checked(place, lambda case, asked: WRONG, waiver(case=None))
    assert (record(place).verdict, record(place).distinct) == (Verdict.XFAIL, 0)
    assert len(driver.asked) == SAMPLES


def test_a_quarantined_cell_is_never_launched(place: Path) -> None:
    driver = checked(place, lambda case, asked: GOOD, waiver(case=None, expect=None, quarantine="true"))
    assert driver.asked == []
    assert record(place).verdict is Verdict.QUARANTINED
    assert "ROCm/mori#610" in record(place).reason


def exit_of(place: Path) -> ExitCode:
    """Exit code of a run that consists of the cell and of one that passed."""
    return total([*read_records(place / "records"), PASSED]).exit_code


def test_a_quarantined_region_as_large_as_the_cell_is_no_pass(place: Path) -> None:
    driver = checked(place, lambda case, asked: GOOD, waiver(case=EVERYTHING, expect=None, quarantine="true"))
    ended = record(place)
    assert driver.asked == []
    assert (ended.verdict, ended.distinct, ended.lacking) == (Verdict.QUARANTINED, 0, ended.planned)
    assert "drawn cases were not launched" in ended.reason
    assert exit_of(place) is ExitCode.INCOMPLETE, "its user named cases, and nothing is left of the cell"


@pytest.mark.parametrize("case", [None, EVERYTHING], ids=["whole", "as large"])
def test_a_waived_cell_whose_failure_stays_away_is_no_pass(place: Path, case: str | None) -> None:
    with pytest.raises(MistrustedError, match=r"every drawn case of .* is waived.*ROCm/mori#610"):
        checked(place, lambda case, asked: GOOD, waiver(case=case, intermittent="true"))
    ended = record(place)
    assert (ended.verdict, ended.distinct, ended.lacking) == (Verdict.MISTRUSTED, 0, ended.planned)
    assert origins(place) == ["waived"] * SAMPLES


def test_a_cell_that_waivers_emptied_leaves_a_run_incomplete() -> None:
    """Also where a fixed case of it passed; not where it failed as its user says."""
    emptied = replaced(PASSED, lacking=PASSED.planned)
    assert total([PASSED, replaced(emptied, label="two")]).exit_code is ExitCode.INCOMPLETE
    assert total([PASSED, replaced(emptied, label="two", verdict=Verdict.XFAIL)]).exit_code is ExitCode.OK
    assert total([PASSED, replaced(emptied, label="two", lacking=1)]).exit_code is ExitCode.OK


@pytest.mark.parametrize(
    "said", ["verdict = 'CRASH', check = 'SIGKILL'", "verdict = 'HANG'", RAISES], ids=["crash", "hang", "raised"]
)
def test_on_a_launched_world_what_would_end_it_is_never_launched(place: Path, said: str) -> None:
    known, world = waiver(expect=f"{{ {said} }}"), Launched(2, 1, ("here",))
    driver = checked(place, lambda case, asked: GOOD, known, launched=world)
    assert driver.asked
    assert not any(map(full, driver.asked))
    (waived,) = record(place).waived
    assert (waived.verdict, waived.sampled) == (Verdict.QUARANTINED, 0)
    assert "may end the launched world" in record(place).reason
    (state,) = waiver_states(replace(with_waivers(place, known), launched=world), [PLANNED])
    assert (state.state, state.detail) == ("applied", "quarantined on a launched world")


def test_nothing_more_is_sampled_on_a_world_that_ended(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def script(case: Case, asked: int) -> Outcome:
        if full(case):
            monkeypatch.setattr(ScriptedDriver, "ended", "rank 1 did not answer")
            return WRONG
        return GOOD

    checked(place, script, waiver())
    assert record(place).verdict is Verdict.XFAIL
    assert origins(place).count("waived") == 1


def test_records_tell_which_failures_of_samples_were_expected(place: Path) -> None:
    known = waiver(expect="{ verdict = 'FAIL', check = 'dispatch.*' }", intermittent="true")
    with pytest.raises(ConformanceFailure):
        checked(place, lambda case, asked: (WRONG, OTHER)[case.tokens > 2] if full(case) else GOOD, known)
    ends = [r for r in read_records(place / "records") if isinstance(r, EndRecord) and r.origin == "waived"]
    assert {(end.check, end.expected) for end in ends} >= {("combine.output", False)}
    assert all(end.expected is (end.check == "dispatch.rows") for end in ends)


def test_a_quarantined_region_is_never_launched(place: Path) -> None:
    """Not even as a sample of another waiver, or as a candidate of a reduction."""
    barred = waiver(case="{ tokens = { min = 2, max = 4 } }", expect=None, quarantine="true")
    known = waiver(case="{ tokens = { max = 4 } }", intermittent="true")
    asked: list[Case] = []

    def script(case: Case, number: int) -> Outcome:
        asked.append(case)
        return OTHER if case.tokens >= 2 else GOOD

    with pytest.raises(ConformanceFailure) as caught:
        checked(place, script, barred, known)
    assert caught.value.failure.minimal.tokens == 5
    assert not any(2 <= case.tokens <= 4 for case in asked)


def test_a_quarantined_case_is_no_sample(place: Path) -> None:
    barred = waiver(case="{ tokens = { min = 2 } }", expect=None, quarantine="true")
    known = waiver(case="{ tokens = { min = 1 } }", intermittent="true")
    driver = checked(place, lambda case, asked: GOOD, barred, known)
    assert all(case.tokens < 2 for case in driver.asked)
    assert record(place).waived[0].avoided > 0


def test_what_the_others_are_judged_by_cannot_be_waived(place: Path) -> None:
    yardstick = replace(PLANNED, companion=True)
    with pytest.raises(ConformanceFailure):
        checked(place, loses_full_ranks, waiver(), planned=yardstick)
    assert record(place).verdict is Verdict.INFRA
    (state,) = waiver_states(with_waivers(place, waiver()), [yardstick], [yardstick.cell.label])
    assert state.state == "stale"


@pytest.mark.parametrize(
    ("change", "state", "told"),
    [
        ({}, "applied", ""),
        ({"cell": f"{{ backend = '{WHERE.backend}', hidden = 17 }}"}, "stale", "no cell of any tier"),
        ({"cell": f"{{ backend = '{WHERE.backend}', world_size = 8 }}"}, "idle", "these options leave out"),
        ({"cell": "{ backend = 'mori' }"}, "idle", "not about the backends"),
        ({"run": "{ arch = 'gfx950' }"}, "idle", "arch gfx942"),
    ],
)
def test_a_waiver_that_nothing_can_match_is_stale(place: Path, change: dict[str, str], state: str, told: str) -> None:
    keys = {"cell": f"{{ backend = '{WHERE.backend}' }}", "expect": SAID, **change}
    (found,) = waiver_states(with_waivers(place, entry(**keys)), [PLANNED])
    assert (found.state, found.cells) == (state, int(state == "applied"))
    assert told in found.detail


@pytest.mark.parametrize(
    ("backend", "wanted", "told"),
    [
        ("mori-standin", "world_size = 8, nodes = 4", "a launched world of 8 ranks on 4 nodes"),
        ("mori-standin", "label = '*-ep8-4nodes-*'", "a launched world of 8 ranks on 4 nodes"),
        ("mori", "nodes = 3", "a launched world of 24 ranks on 3 nodes"),
        ("mori", "world_size = 16", "a launched world of several hosts"),
        ("mori-standin", "codec = 'fp4_blockwise'", "only; add run = { arch = 'gfx950' }"),
        ("mori-standin", "hidden = 7168, capacity = 512", "only; add run = { device = 'cuda' }"),
        ("mori-standin", "kernel_type = 'mori_low_latency'", "that these options leave out"),
    ],
)
def test_what_other_machines_have_is_not_stale(place: Path, backend: str, wanted: str, told: str) -> None:
    text = entry(cell=f"{{ backend = '{backend}', {wanted} }}", expect=SAID)
    (found,) = waiver_states(with_waivers(place, text, backend=backend), [])
    assert (found.state, told in found.detail) == ("idle", True), found.detail
    assert HOSTS_VARIABLE not in os.environ


def test_a_waiver_of_the_only_runs_without_its_cells_is_stale(place: Path) -> None:
    text = entry(cell="{ backend = 'mori-standin', codec = 'fp4_blockwise' }", expect=SAID, run="{ arch = 'gfx942' }")
    (found,) = waiver_states(with_waivers(place, text, backend="mori-standin"), [])
    assert found.state == "stale"
