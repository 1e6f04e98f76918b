"""One failure of a row operator as the user meets it: minimum, report, replay, the script that stands alone.

Scope: five backends with one defect each, from the ladder to the two commands that the report names, on one rank and on
two. A pass does not prove that other failures read as well, nor anything about scripts on a GPU.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from conformance.case_files import decode
from conformance.row_cases import Call, Pattern, RowCase, RowCell
from conformance.selftest.suite.row_backends import MODULE
from conformance.selftest.suite.row_cells import NORMAL, row_case, row_cell
from conformance.selftest.suite.runs import ROOT, run
from conformance.selftest.suite.test_harness import options
from conformance.suite.cells import PlannedCell
from conformance.suite.failure import ConformanceFailure, Failure
from conformance.suite.harness import Harness
from conformance.suite.records import RecordWriter
from conformance.suite.reproduce_rows import row_files
from conformance.verdicts import ExitCode, Verdict

QUANTISE = row_cell(hidden=128, capacity=9)
REDUCE = row_cell("fused", hidden=128, capacity=9)


def of(cell: RowCell, factory: str) -> RowCell:
    return msgspec.structs.replace(cell, backend=f"{MODULE}:{factory}")


def found(place: Path, cell: RowCell) -> Failure:
    """What the harness makes of a cell's failure."""
    harness = Harness(options(place, cell.backend), RecordWriter(place / "main.jsonl"))
    try:
        with pytest.raises(ConformanceFailure) as caught:
            harness.check(PlannedCell(cell, 0, claimed=True))
    finally:
        harness.close()
    return caught.value.failure


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Failure:
    return found(tmp_path_factory.mktemp("local"), of(QUANTISE, "last_row_wrong"))


@pytest.fixture(scope="module")
def reduced(tmp_path_factory: pytest.TempPathFactory) -> Failure:
    return found(tmp_path_factory.mktemp("reduced"), of(REDUCE, "second_rank_forgotten"))


def torchrun(script: Path) -> subprocess.Popen[str]:
    """The stored script from another directory, with as many ranks as it asks for."""
    (line,) = (line for line in script.read_text().splitlines() if line.startswith("Run: torchrun"))
    ranks = line.split("--nproc-per-node ")[1].split()[0]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, str(script)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=script.parent, env=environment
    )


