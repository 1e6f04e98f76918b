"""Property: the output of a whole layer is within what both halves' contracts allow, element by element.

Quantise, dispatch, experts and combine on W ranks. Cells with a ``router`` begin with it, and judge it by itself; cells
with ``against`` compare the output bit for bit with that of the same experts behind another exchange. A pass does not
prove that a row took the way it should have, if every way gives the same output.
"""

from __future__ import annotations

from conformance.suite.cells import PlannedCell
from conformance.suite.harness import Harness

CHECK = "layer"


def test_layer(planned: PlannedCell, harness: Harness) -> None:
    harness.check(planned)
