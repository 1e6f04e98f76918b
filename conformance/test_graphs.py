"""Property: dispatch, experts and combine captured in graphs, and replayed with other contents and another routing.

One to three graphs of different sizes are captured on a new operator, cold or after a warm-up, and replayed in any
order with eager rounds between them; a graph holds a round, its halves apart, or two or three rounds. What every replay
delivers must be what an eager round would have: a replay that does nothing, repeats what was captured, or takes another
graph's buffers shows. In the end everything is released and the operator dropped, captured anew and replayed. What a
pass does not prove: that replays which overlap on several streams, or a process whose first launch of a kernel is
captured, work; and where a double's calls are recorded, nothing about a device's graphs.
"""

from __future__ import annotations

from conformance.suite.cells import PlannedCell
from conformance.suite.harness import Harness

CHECK = "graphs"


def test_graphs(planned: PlannedCell, harness: Harness) -> None:
    harness.check(planned)
