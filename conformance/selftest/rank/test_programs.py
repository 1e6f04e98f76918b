"""Programs and the all-gather backend on 1, 2, 3 and 4 gloo ranks.

Scope: see the two scenario modules; all their scenarios run in one spawn per number of ranks. A pass proves nothing
about devices.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from conformance.selftest.rank import scenarios_allgather, scenarios_programs
from conformance.selftest.reference import ranks

MODULES = (scenarios_allgather.__name__, scenarios_programs.__name__)


@pytest.mark.parametrize("size", [4, 3, 2, 1])
def test_scenarios(size: int, tmp_path: Path) -> None:
    problems = ranks.failures(ranks.run(size, MODULES, tmp_path), MODULES)
    assert not problems, problems


def test_inventory_is_complete() -> None:
    assert [len(ranks.scenarios_of(module)) for module in MODULES] == [4, 9]
