"""One failure as the user meets it: the report, the replay, and the script that stands alone.

Scope: a backend that loses a row, from the draw to the two commands its report names. A pass does not prove that other
failures read as well. A changed report is accepted by copying the text that the test shows into the snapshot.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from conformance.selftest.engine.helpers import cell
from conformance.selftest.suite.runs import ROOT, run
from conformance.selftest.suite.test_harness import options
from conformance.suite.failure import ConformanceFailure, Failure
from conformance.suite.harness import Harness
from conformance.suite.plan import PlannedCell
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


@pytest.mark.parametrize(
    ("backend", "kernel_type", "code"),
    [("", "", 1), ("reference", "one-level", 0), ("mori-standin", "IntraNode", 0)],
    ids=["faulty", "reference", "standin"],
)
def test_the_script_stands_alone(tmp_path: Path, failure: Failure, backend: str, kernel_type: str, code: int) -> None:
    path = failure.directory / "reproduce.py"
    if backend:
        where = msgspec.structs.replace(failure.minimal.cell, backend=backend, kernel_type=kernel_type)
        path = tmp_path / "reproduce.py"
        path.write_text(script(msgspec.structs.replace(failure.minimal, cell=where)))
    size = str(failure.minimal.cell.world_size)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", size, str(path)]
    # From another directory: an installed checkout, or the path of this one, is all it needs.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))}
    done = subprocess.run(torchrun, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert ("DIFFERS" in done.stdout) == bool(code)
    assert done.stdout.count("received (source rank, token, round)") == int(size), "every rank says what it received"
