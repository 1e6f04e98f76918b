"""What is stored of a failing sequence shows the same failure again: replayed, and by its script under torchrun.

Scope: one fault of one operator and one of two, on one rank each. A pass says nothing about scripts on a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec

from accelerated.registry import backend
from conformance.cases import SequenceCase, encode
from conformance.engine.driver import Driver
from conformance.faults import SEQUENCE_FAULTS
from conformance.selftest.faults.test_sequence_faults import minimal_case
from conformance.selftest.suite.runs import ROOT, run
from conformance.suite.failure import Failure
from conformance.suite.reproduce import script
from conformance.verdicts import ExitCode


def stored(tmp_path: Path, name: str, check: str) -> Failure:
    """The failure of a fault's minimum, as a run would store it."""
    fault = SEQUENCE_FAULTS[name]
    case = minimal_case(fault, check)
    driver = Driver(fault.backend)
    outcome = driver.run(case)
    driver.close()
    made = backend(fault.backend)
    failure = Failure(made.name, made.standin, original=case, minimal=case, outcome=outcome, reproduced=True)
    failure.store(tmp_path / "failures")
    return failure


def torchrun(place: Path, case: SequenceCase) -> subprocess.CompletedProcess[str]:
    """Run the script of a case beside its file."""
    place.mkdir(exist_ok=True)
    (place / "reproduce.py").write_text(script(case))
    (place / "case.json").write_bytes(encode(case))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(case.cell.world_size), str(place / "reproduce.py")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))}
    return subprocess.run(command, capture_output=True, text=True, cwd=place, env=environment, timeout=60, check=False)


def test_the_replay_command_shows_the_same_step(tmp_path: Path) -> None:
    failure = stored(tmp_path, "tail_is_state", "combine.output")
    (line,) = (line for line in failure.report().splitlines() if line.startswith("replay: "))
    done = run(tmp_path / "out", *line.split()[3:])
    assert done.code == ExitCode.PRODUCT_FAILURE, done.text
    assert failure.headline in done.text
    assert "combine on operator 0: " in failure.report()
    assert "at step 2, round 0" in failure.report()
    assert "  step 1: poison tail of step 0" in failure.report()


def test_the_script_stands_alone(tmp_path: Path) -> None:
    failure = stored(tmp_path, "shared_output", "kept.output")
    assert isinstance(failure.minimal, SequenceCase)
    bad = torchrun(failure.directory, failure.minimal)
    assert bad.returncode == 1, bad.stdout + bad.stderr
    assert "rank 0: DIFFERS kept.output: check what step 2 returned: " in bad.stdout
    assert "at step 4, round 0" in bad.stdout
    cell = msgspec.structs.replace(failure.minimal.cell, backend="mori-standin")
    good = torchrun(tmp_path / "good", msgspec.structs.replace(failure.minimal, cell=cell))
    assert good.returncode == 0, good.stdout + good.stderr
    assert "rank 0: largest error over bound" in good.stdout


def test_an_illegal_sequence_is_refused_before_it_runs(tmp_path: Path) -> None:
    case = minimal_case(SEQUENCE_FAULTS["output_in_received"], "kept.output")
    late = (*case.sequence, msgspec.structs.replace(case.sequence[3], of=1))
    path = tmp_path / "case.json"
    path.write_bytes(encode(msgspec.structs.replace(case, sequence=late)))
    done = run(tmp_path / "out", "--replay", str(path))
    assert done.code == ExitCode.USAGE
    assert "check what step 1 returned: operator 0 combined again, at step 4" in " ".join(done.text.split())
