"""Pools: preload, start, restart, canary, limits, and failures before the first case.

A pass does not prove that the limits fit a machine whose first case compiles kernels.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from conformance.engine.driver import Driver, InfraError, Limits, StartError
from conformance.engine.pool import Pool, PoolKey
from conformance.engine.protocol import Canary
from conformance.selftest.engine.backends import MODULE, Defect
from conformance.selftest.engine.helpers import alive, case, cell
from conformance.verdicts import Verdict


def driver_of(factory: str, **options: object) -> Driver:
    return Driver(f"{MODULE}:{factory}", **options)  # type: ignore[arg-type]


def test_a_pool_starts_preloaded_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    pool = Pool(PoolKey(4, "reference"))
    assert list(tmp_path.iterdir())
    pids = pool.pids
    assert pool.preloaded, "torch was imported in every rank instead of once in the forkserver"
    assert pool.command(Canary, 30.0).alive
    pool.close()
    assert alive(pids) == []
    assert list(tmp_path.glob("ep-pool-*")) == []


def test_restart_time(record_property: Callable[[str, object], None]) -> None:
    """Printed, not judged: it depends on the machine."""
    driver = driver_of("Defective")
    good = case(cell())
    assert driver.run(good).passed
    started = time.monotonic()
    driver.discard()
    assert driver.run(good).passed
    taken = time.monotonic() - started
    driver.close()
    print(f"kill, restart, canary, build and one case on 4 ranks: {taken:.2f} s")
    record_property("restart_s", taken)


def test_a_pool_that_fails_its_canary_is_never_used() -> None:
    driver = driver_of("SpoilsTheGroup")
    with pytest.raises(InfraError, match=r"failed its canary exchange.*HarnessError"):
        driver.run(case(cell("SpoilsTheGroup")))
    assert driver.restarts == 1


def test_a_lost_lockstep_while_building_is_no_pass() -> None:
    driver = driver_of("ForgesAtBuild")
    with pytest.raises(InfraError, match="lost lockstep during build"):
        driver.run(case(cell("ForgesAtBuild")))


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        ("RaisesAtOpen", "(?s)rank 1 raised ValueError during start.*the backend does not like these ids"),
        ("ExitsAtOpen", "rank 1 died of exit code 3 during start"),
    ],
)
def test_a_library_that_does_not_initialise_ends_the_run(factory: str, said: str) -> None:
    with pytest.raises(StartError, match=said):
        driver_of(factory).run(case(cell(factory)))


def test_what_fails_before_the_backend_is_opened_is_infrastructure() -> None:
    hidden = tuple((name, "") for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"))
    driver = driver_of("Defective", device="cuda", environment=hidden)
    with pytest.raises(InfraError, match="the harness failed on rank 0 during start"):
        driver.run(case(cell(world_size=1)))


def test_the_first_case_of_a_pool_has_a_limit_of_its_own() -> None:
    driver = driver_of("Defective", limits=Limits(first_s=3.0, floor_s=1.0, factor=0.0))
    where = cell(world_size=2)
    hanging = case(where, Defect.PYTHON_WAIT)
    try:
        first = driver.run(hanging)
        assert driver.run(case(where)).passed
        later = driver.run(hanging)
    finally:
        driver.close()
    assert first.key == later.key == (Verdict.HANG, "hang")
    assert first.seconds >= 3.0
    assert 1.0 <= later.seconds < 3.0


def test_a_rank_that_dies_between_cases_is_noticed() -> None:
    driver = driver_of("Defective")
    where = cell(world_size=2)
    try:
        assert driver.run(case(where)).passed
        assert isinstance(driver._pool, Pool)
        os.kill(driver._pool.pids[1], signal.SIGKILL)
        outcome = driver.run(case(where, seed=1))
        assert outcome.key == (Verdict.CRASH, "SIGKILL")
        assert outcome.rank == 1
        assert driver.run(case(where)).passed
    finally:
        driver.close()
