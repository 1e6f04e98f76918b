"""Property: rounds of changing size, back to back on one operator, free-running.

No host sync, no barrier and no collective of the suite's runs between the rounds, and a rank may be late, so a buffer
that is reused too early shows. Every row carries its round, so a stale row is recognised. A pass bounds the rate of
such faults by the number of rounds that ran, no further.
"""

from __future__ import annotations

from conformance.suite.cells import PlannedCell
from conformance.suite.harness import Harness

CHECK = "rounds"


def test_rounds(planned: PlannedCell, harness: Harness) -> None:
    harness.check(planned)
