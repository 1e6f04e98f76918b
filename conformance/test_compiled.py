"""Property: a split norm under ``torch.compile`` computes and lays out what it does without.

Values are judged like any norm's; shapes, strides and element types are compared with the operator's own. A pass proves
nothing about graphs that a framework builds around it.
"""

from __future__ import annotations

from conformance.suite.cells import PlannedCell
from conformance.suite.harness import Harness

CHECK = "compiled"


def test_compiled(planned: PlannedCell, harness: Harness) -> None:
    harness.check(planned)
