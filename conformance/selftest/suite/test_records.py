"""Records survive what happens to their writer, and totals are folded from them alone.

A pass does not prove that the disk keeps what it was given.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from conformance.cases import Case, Cell, Explicit, Round
from conformance.suite.records import BeginRecord, CellRecord, EndRecord, Record, RecordWriter, RunRecord, read_records
from conformance.suite.summary import YARDSTICK_OFF, Ended, total
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
    assert total([RUN, DONE], Ended(lost_worker=True)).exit_code is ExitCode.INFRASTRUCTURE


def test_a_short_write_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: whole(fd, bytes(data)[:7]))
    written(tmp_path, "main-1.jsonl", *EVERY)
    assert list(read_records(tmp_path)) == list(EVERY)


@pytest.mark.parametrize("full", ["device", "nothing taken"])
def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str) -> None:
    writer = RecordWriter(Path("/dev/full") if full == "device" else tmp_path / "main-1.jsonl")
    if full != "device":
        monkeypatch.setattr(os, "write", lambda fd, data: 0)
    with pytest.raises(OSError, match=r"records cannot be written to .*make room"):
        writer.write(RUN)
    monkeypatch.undo()
    writer.close()


def record_of(label: str, backend: str, verdict: Verdict, *, companion: bool = False, reason: str = "") -> CellRecord:
    cell = msgspec.structs.replace(CELL, backend=backend)
    return msgspec.structs.replace(DONE, label=label, cell=cell, verdict=verdict, companion=companion, reason=reason)


INTERRUPTED = record_of("one", "a", Verdict.NOT_RUN)


@pytest.mark.parametrize("origin", ["generated", "replay"])
@pytest.mark.parametrize("after", [(), (BEGIN,), (INTERRUPTED,)], ids=["ended", "under way", "interrupted"])
def test_a_failure_whose_analysis_was_cut_off_counts(origin: str, after: tuple[Record, ...]) -> None:
    end = msgspec.structs.replace(END, origin=origin)
    totals = total([RUN, BEGIN, end, *after], Ended(lost_worker=True, interrupted=True))
    (cell,) = totals.cells
    assert (cell.label, cell.verdict) == ("one", Verdict.FAIL)
    assert CASE.id in cell.reason
    assert totals.not_run == ["two"]
    assert totals.exit_code is ExitCode.PRODUCT_FAILURE


def test_a_sample_that_failed_in_another_way_than_its_waiver_says_counts() -> None:
    unexpected = msgspec.structs.replace(END, origin="waived")
    assert total([RUN, BEGIN, unexpected], Ended(lost_worker=True)).exit_code is ExitCode.PRODUCT_FAILURE
    expected = msgspec.structs.replace(unexpected, expected=True)
    assert total([RUN, BEGIN, expected], Ended(lost_worker=True)).exit_code is ExitCode.INFRASTRUCTURE


def test_what_was_cut_off_and_does_not_gate_stays_so() -> None:
    assert total([RUN, BEGIN, msgspec.structs.replace(END, origin="reduction")]).not_run == ["one", "two"]
    unclaimed = msgspec.structs.replace(RUN, unclaimed=("one",))
    assert total([unclaimed, BEGIN, END]).exit_code is ExitCode.INCOMPLETE
    yardstick = msgspec.structs.replace(RUN, yardsticks=("one",))
    assert total([yardstick, BEGIN, END]).exit_code is ExitCode.INFRASTRUCTURE


def test_what_a_spoilt_yardstick_judged_is_void() -> None:
    reason = f"{YARDSTICK_OFF} with the oracle: FAIL combine"
    off = record_of("one", "reference", Verdict.INFRA, companion=True, reason=reason)
    failed = record_of("two", "mori", Verdict.FAIL)
    wider = msgspec.structs.replace(failed, label="three", cell=msgspec.structs.replace(failed.cell, world_size=4))
    totals = total([RUN, failed, off])
    assert totals.exit_code is ExitCode.INFRASTRUCTURE
    (void,) = (c for c in totals.cells if c.label == "two")
    assert void.verdict is Verdict.INFRA
    assert void.reason.startswith(reason)
    assert total([RUN, off, failed, wider]).exit_code is ExitCode.PRODUCT_FAILURE, "another EP size stands"
    subject = msgspec.structs.replace(off, companion=False)
    assert total([RUN, failed, subject]).exit_code is ExitCode.PRODUCT_FAILURE, "no yardstick"


def test_a_failed_item_without_a_failed_cell_is_ours() -> None:
    passed: list[Record] = [RUN, DONE, record_of("two", "a", Verdict.PASS)]
    totals = total(passed, Ended(failed={"test[one]": "one", "gw0 crashed": ""}))
    assert totals.strays == ["test[one]", "gw0 crashed"]
    assert totals.exit_code is ExitCode.INFRASTRUCTURE
    failed: list[Record] = [RUN, DONE, record_of("two", "a", Verdict.FAIL)]
    assert total(failed, Ended(failed={"test[two]": "two"})).strays == []
    twice = Ended(failed={"test[first]": "two", "test[second]": "two"})
    assert total(failed, twice).strays == ["test[second]"], "two recorded cases of one cell"
