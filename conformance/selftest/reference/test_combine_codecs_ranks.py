"""The specification of a coded combine on 1, 2 and 4 gloo ranks.

Scope: see the scenario module; all its scenarios run in one spawn per number of ranks. A pass proves nothing about NCCL
or RCCL, or about devices.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from conformance.selftest.reference import ranks, scenarios_combine_codecs

MODULES = (scenarios_combine_codecs.__name__,)


@pytest.mark.parametrize("size", [4, 2, 1])
def test_scenarios(size: int, tmp_path: Path) -> None:
    problems = ranks.failures(ranks.run(size, MODULES, tmp_path), MODULES)
    assert not problems, problems


def test_inventory_is_complete() -> None:
    assert [len(ranks.scenarios_of(module)) for module in MODULES] == [5]
