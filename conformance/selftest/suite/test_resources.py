"""Leases and pools of one worker: who gets which GPUs, how long, and what a bad end of a pool is told as.

No GPU is opened: drivers are doubles where devices are named. A pass proves nothing about pools on real devices.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from conformance.cases import Cell
from conformance.engine import lease as lease_module
from conformance.engine.driver import Outcome
from conformance.selftest.engine.helpers import case, cell
from conformance.selftest.suite.test_harness import options
from conformance.suite import resources
from conformance.suite.cells import PlannedCell
from conformance.suite.harness import Harness
from conformance.suite.records import CellRecord, RecordWriter, read_records
from conformance.suite.resources import Resources
from conformance.verdicts import Verdict

FOUR = ("GPU-a", "GPU-b", "GPU-c", "GPU-c")  # two report the same UUID


class IdleDriver(SimpleNamespace):
    """Remembers whether its pool was closed."""

    teardown: Outcome | None = None

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Resources:
    monkeypatch.setattr(lease_module, "lock_directory", lambda: tmp_path)
    monkeypatch.setattr(resources, "Driver", lambda backend, **_: IdleDriver(backend=backend, closed=False))
    return made(tmp_path)


def made(place: Path) -> Resources:
    on_gpu = replace(options(place, "reference"), device="cuda")
    return Resources(on_gpu, FOUR, None, progress=lambda text: None, on_teardown=lambda cell, outcome: None)


def test_two_workers_never_share_a_gpu(worker: Resources, tmp_path: Path) -> None:
    pair = cell("Held", 2)
    with worker.hold(pair, None) as mine, made(tmp_path).hold(pair, None) as other:
        assert len(mine.devices) == len(other.devices) == 2
        assert set(mine.devices) | set(other.devices) == {0, 1, 2, 3}


@pytest.mark.parametrize(("following", "kept"), [(cell("Held", 2), True), (cell("Held", 4), False), (None, False)])
def test_a_pool_is_kept_only_for_a_cell_that_can_use_it(worker: Resources, following: Cell | None, kept: bool) -> None:
    with worker.hold(cell("Held", 2), following) as driver:
        pass
    assert isinstance(driver, IdleDriver)
    assert driver.closed is not kept
    with worker.hold(cell("Held", 2), None) as again:
        assert (again is driver) is kept


def test_a_library_that_does_not_finalise_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "failures").mkdir()
    ending = cell("RaisesAtClose", 2)
    harness = Harness(options(tmp_path, ending.backend), RecordWriter(tmp_path / "main.jsonl"))
    harness.replay(case(ending), PlannedCell(ending, 1, claimed=True))
    harness.close()
    good, bad = (r for r in read_records(tmp_path) if isinstance(r, CellRecord))
    assert good.verdict is Verdict.PASS
    assert bad.verdict is Verdict.FAIL
    assert bad.label == f"teardown after {ending.label}"
    assert "raised ValueError during teardown" in bad.reason
