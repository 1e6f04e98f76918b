"""A driver in a process of its own, to be killed: prints the ranks' pids, then sends the case it is told.

Run as a module with the case's file; a line on standard input sends the case. Proves nothing by itself.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from conformance.case_files import decode
from conformance.cases import Case
from conformance.engine.driver import Driver
from conformance.engine.pool import Pool
from conformance.selftest.engine.helpers import case


def main() -> None:
    """Run a good case, print the pids, wait for a line, run the case given, print its outcome and a good one's."""
    asked = decode(Path(sys.argv[1]).read_bytes(), sys.argv[1])
    assert isinstance(asked, Case)
    driver = Driver(asked.cell.backend)
    good = case(asked.cell)
    assert driver.run(good).passed
    assert isinstance(driver._pool, Pool)
    print(json.dumps(driver._pool.pids), flush=True)
    sys.stdin.readline()
    outcome = driver.run(asked, limit_s=600)
    again = driver.run(good)
    print(json.dumps([outcome.verdict, outcome.check, outcome.rank, again.passed]), flush=True)
    driver.close()


if __name__ == "__main__":
    main()
