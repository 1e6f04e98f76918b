"""Property: the experts of one rank are within what their declared rounding points allow.

Masks, buffers longer than their valid rows, remote and masked slots, every switch of path, and relations between two
calls. A pass proves nothing about the exchange of rows between ranks.
"""

from __future__ import annotations

from conformance.suite.cells import PlannedCell
from conformance.suite.harness import Harness

CHECK = "experts"


def test_experts(planned: PlannedCell, harness: Harness) -> None:
    harness.check(planned)
