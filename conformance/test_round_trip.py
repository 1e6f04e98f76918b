"""Property: one dispatch and combine, drained.

Every token reaches each rank that owns one of its experts exactly once, bit for bit; combine returns, per token, a sum
inside the interval that formats and contract allow; inputs are left alone. Drained means synchronised after each call:
a pass here proves nothing about back-to-back rounds.
"""

from __future__ import annotations

from conformance.suite.cells import PlannedCell
from conformance.suite.harness import Harness

CHECK = "round_trip"


def test_round_trip(planned: PlannedCell, harness: Harness) -> None:
    harness.check(planned)
