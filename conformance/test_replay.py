"""Recorded cases: the regression corpus and stored failures, run exactly as recorded.

Collected only in the replay tier. A pass proves that these inputs work, nothing more.
"""

from __future__ import annotations

from pathlib import Path

from conformance.cases import Case
from conformance.suite.cells import PlannedCell
from conformance.suite.harness import Harness


def test_replay(recorded: tuple[Path, Case, PlannedCell], harness: Harness) -> None:
    _, case, planned = recorded
    harness.replay(case, planned)
