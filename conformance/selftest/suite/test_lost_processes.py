"""A run that loses a worker or a rank: nothing is left running, nothing is lost from the records, the rest is run.

Scope: SIGKILL from outside, in whole runs with two workers whose cases wait for a file to go away. A pass does not
prove anything about a machine that goes down.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from conformance.selftest.engine.backends import HOLD_VARIABLE, MODULE, held_mark
from conformance.selftest.engine.helpers import ORPHAN_LIMIT_S, alive, descendants, ranks_of, wait_until
from conformance.selftest.suite.runs import Run, finish, record_files, start
from conformance.suite.summary import Ended, total
from conformance.verdicts import ExitCode, Verdict

ARGUMENTS = ("--tier", "smoke", "--ep-sizes", "1,2", "-n", "2", "--backend", f"{MODULE}:Held")


@dataclass
class Held:
    """A run whose cases wait, and one of its workers with ranks under a case."""

    process: subprocess.Popen[str]
    output: Path
    file: Path
    worker: str
    pid: int

    def let_go(self) -> Run:
        """Have the cases go on, and wait for the run."""
        self.file.unlink()
        return finish(self.process, self.output)


@contextmanager
def held_run(tmp_path: Path) -> Iterator[Held]:
    """A run in the middle of its first cases."""
    output, file = tmp_path / "out", tmp_path / "hold"
    file.write_text("")
    process = start(output, *ARGUMENTS, environment={HOLD_VARIABLE: str(file)})
    try:
        worker, pid = wait_until(lambda: _busy_worker(output, file, process))
        yield Held(process, output, file, worker, pid)
    finally:
        file.unlink(missing_ok=True)
        process.kill()
        process.wait()


def _busy_worker(output: Path, hold: Path, process: subprocess.Popen[str]) -> tuple[str, int] | None:
    """Name and pid of a worker that has two ranks in a case, from the name of its records."""
    assert process.poll() is None, process.communicate()[0]
    for path in sorted(record_files(output)):
        worker, _, pid = path.stem.partition("-")
        if [held_mark(hold, rank).exists() for rank in ranks_of(int(pid))] == [True, True]:
            return worker, int(pid)
    return None


def test_a_killed_worker_is_told_and_the_rest_is_run(tmp_path: Path) -> None:
    with held_run(tmp_path) as held:
        everything = descendants(held.pid)
        assert set(ranks_of(held.pid)) < set(everything)
        os.kill(held.pid, signal.SIGKILL)
        wait_until(lambda: not alive(everything), ORPHAN_LIMIT_S)
        done = held.let_go()
    assert done.code == ExitCode.INFRASTRUCTURE, done.text
    totals = total(done.records, Ended(lost_worker=True))
    (begun,) = totals.unmatched
    assert totals.not_run == [begun.cell], "only the cell that was under way is missing"
    assert f"case {begun.case_id} of {begun.cell} was under way" in done.text
    assert "NOT RUN: 1 cells" in done.text
    assert len(done.cells) == len(done.opening.planned) - 1 >= 3
    assert {cell.verdict for cell in done.cells.values()} == {Verdict.PASS}


def test_a_killed_rank_is_a_crash_with_its_rate_and_the_rest_is_run(tmp_path: Path) -> None:
    with held_run(tmp_path) as held:
        os.kill(ranks_of(held.pid)[-1], signal.SIGKILL)
        done = held.let_go()
    assert done.code == ExitCode.PRODUCT_FAILURE, done.text
    verdicts = [cell.verdict for cell in done.cells.values()]
    assert verdicts.count(Verdict.CRASH) == 1
    assert set(verdicts) == {Verdict.CRASH, Verdict.PASS}
    assert set(done.cells) == set(done.opening.planned), "the run went on"
    assert "CRASH SIGKILL" in done.text
    assert "failed 1 of 61 runs" in done.text
