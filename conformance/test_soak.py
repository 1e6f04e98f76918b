"""Property: many rounds of changing size, back to back on one operator, free-running.

As ``rounds``, with 12 to 24 rounds a case, on GPUs at production sizes: buffers are reused often and far apart in time,
which is what it takes to see a missing fence. Collected on GPUs and in the explore tier. A pass bounds the rate of such
faults by the number of rounds that ran, no further.
"""

from __future__ import annotations

from conformance.suite.cells import PlannedCell
from conformance.suite.harness import Harness

CHECK = "soak"


def test_soak(planned: PlannedCell, harness: Harness) -> None:
    harness.check(planned)
