"""One failure as the user meets it: the report, the replay, and the script that stands alone.

Scope: a backend that loses a row, from the draw to the two commands its report names, and the script of five seeded
faults. A pass does not prove that other failures read as well, nor anything about scripts on a GPU. A changed report is
accepted by copying the text that the test shows into the snapshot.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from conformance.cases import Case, Cell, Explicit, Round, Rows, Values, encode
from conformance.row_cases import Mode
from conformance.selftest.engine.helpers import cell
from conformance.selftest.suite.runs import ROOT, run
from conformance.selftest.suite.test_harness import options
from conformance.suite.cells import PlannedCell
from conformance.suite.failure import ConformanceFailure, Failure
from conformance.suite.harness import Harness
from conformance.suite.records import RecordWriter
from conformance.suite.reproduce import script
from conformance.verdicts import ExitCode

SNAPSHOT = Path(__file__).parent / "snapshots" / "dropped_row.txt"


@pytest.fixture(scope="module")
def failure(tmp_path_factory: pytest.TempPathFactory) -> Failure:
    """What the harness makes of a backend that loses a row."""
    place = tmp_path_factory.mktemp("failure")
    planned = PlannedCell(cell("DropsARow", world_size=2), 20, claimed=True)
    harness = Harness(options(place, planned.cell.backend), RecordWriter(place / "main.jsonl"))
    try:
        with pytest.raises(ConformanceFailure) as caught:
            harness.check(planned)
    finally:
        harness.close()
    return caught.value.failure


def normalised(report: str, failure: Failure) -> str:
    """The report without what depends on the place and on which case happened to fail first."""
    text = report.replace(str(failure.directory), "DIRECTORY")
    return re.sub(r"(runs of case) \w+ \(.*\); reduced in \d+ candidates", r"\1 ID (SIZE); reduced", text)


def test_the_report_reads_as_it_did(failure: Failure) -> None:
    assert SNAPSHOT.is_file(), f"{SNAPSHOT} is missing: a snapshot is checked in, never made by a test"
    assert normalised(failure.report(), failure) == SNAPSHOT.read_text(encoding="utf-8").rstrip("\n")


def test_the_stored_report_is_the_report(failure: Failure) -> None:
    assert (failure.directory / "report.txt").read_text() == failure.report() + "\n"
    assert sorted(path.name for path in failure.directory.iterdir()) == [
        "case.json",
        "original.json",
        "report.txt",
        "reproduce.py",
    ]


def test_the_replay_command_shows_the_same_check(tmp_path: Path, failure: Failure) -> None:
    (line,) = (line for line in failure.report().splitlines() if line.startswith("replay: "))
    words = line.split()[1:]
    assert words[:2] == ["pytest", "conformance"]
    done = run(tmp_path / "out", *words[2:])
    assert done.code == ExitCode.PRODUCT_FAILURE, done.text
    assert failure.headline in done.text
    assert (done.ends[0].verdict, done.ends[0].check) == failure.outcome.key
    assert done.opening.standins == (), "what was replayed is no stand-in, whatever the default backend is"


def test_the_commands_name_the_device_and_the_architecture(failure: Failure) -> None:
    there = replace(failure, device="cuda", arch="gfx950")
    (line,) = (line for line in there.report().splitlines() if line.startswith("replay: "))
    assert line.endswith("/case.json --device cuda --arch gfx950")
    assert isinstance(failure.minimal, Case)
    text = script(failure.minimal, "cuda", "gfx950")
    compile(text, "reproduce.py", "exec")
    assert "DEVICE = sys.argv[1] if len(sys.argv) > 1 else 'cuda'\n" in text
    assert "ARCH = os.environ.get(\"EP_ARCH\", 'gfx950')\n" in text
    assert "else 'cpu'\n" in (failure.directory / "reproduce.py").read_text()


def torchrun(place: Path, case: Case) -> subprocess.Popen[str]:
    """Start the script of a case from another directory: the path of this checkout is all it needs."""
    place.mkdir()
    path = place / "reproduce.py"
    path.write_text(script(case))
    (place / "case.json").write_bytes(encode(case))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(case.cell.world_size), str(path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=place, env=environment
    )


def assert_ends(started: subprocess.Popen[str], case: Case, difference: str = "") -> None:
    """The script found that difference and failed, or agrees if there is to be none."""
    out, err = started.communicate(timeout=60)
    assert started.returncode == bool(difference), out + err
    assert ("DIFFERS" in out) == bool(difference), out
    assert difference in out
    said = out.count("(source rank, token, round)")
    assert said == case.cell.world_size * len(case.rounds), "every rank says what it received"


def case_of(backend: str, kernel_type: str, rows: Rows, values: Values = "integers", rounds: int = 1) -> Case:
    """A case of as many ranks, with two experts each, as there are routings."""
    size, top_k = len(rows), max(len(row) for tokens in rows for row in tokens)
    mode: Mode = "drained" if rounds == 1 else "free-running"
    where = Cell("round_trip", backend, kernel_type, size, 1, 64, 2 * size, top_k, 8, "bfloat16", mode)
    return Case(where, (Round(Explicit(rows), values),) * rounds)


@pytest.mark.parametrize(
    ("backend", "kernel_type", "difference"),
    [("", "", "DIFFERS dispatch.count"), ("reference", "one-level", ""), ("mori-standin", "IntraNode", "")],
    ids=["faulty", "reference", "standin"],
)
def test_the_script_stands_alone(
    tmp_path: Path, failure: Failure, backend: str, kernel_type: str, difference: str
) -> None:
    case = failure.minimal
    assert isinstance(case, Case)
    if backend:
        where = msgspec.structs.replace(case.cell, backend=backend, kernel_type=kernel_type)
        case = msgspec.structs.replace(case, cell=where)
    assert_ends(torchrun(tmp_path / "there", case), case, difference)


@pytest.mark.parametrize(
    ("fault", "rows", "difference"),
    [
        ("dropped_row", (((3,),), ()), "DIFFERS dispatch.rows: missing [(0, 0, 0)]"),
        ("duplicated_row", (((0, 1),),), "DIFFERS dispatch.count: 2 rows in a buffer of 8, wanted 1"),
        ("last_metadata_lost", (((0,), (1,)),), "DIFFERS dispatch.ids: row 1, of rank 0 token"),
        ("weight_twice", (((0,),),), "DIFFERS combine.output: worst at token 0"),
        ("swapped_rows", (((3,), (2,)), ()), "DIFFERS combine.output: worst at token"),
    ],
)
def test_the_script_sees_what_the_suite_sees(tmp_path: Path, fault: str, rows: Rows, difference: str) -> None:
    bad = case_of(f"conformance.faults:{fault}", "IntraNode", rows)
    good = case_of("mori-standin", "IntraNode", rows)
    started = [torchrun(tmp_path / "bad", bad), torchrun(tmp_path / "good", good)]
    assert_ends(started[0], bad, difference)
    assert_ends(started[1], good)


def test_the_script_knows_the_layout_and_random_bits(tmp_path: Path) -> None:
    case = case_of("allgather", "naive", (((3,), (0,)), ((-1,),)), "bits", rounds=2)
    assert_ends(torchrun(tmp_path / "there", case), case)


def test_the_script_of_a_way_of_calling_stands_alone(tmp_path: Path) -> None:
    bad = case_of("conformance.faults:replay_in_other_places", "InterNodeV1", (((0,), (1,)),))
    bad = msgspec.structs.replace(bad, cell=msgspec.structs.replace(bad.cell, modes=("handle",)))
    good = case_of("mori-standin", "InterNodeV1", (((0,), (1,)),))
    good = msgspec.structs.replace(good, cell=msgspec.structs.replace(good.cell, wire="fp8_token"))
    started = [torchrun(tmp_path / "bad", bad), torchrun(tmp_path / "good", good)]
    (failed, told), (passed, said) = ((one, "".join(one.communicate(timeout=60))) for one in started)
    assert (failed.returncode, passed.returncode) == (1, 0), told + said
    assert "rank 0: DIFFERS replay.dispatch.places: 2 of 2 rows are in other places" in told
    assert "rank 0: largest error over bound" in said
