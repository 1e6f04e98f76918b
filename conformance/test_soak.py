"""Property: many rounds of changing size, back to back on one operator, free-running.

As ``rounds``, with a hundred rounds a case whose token counts swing between full and nearly empty, and ranks that are
late by turns, on GPUs also at production sizes: buffers are reused often and far apart in time, which is what it takes
to see a missing fence. All of it on GPUs and in the explore tier, a single cell in the gate. A pass bounds the rate of
such faults by the number of rounds that ran, which the summary prints, no further.
"""

from __future__ import annotations

from conformance.suite.cells import PlannedCell
from conformance.suite.harness import Harness

CHECK = "soak"


def test_soak(planned: PlannedCell, harness: Harness) -> None:
    harness.check(planned)
