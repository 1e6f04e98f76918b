"""Property: replicas of experts, wherever they lie, and moves of their weights leave a layer's output what it was.

Placements are drawn and change between rounds; the judge knows of logical experts only. The load that each rank counts
must be that of all ranks' tokens. A pass proves nothing about the balance of a placement.
"""

from __future__ import annotations

from conformance.suite.cells import PlannedCell
from conformance.suite.harness import Harness

CHECK = "eplb"


def test_eplb(planned: PlannedCell, harness: Harness) -> None:
    harness.check(planned)