def ended(started: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = started.communicate(timeout=100)
    return started.returncode, out, err


def stored(place: Path, case: RowCase) -> Path:
    """The files of a case that nothing was run for."""
    place.mkdir()
    for name, content in row_files(case).items():
        (place / name).write_bytes(content)
    return place / "reproduce.py"


def test_the_minimum_is_the_true_one(local: Failure, reduced: Failure) -> None:
    assert isinstance(local.minimal, RowCase)
    assert isinstance(reduced.minimal, RowCase)
    assert local.outcome.key == (Verdict.FAIL, "quantise.codes")
    assert local.minimal.calls == (Call(3, (Pattern("zero"),)),)
    assert reduced.outcome.key == (Verdict.FAIL, "norm.residual")
    (call,) = reduced.minimal.calls
    assert (call.rows, call.weight, reduced.minimal.cell.world_size) == (2, "ones", 2)
    assert all(
        failure.minimal.cell.hidden == 32 for failure in (local, reduced) if isinstance(failure.minimal, RowCase)
    )
    assert local.reproduced
    assert reduced.reproduced


@pytest.mark.parametrize("which", ["local", "reduced"])
def test_what_is_stored(which: str, request: pytest.FixtureRequest) -> None:
    failure: Failure = request.getfixturevalue(which)
    names = sorted(path.name for path in failure.directory.iterdir())
    assert names == ["case.json", "inputs.npz", "original.json", "report.txt", "reproduce.py"]
    assert decode((failure.directory / "case.json").read_bytes(), "there") == failure.minimal
    assert decode((failure.directory / "original.json").read_bytes(), "there") == failure.original
    report = (failure.directory / "report.txt").read_text()
    assert report == failure.report() + "\n"
    assert isinstance(failure.minimal, RowCase)
    (call,) = failure.minimal.calls
    told = (failure.outcome.check, f"call 0: {call.rows} rows", "rows zero x 2**0", "replay:", "stand-alone:")
    assert not [part for part in told[: 2 if which == "reduced" else 5] if part not in report]
    assert f"EP {failure.minimal.cell.world_size}" in report


def test_the_scripts_stand_alone(tmp_path: Path, local: Failure, reduced: Failure) -> None:
    good = stored(tmp_path / "good", RowCase(REDUCE, (Call(3, (NORMAL,), residual=(NORMAL,), weight="normal"),) * 2))
    scripts = [local.directory / "reproduce.py", reduced.directory / "reproduce.py", good]
    started = [torchrun(script) for script in scripts]
    (code, out, err), second, third = (ended(process) for process in started)
    assert code == 1, out + err
    assert "rank 0 call 0: DIFFERS quantise.codes" in out
    assert "token 2\n" in out or "token 2," in out
    code, out, err = second
    assert code == 1, out + err
    assert all(f"rank {rank} call 0: DIFFERS norm.residual" in out for rank in (0, 1))
    code, out, err = third
    assert code == 0, out + err
    assert out.count("agrees") == 2
    assert out.count("largest error over bound") == 4


def test_the_replays_fail_the_same_way(tmp_path: Path, local: Failure, reduced: Failure) -> None:
    files = [str(failure.directory / "case.json") for failure in (local, reduced)]
    for file, failure in zip(files, (local, reduced), strict=True):
        assert f"replay:      pytest conformance --replay {file}" in failure.report()
    done = run(tmp_path / "out", "--replay", files[0], "--replay", files[1])
    assert done.code == ExitCode.PRODUCT_FAILURE, done.text
    first = {record.case_id: (record.verdict, record.check) for record in reversed(done.ends)}
    assert first == {failure.minimal.id: failure.outcome.key for failure in (local, reduced)}
    assert done.opening.standins == ()


def test_a_failure_of_rows_that_do_not_exist(tmp_path: Path) -> None:
    """The script has to hand over what the suite handed over, poison included."""
    failure = found(tmp_path, of(QUANTISE, "reads_too_far"))
    assert isinstance(failure.minimal, RowCase)
    (call,) = failure.minimal.calls
    assert (call.rows, call.num_rows) == (2, 1)
    code, out, err = ended(torchrun(failure.directory / "reproduce.py"))
    assert code == 1, out + err
    assert "DIFFERS quantise.codes" in out


def test_a_failure_without_rows(tmp_path: Path) -> None:
    """The script gets as far as the backend, which raises."""
    failure = found(tmp_path, of(REDUCE, "refuses_nothing"))
    assert isinstance(failure.minimal, RowCase)
    assert [call.rows for call in failure.minimal.calls] == [0]
    code, out, err = ended(torchrun(failure.directory / "reproduce.py"))
    assert code == 1, out
    assert "RuntimeError: an empty grid was launched" in err


def test_what_is_no_result_is_the_backends_failure(tmp_path: Path) -> None:
    failure = found(tmp_path, of(QUANTISE, "returns_no_result"))
    assert "TypeError" in failure.outcome.check + failure.outcome.text
    assert "is tuple; the interface asks for QuantResult" in failure.report()


def test_a_run_with_such_a_backend_fails(tmp_path: Path) -> None:
    done = run(tmp_path / "out", "--backend", f"{MODULE}:last_row_wrong", "--tier", "smoke", "--ep-sizes", "1")
    assert done.code == ExitCode.PRODUCT_FAILURE, done.text
    assert "FAIL quantise.codes" in done.text
    assert {record.cell.check for record in done.cells.values()} == {"quantise"}


def test_the_script_carries_the_rows_themselves() -> None:
    call = Call(3, (NORMAL, Pattern("ties")), residual=(NORMAL,), weight="normal")
    case = RowCase(REDUCE, (call, Call(0, ())))
    held = np.load(io.BytesIO(row_files(case)["inputs.npz"]))
    named = {f"{name}{index}_{rank}" for name in ("rows", "residual") for index in (0, 1) for rank in (0, 1)}
    assert set(held.files) == named | {"weight0", "weight1"}
    assert held["rows0_0"].shape == (3, 128)
    assert not np.array_equal(held["rows0_0"], held["rows0_1"])
    assert np.array_equal(held["residual0_0"], held["residual0_1"])
    text = row_files(row_case(QUANTISE), "cuda", "gfx950")["reproduce.py"].decode()
    compile(text, "reproduce.py", "exec")
    assert "else 'cuda'\n" in text
    assert "'gfx950'" in text
