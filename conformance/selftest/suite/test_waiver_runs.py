"""Waivers in whole runs over seeded faults: the exit code, the records and the summary that their user sees.

A fault loses a row of every rank that sends as many tokens as fit; its waiver covers full ranks. A pass does not prove
that a predicate describes a real defect well; its user must.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from conformance.selftest.suite.runs import Run, run
from conformance.selftest.suite.test_waiver_file import entry
from conformance.suite.records import WaiverRecord
from conformance.verdicts import ExitCode, Verdict

#: One cell, of two ranks.
CELL = ("--tier", "smoke", "--ep-sizes", "2", "--kernel-type", "IntraNode", "-k", "round_trip and h64-")
FULL = {"case": "{ class = 'rank at capacity' }", "expect": "{ verdict = 'FAIL', check = 'dispatch.count' }"}
FAULTS = "{ backend = ['conformance.faults:*', 'mori-standin'] }"


def waived(tmp_path: Path, fault: str, *arguments: str, **change: str | None) -> Run:
    """A run of one cell of a faulty backend, or of the genuine double, under one waiver."""
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "known.toml").write_text(entry(**{"cell": FAULTS, **FULL, **change}))
    backend = f"conformance.faults:{fault}" if fault else "mori-standin"
    return run(tmp_path / "out", *CELL, "--backend", backend, "--waivers", str(tmp_path / "known.toml"), *arguments)


def verdict(done: Run) -> Verdict:
    (cell,) = done.cells.values()
    return cell.verdict


def state(done: Run) -> WaiverRecord:
    (found,) = done.opening.waivers
    return found


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["alone", "workers"])
def test_a_known_fault_does_not_end_the_run(tmp_path: Path, workers: tuple[str, ...]) -> None:
    done = waived(tmp_path, "capacity_off_by_one", "--junit-xml", str(tmp_path / "junit.xml"), *workers)
    assert (done.code, verdict(done)) == (ExitCode.OK, Verdict.XFAIL), done.text
    assert "XFAIL: round_trip-conformance.faults:capacity_off_by_one" in done.text
    assert "waiver 1 (ROCm/mori#610): 1 of 1 cells" in done.text
    (told,) = ET.parse(tmp_path / "junit.xml").getroot().iter("skipped")
    assert told.get("type") == "pytest.xfail"
    assert "ROCm/mori#610" in str(told.get("message"))
    assert not list((tmp_path / "out" / "failures").iterdir()), "what is known is no failure to look into"


def test_without_the_fault_the_waiver_is_told(tmp_path: Path) -> None:
    done = waived(tmp_path, "")
    assert (done.code, verdict(done)) == (ExitCode.INCOMPLETE, Verdict.XPASS), done.text
    assert "XPASS: round_trip-mori-standin" in done.text
    assert "0 of 5 waived cases failed as expected" in done.text


def test_another_fault_in_the_same_cell_gates(tmp_path: Path) -> None:
    done = waived(tmp_path, "weight_twice")
    assert (done.code, verdict(done)) == (ExitCode.PRODUCT_FAILURE, Verdict.FAIL), done.text
    assert "FAIL combine.output" in done.text


def test_a_quarantined_cell_is_shown_and_is_no_pass(tmp_path: Path) -> None:
    done = waived(tmp_path, "segfault", case=None, expect=None, quarantine="true")
    assert (done.code, verdict(done)) == (ExitCode.INCOMPLETE, Verdict.QUARANTINED), done.text
    assert done.ends == []
    assert "QUARANTINED: round_trip-conformance.faults:segfault" in done.text
    assert "1 skipped" in done.text


def test_a_region_that_holds_everything_drawn_is_no_pass(tmp_path: Path) -> None:
    """Neither quarantined nor with a failure that stays away."""
    everything = "{ tokens = { min = 0 } }"
    done = waived(tmp_path / "one", "segfault", case=everything, expect=None, quarantine="true")
    assert (done.code, verdict(done)) == (ExitCode.INCOMPLETE, Verdict.QUARANTINED), done.text
    assert done.ends == []
    assert "1 skipped" in done.text
    assert "WAIVED: nothing is left to be drawn of 1 cells" in done.text
    away = waived(tmp_path / "two", "", case=None, intermittent="true")
    assert (away.code, verdict(away)) == (ExitCode.INCOMPLETE, Verdict.MISTRUSTED), away.text
    assert "cells lack" in away.text


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"cell": "{ backend = '*', hidden = 65 }"}, "it covers no cell of any tier"),
        ({"case": "{ tokens = { min = 100000 } }"}, "none of the cases that its cells draw is covered"),
    ],
    ids=["cell", "case"],
)
def test_a_stale_waiver_leaves_the_run_incomplete(tmp_path: Path, change: dict[str, str], told: str) -> None:
    done = waived(tmp_path, "", **change)
    assert (done.code, verdict(done)) == (ExitCode.INCOMPLETE, Verdict.PASS), done.text
    assert f"STALE WAIVER: waiver 1 (ROCm/mori#610): {told}" in done.text


def test_an_idle_waiver_is_told_and_does_not_count(tmp_path: Path) -> None:
    done = waived(tmp_path, "", cell="{ backend = 'mori-standin', world_size = 8 }")
    assert (done.code, verdict(done)) == (ExitCode.OK, Verdict.PASS), done.text
    assert state(done).state == "idle"
    assert "not applied: it covers cells that these options leave out" in done.text


def test_a_replayed_case_keeps_its_waiver(tmp_path: Path) -> None:
    bare = waived(tmp_path, "capacity_off_by_one", cell="{ backend = 'mori' }")
    assert bare.code == ExitCode.PRODUCT_FAILURE, bare.text
    (failure,) = (tmp_path / "out" / "failures").iterdir()
    (tmp_path / "known.toml").write_text(entry(**{"cell": FAULTS, **FULL}))
    again = run(tmp_path / "again", "--replay", str(failure / "case.json"), "--waivers", str(tmp_path / "known.toml"))
    assert (again.code, verdict(again)) == (ExitCode.OK, Verdict.XFAIL), again.text
    assert [end.origin for end in again.ends] == ["waived"]
