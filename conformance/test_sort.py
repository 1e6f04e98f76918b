"""Property: the sort of (token, slot) pairs by local expert is the one that there is, entry by entry.

Masks, row counts on the device and every number of rows around a block. A pass proves nothing about the kernels that
read the sort.
"""

from __future__ import annotations

from conformance.suite.cells import PlannedCell
from conformance.suite.harness import Harness

CHECK = "sort"


def test_sort(planned: PlannedCell, harness: Harness) -> None:
    harness.check(planned)
