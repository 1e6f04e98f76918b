"""Property: AllReduce + residual add + RMSNorm is within its declared rounding points, alike on every rank.

Every rank has rows of its own, so a wrong rank, a wrong order and a stale buffer show; row counts lie on both sides of
every one at which the backend changes its path. A pass proves nothing about sizes beyond those planned.
"""

from __future__ import annotations

from conformance.suite.cells import PlannedCell
from conformance.suite.harness import Harness

CHECK = "allreduce_norm"


def test_allreduce_norm(planned: PlannedCell, harness: Harness) -> None:
    harness.check(planned)
