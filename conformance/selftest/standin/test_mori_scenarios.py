"""The MoRI double's codecs, routing handles and graphs on four gloo ranks, scenario by scenario.

Scope: see the scenario modules, whose functions run here in one spawn each. A pass proves nothing about AMD hardware or
about MoRI.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from conformance.selftest.standin import ranks, scenarios_mori_codecs, scenarios_mori_graphs, scenarios_mori_handles

WORLD = 4
MODULES = {module.__name__: module for module in (scenarios_mori_codecs, scenarios_mori_handles, scenarios_mori_graphs)}
SCENARIOS = [
    (name, scenario)
    for name, module in MODULES.items()
    for scenario, value in vars(module).items()
    if getattr(value, "__module__", None) == name and not scenario.startswith("_")
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, list[dict[str, str]]]:
    found = {}
    for module in MODULES:
        names = [scenario for owner, scenario in SCENARIOS if owner == module]
        found[module] = ranks.run(WORLD, module, names, tmp_path_factory.mktemp("ranks"))
    return found


@pytest.mark.parametrize(("module", "scenario"), SCENARIOS, ids=[scenario for _, scenario in SCENARIOS])
def test_scenario(outcomes: Mapping[str, list[dict[str, str]]], module: str, scenario: str) -> None:
    errors = [
        report.get(scenario, f"ended with {report['exit']} before: {report['stderr']}") for report in outcomes[module]
    ]
    assert not any(errors), "\n".join(f"rank {rank}: {error}" for rank, error in enumerate(errors))


def test_inventory_is_complete() -> None:
    assert len(SCENARIOS) == 19
