"""Property: a local norm and its fused quantiser are within what their declared rounding points allow.

Residual out, output and quantised output are judged each by itself. A pass proves nothing about reductions over ranks.
"""

from __future__ import annotations

from conformance.suite.cells import PlannedCell
from conformance.suite.harness import Harness

CHECK = "norm"


def test_norm(planned: PlannedCell, harness: Harness) -> None:
    harness.check(planned)
