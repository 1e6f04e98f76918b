"""Nothing outlives its driver: ranks and forkserver end with it, even a rank that no signal handler reaches.

Scope: SIGKILL of the driver or of one rank while a case runs. A pass does not prove that device memory is freed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conformance.cases import encode
from conformance.engine.pool import Pool, PoolKey
from conformance.engine.stacks import rank_stack
from conformance.selftest.engine.backends import Defect
from conformance.selftest.engine.helpers import ORPHAN_LIMIT_S, alive, case, cell, descendants, wait_until


@contextmanager
def lone_driver(tmp_path: Path, defect: Defect, rank: int) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A driver whose ranks, given by pid, run a case with a defect."""
    path = tmp_path / "case.json"
    path.write_bytes(encode(case(cell(), defect, rank=rank)))
    command = [sys.executable, "-m", "conformance.selftest.engine.lone_driver", str(path)]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        pids = json.loads(process.stdout.readline())
        process.stdin.write("\n")
        process.stdin.flush()
        # The pool publishes what each rank is doing.
        phase = f"ep-pool-*/phase-{rank}"
        wanted = b"prepare" if defect is Defect.NATIVE_WAIT else b"finalize"
        wait_until(lambda: any(wanted in path.read_bytes() for path in tmp_path.glob(phase)))
        yield process, pids
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            stream.close()


def test_no_rank_and_no_forkserver_outlives_its_driver(tmp_path: Path) -> None:
    with lone_driver(tmp_path, Defect.NATIVE_WAIT, 2) as (driver, ranks):
        everything = descendants(driver.pid)
        servers = sorted(set(everything) - set(ranks))
        assert set(ranks) <= set(everything)
        assert servers, "the ranks are forked from a forkserver"
        driver.kill()
        killed = time.monotonic()
        wait_until(lambda: not alive(everything), ORPHAN_LIMIT_S)
        print(f"4 ranks and {len(servers)} helpers were gone {time.monotonic() - killed:.2f} s after the driver")


def test_a_rank_killed_from_outside_is_a_crash_and_the_pool_is_replaced(tmp_path: Path) -> None:
    with lone_driver(tmp_path, Defect.PYTHON_WAIT, 1) as (driver, ranks):
        os.kill(ranks[3], signal.SIGKILL)
        assert driver.stdout is not None
        assert json.loads(driver.stdout.readline()) == ["CRASH", "SIGKILL", 3, True]
        assert alive(ranks) == [], "the whole pool is replaced"


def test_a_killed_pool_leaves_no_process() -> None:
    pool = Pool(PoolKey(4, "reference"))
    pids = pool.pids
    pool.kill()
    assert alive(pids) == []


def test_a_dead_rank_without_a_trace_is_not_said_to_block_signals(tmp_path: Path) -> None:
    assert rank_stack(tmp_path / "absent.txt", None) == "no stack: the rank ended without leaving one"
