"""A failing replay as the user meets it: the replay through the suite, and the script that stands alone.

Scope: a seeded stale capture in the double, on the CPU. It proves nothing about scripts on a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from conformance.cases import Explicit, GraphCase, GraphCell, GraphRound
from conformance.engine.driver import Outcome
from conformance.selftest.suite.runs import ROOT, run
from conformance.suite.failure import Failure
from conformance.verdicts import ExitCode, Verdict

_CELL = GraphCell("graphs", "conformance.faults:stale_capture", "IntraNode", 2, 1, 32, 2, 1, 4, "bfloat16", "drained")
_CASE = GraphCase(_CELL, (GraphRound(Explicit((((1,),), ((0,), (1,)))), graph=0),) * 2, 1)
_CHECK = "graph.dispatch.rows"


def stored(place: Path, case: GraphCase) -> Failure:
    outcome = Outcome(Verdict.FAIL, _CHECK, text="as it was")
    failure = Failure(case.cell.backend, True, case, case, outcome)
    failure.store(place)
    return failure


def test_the_replay_command_shows_the_same_check(tmp_path: Path) -> None:
    failure = stored(tmp_path, _CASE)
    (line,) = (line for line in failure.report().splitlines() if line.startswith("replay: "))
    done = run(tmp_path / "out", *line.split()[3:])
    assert done.code == ExitCode.PRODUCT_FAILURE, done.text
    assert [(end.verdict, end.check) for end in done.ends[:1]] == [(Verdict.FAIL, _CHECK)]


def test_a_replay_is_refused_where_nothing_can_be_captured(tmp_path: Path) -> None:
    cell = msgspec.structs.replace(_CELL, backend="allgather", kernel_type="naive")
    failure = stored(tmp_path, msgspec.structs.replace(_CASE, cell=cell))
    done = run(tmp_path / "out", "--replay", str(failure.directory / "case.json"))
    assert done.code == ExitCode.USAGE, done.text
    assert "calls of allgather cannot be captured on cpu; give --device cuda" in done.text


@pytest.mark.parametrize("name", ["conformance.faults:stale_capture", "mori-standin"])
def test_the_script_stands_alone(tmp_path: Path, name: str) -> None:
    failure = stored(tmp_path, msgspec.structs.replace(_CASE, cell=msgspec.structs.replace(_CELL, backend=name)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))}
    done = subprocess.run(
        [*command, str(failure.directory / "reproduce.py")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=90,
        check=False,
    )
    faulty = name != "mori-standin"
    assert (done.returncode != 0) == faulty, done.stdout + done.stderr
    assert (f"DIFFERS {_CHECK}: " in done.stdout) == faulty, done.stdout
    assert "from another round (rank 0, token 0, round 12)" in done.stdout or not faulty
    assert done.stdout.count("largest error over bound") == 2


def test_the_script_names_the_device(tmp_path: Path) -> None:
    failure = replace(stored(tmp_path, _CASE), device="cuda", arch="gfx950")
    failure.store(tmp_path / "there")
    text = (failure.directory / "reproduce.py").read_text()
    compile(text, "reproduce.py", "exec")
    assert "DEVICE = sys.argv[1] if len(sys.argv) > 1 else 'cuda'\n" in text
