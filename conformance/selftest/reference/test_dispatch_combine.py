"""The specification of dispatch and combine on 1, 2, 3, 4 and 8 gloo ranks.

Scope: see the two scenario modules; all their scenarios run in one spawn per number of ranks. A pass proves nothing
about NCCL or RCCL, or about devices.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from conformance.selftest.reference import ranks, scenarios_combine, scenarios_dispatch

MODULES = (scenarios_dispatch.__name__, scenarios_combine.__name__)


@pytest.mark.parametrize("size", [8, 4, 3, 2, 1])
def test_scenarios(size: int, tmp_path: Path) -> None:
    problems = ranks.failures(ranks.run(size, MODULES, tmp_path), MODULES)
    assert not problems, problems


def test_inventory_is_complete() -> None:
    assert [len(ranks.scenarios_of(module)) for module in MODULES] == [13, 9]
