"""AITER's all-reduce operators through the adapter and the double, on gloo ranks.

Scope: see the two scenario modules; all scenarios of a module run in one spawn per number of ranks. A pass proves
nothing about NCCL, RCCL, AMD hardware or AITER.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from conformance.selftest.reference import ranks
from conformance.selftest.standin import scenarios_custom_all_reduce, scenarios_six_ranks

COMMON, ODD = scenarios_custom_all_reduce.__name__, scenarios_six_ranks.__name__


@pytest.mark.parametrize(("size", "module"), [(8, COMMON), (4, COMMON), (2, COMMON), (6, ODD), (3, ODD)])
def test_scenarios(size: int, module: str, tmp_path: Path) -> None:
    problems = ranks.failures(ranks.run(size, [module], tmp_path), [module])
    assert not problems, problems


def test_inventory_is_complete() -> None:
    assert [len(ranks.scenarios_of(module)) for module in (COMMON, ODD)] == [11, 3]
