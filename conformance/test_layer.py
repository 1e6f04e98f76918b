"""Property: the output of a whole layer is within what both halves' contracts allow, element by element.

Quantise, dispatch, experts and combine on W ranks. A pass does not prove that a row took the way it should have, if
every way gives the same output.
"""

from __future__ import annotations

from conformance.suite.cells import PlannedCell
from conformance.suite.harness import Harness

CHECK = "layer"


def test_layer(planned: PlannedCell, harness: Harness) -> None:
    harness.check(planned)
