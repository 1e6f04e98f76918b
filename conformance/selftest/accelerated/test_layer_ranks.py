"""Whole layers of pairs of backends on 1, 2 and 4 gloo ranks.

Scope: see :mod:`conformance.selftest.accelerated.scenarios_layers`; one spawn per number of ranks. A pass proves
nothing about hardware.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from conformance.selftest.accelerated import scenarios_layers
from conformance.selftest.reference import ranks

MODULES = (scenarios_layers.__name__,)


@pytest.mark.parametrize("size", [4, 2, 1])
def test_scenarios(size: int, tmp_path: Path) -> None:
    problems = ranks.failures(ranks.run(size, MODULES, tmp_path), MODULES)
    assert not problems, problems


def test_inventory_is_complete() -> None:
    assert len(ranks.scenarios_of(MODULES[0])) == 5
