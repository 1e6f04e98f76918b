"""Property: any legal order of calls on one or two operators gives every round its result, drained and free-running.

Dispatches and combines of two operators interleaved, replays, token counts that change, an operator destroyed and made
again, late ranks, poison in whatever nobody has promised, and results that have to be what they were when they were
returned. A pass says nothing about orders that were not drawn, nor about calls that differ between ranks.
"""

from __future__ import annotations

from conformance.suite.cells import PlannedCell
from conformance.suite.harness import Harness

CHECK = "sequences"


def test_sequences(planned: PlannedCell, harness: Harness) -> None:
    harness.check(planned)
