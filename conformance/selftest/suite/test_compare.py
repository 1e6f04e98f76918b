"""Two runs cell by cell: what became another verdict, what is gone, what rose.

Scope: records that are made up. A pass does not prove that a difference is a regression.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from conformance.selftest.engine.helpers import cell
from conformance.suite.compare import main
from conformance.suite.records import CellRecord, RecordWriter, RunRecord
from conformance.verdicts import Verdict

CELLS = {name: cell(name, world_size=2) for name in ("kept", "broken", "gone", "cut", "new", "risen")}
BEFORE = {
    "kept": (Verdict.PASS, 0.5),
    "broken": (Verdict.PASS, 0.0),
    "gone": (Verdict.PASS, 0.0),
    "cut": (Verdict.PASS, 0.0),
    "risen": (Verdict.PASS, 0.25),
}


def stored(
    place: Path, cells: dict[str, tuple[Verdict, float]], *, planned: tuple[str, ...] = (), tier: str = "gate"
) -> Path:
    """An output directory with one run of cells, and after it a matrix of capabilities."""
    labels = tuple(CELLS[name].label for name in (*cells, *planned))
    for number, own in (("0", labels), ("1", ())):
        directory = place / "records" / number
        directory.mkdir(parents=True)
        writer = RecordWriter(directory / "controller.jsonl")
        writer.write(RunRecord("0", tier, ("b",), (), "cpu", "gfx942", {}, own, ()))
        for name, (verdict, ratio) in cells.items() if own else ():
            reason = "a row is missing\nmore" if verdict is Verdict.FAIL else ""
            writer.write(
                CellRecord(CELLS[name].label, CELLS[name], verdict, True, False, 1, 1, ratio, 0.0, reason=reason)
            )
        writer.close()
    return place


def test_what_differs_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = stored(tmp_path / "before", BEFORE)
    changed = {"broken": (Verdict.FAIL, 2.0), "new": (Verdict.PASS, 0.0), "risen": (Verdict.PASS, 0.75)}
    after = stored(tmp_path / "after", {"kept": (Verdict.PASS, 0.25), **changed}, planned=("cut",))
    assert main([str(before), str(after)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sorted(lines[:4]) == sorted(
        [
            f"PASS -> FAIL: {CELLS['broken'].label}: a row is missing",
            f"PASS -> NOT RUN: {CELLS['cut'].label}",
            f"PASS -> no such cell: {CELLS['gone'].label}",
            f"no such cell -> PASS: {CELLS['new'].label}",
        ]
    )
    assert lines[4:] == [
        f"largest error over bound 0.25 -> 0.75: {CELLS['risen'].label}",
        "2 cells have the same verdict, 4 have not",
    ]


def test_more_cells_are_no_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = stored(tmp_path / "before", BEFORE)
    after = stored(tmp_path / "after", {**BEFORE, "new": (Verdict.PASS, 0.0)}, tier="explore")
    assert main([str(before), str(after / "records" / "0")]) == 0
    assert capsys.readouterr().out.startswith("the runs differ in tier: gate -> explore; ")
    assert main([str(before), str(before)]) == 0


def test_what_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert main([str(tmp_path), str(tmp_path)]) == 2
    assert f"no run at {tmp_path}" in capsys.readouterr().err
