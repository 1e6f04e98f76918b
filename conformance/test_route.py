"""Property: a router's ids are distinct, in range and those of the highest-ranked experts, and its weights are theirs.

Ties within and between groups, equal logits, biases beside which a score is lost, masked experts, rows with nothing but
NaN or -inf beside ordinary ones, numbers of experts that are no powers of two, both sides of every change of path. Ties
may go either way. A pass proves nothing about numbers of experts that were not run.
"""

from __future__ import annotations

from conformance.suite.cells import PlannedCell
from conformance.suite.harness import Harness

CHECK = "route"


def test_route(planned: PlannedCell, harness: Harness) -> None:
    harness.check(planned)
