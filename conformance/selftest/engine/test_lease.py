"""Leases: all or nothing, exclusive between processes, released when the holder dies, and never starving the wide.

A pass does not prove that a process outside the suite keeps off a leased device.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from conformance.engine.lease import lease
from conformance.selftest.engine.helpers import wait_until

HOLDER = """
import sys
from pathlib import Path
from conformance.engine.lease import lease
with lease(sys.argv[2].split(","), int(sys.argv[3]), Path(sys.argv[1])) as held:
    print(",".join(held), flush=True)
    sys.stdin.readline()
"""


def holder(directory: Path, names: str, count: int) -> subprocess.Popen[str]:
    """A process that takes a lease, prints what it got, and holds it until a line comes."""
    command = [sys.executable, "-c", HOLDER, str(directory), names, str(count)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def lines_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_two_holders_never_share_and_a_killed_one_releases(tmp_path: Path) -> None:
    with holder(tmp_path, "a,b", 1) as first:
        taken = lines_of(first)
        with lease(["a", "b"], 1, tmp_path) as mine:
            assert {taken, *mine} == {"a", "b"}
        with holder(tmp_path, "a,b", 2) as second:
            # It waits in the queue: nobody else gets past it.
            wait_until(lambda: _locked(tmp_path / "queue"))
            assert second.poll() is None
            first.kill()
            assert sorted(lines_of(second).split(",")) == ["a", "b"]
            second.kill()


def test_more_than_there_are_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 devices are needed, 2 are visible"), lease(["a", "b"], 3, tmp_path):
        pass


def _locked(path: Path) -> bool:
    import fcntl

    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
