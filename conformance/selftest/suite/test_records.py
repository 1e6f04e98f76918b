"""Records survive what happens to their writer, and totals are folded from them alone.

A pass does not prove that the disk keeps what it was given.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from conformance.cases import Case, Cell, Explicit, Round
from conformance.suite.records import BeginRecord, CellRecord, EndRecord, Record, RecordWriter, RunRecord, read_records
from conformance.suite.summary import total
from conformance.verdicts import ExitCode, Verdict

CELL = Cell("round_trip", "reference", "one-level", 2, 1, 16, 4, 2, 8, "float32", "drained")
CASE = Case(CELL, (Round(Explicit((((0, 2),), ((1, -1), (3, 3)))), delays_ms=(0, 2)),))
RUN = RunRecord("1", "gate", ("a",), ("a",), "cpu", "gfx942", {"torch": "2"}, ("one", "two"), ({"nodes": 2},))
BEGIN = BeginRecord(CASE.id, "one", "generated", CASE)
END = EndRecord(CASE.id, "one", "generated", Verdict.FAIL, "dispatch.rows", 0.25, 1.5, 3, ("masked slot",))
DONE = CellRecord("one", CELL, Verdict.PASS, True, False, 3, 4, 1.0, 2.0, "why", "where", "what")
EVERY: tuple[Record, ...] = (RUN, BEGIN, END, DONE)


def written(directory: Path, name: str, *records: Record) -> Path:
    path = directory / name
    writer = RecordWriter(path)
    for record in records:
        writer.write(record)
    writer.close()
    return path


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    written(tmp_path, "main-1.jsonl", *EVERY)
    assert list(read_records(tmp_path)) == list(EVERY)


def test_two_writers_of_one_file_do_not_overwrite_each_other(tmp_path: Path) -> None:
    written(tmp_path, "main-1.jsonl", RUN)
    written(tmp_path, "main-1.jsonl", BEGIN)
    assert list(read_records(tmp_path)) == [RUN, BEGIN]


@pytest.mark.parametrize("kept", [1, 20, -1])
def test_a_torn_last_line_is_skipped(tmp_path: Path, kept: int) -> None:
    path = written(tmp_path, "gw0-1.jsonl", RUN, BEGIN)
    lines = path.read_bytes().splitlines(keepends=True)
    # -1 cuts off the newline alone: the record is whole.
    path.write_bytes(lines[0] + lines[1][:kept])
    assert list(read_records(tmp_path)) == ([RUN, BEGIN] if kept == -1 else [RUN])


def test_a_spoilt_line_elsewhere_is_told(tmp_path: Path) -> None:
    path = written(tmp_path, "gw0-1.jsonl", RUN, BEGIN)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0][:20] + b"\n" + lines[1])
    with pytest.raises(ValueError, match=r"gw0-1\.jsonl:1 is not a record"):
        list(read_records(tmp_path))


def test_a_begin_without_an_end_is_kept_though_other_repeats_ended() -> None:
    assert total([RUN, BEGIN, END]).unmatched == []
    assert total([RUN, BEGIN, END, BEGIN]).unmatched == [BEGIN]
    assert total([RUN, BEGIN, BEGIN, END]).unmatched == [BEGIN], "two workers' files, one of them cut off"


def test_a_planned_cell_without_a_record_was_not_run() -> None:
    totals = total([RUN, DONE])
    assert totals.not_run == ["two"]
    assert totals.exit_code is ExitCode.INCOMPLETE
    assert total([RUN, DONE], lost_worker=True).exit_code is ExitCode.INFRASTRUCTURE
