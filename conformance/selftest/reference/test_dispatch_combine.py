"""The specification of dispatch and combine on 1, 2, 3, 4 and 8 gloo ranks, scenario by scenario.

Scope: see the two scenario modules; each runs in one spawn per number of ranks. A pass proves nothing about NCCL or
RCCL, or about devices.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from conformance.selftest.reference import ranks, scenarios_combine, scenarios_dispatch

SIZES = (1, 2, 3, 4, 8)
MODULES = (scenarios_dispatch.__name__, scenarios_combine.__name__)
SCENARIOS = [(size, module, name) for size in SIZES for module in MODULES for name in ranks.scenarios_of(module)]

Outcomes = Mapping[tuple[int, str], list[dict[str, str]]]


class _Runs(dict[tuple[int, str], list[dict[str, str]]]):
    """Outcomes by (number of ranks, module), each run when it is first asked for."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self._factory = factory

    def __missing__(self, key: tuple[int, str]) -> list[dict[str, str]]:
        self[key] = ranks.run(*key, self._factory.mktemp("ranks"))
        return self[key]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return _Runs(tmp_path_factory)


@pytest.mark.parametrize(("size", "module", "scenario"), SCENARIOS, ids=[f"{s}-{n}" for s, _, n in SCENARIOS])
def test_scenario(outcomes: Outcomes, size: int, module: str, scenario: str) -> None:
    problems = ranks.failures(outcomes[size, module], scenario)
    assert not problems, problems


def test_inventory_is_complete() -> None:
    assert len(SCENARIOS) == len(SIZES) * (11 + 9)
