"""Property: scales and codes of a quantiser are the modelled codec's, for every kind of row.

Rows of zeros, subnormals, maxima, midpoints, NaN and infinities beside ordinary ones, magnitudes that differ by row and
by block, empty calls, row counts on the device with poison beyond them, many calls without a host sync. A pass proves
nothing about rows of another length.
"""

from __future__ import annotations

from conformance.suite.cells import PlannedCell
from conformance.suite.harness import Harness

CHECK = "quantise"


def test_quantise(planned: PlannedCell, harness: Harness) -> None:
    harness.check(planned)
