"""Property: every expert is computed on the rank that owns it, with its own weights.

Each case routes tokens so that every global expert is used; ranks hold only the experts that the placement gives them,
by local slot. The result is judged by the dense oracle over global experts, so a wrong owner, a wrong slot or a wrong
global-to-physical table shows. A pass proves nothing about placements with redundant experts.
"""

from __future__ import annotations

from conformance.suite.cells import PlannedCell
from conformance.suite.harness import Harness

CHECK = "placement"


def test_placement(planned: PlannedCell, harness: Harness) -> None:
    harness.check(planned)
