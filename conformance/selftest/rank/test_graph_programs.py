"""Captured calls of the specification and of the all-gather on 2 and 3 gloo ranks, recorded.

Scope: see the scenario module. A pass proves nothing about a device's graphs.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from conformance.selftest.rank import scenarios_graphs
from conformance.selftest.reference import ranks

MODULES = (scenarios_graphs.__name__,)


@pytest.mark.parametrize("size", [3, 2])
def test_scenarios(size: int, tmp_path: Path) -> None:
    problems = ranks.failures(ranks.run(size, MODULES, tmp_path), MODULES)
    assert not problems, problems


def test_inventory_is_complete() -> None:
    assert [len(ranks.scenarios_of(module)) for module in MODULES] == [5]
