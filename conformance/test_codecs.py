"""Property: every 16-bit input is encoded as the format says.

All 65,536 codes of the element type go through every static quantiser at several scales, and every payload is compared
with the bit-level encoding. A pass proves nothing about how a scale is chosen; that is what ``quantise`` is for.
"""

from __future__ import annotations

from conformance.suite.cells import PlannedCell
from conformance.suite.harness import Harness

CHECK = "codecs"


def test_codecs(planned: PlannedCell, harness: Harness) -> None:
    harness.check(planned)
