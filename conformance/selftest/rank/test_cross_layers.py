"""Layers beside another exchange, and loads, on 1, 2 and 4 gloo ranks; and what the comparison makes of zeros and NaN.

Scope: see :mod:`conformance.selftest.rank.scenarios_cross_layers`; one spawn per number of ranks. A pass proves nothing
about devices.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conformance.rank.judge_experts import judge_equal
from conformance.rank.layer_program import tables_of
from conformance.rank.load_program import judge_load, judge_logical_load, load_of
from conformance.selftest.rank import scenarios_cross_layers
from conformance.selftest.reference import ranks
from conformance.selftest.suite.layer_cells import layer_cell, one
from conformance.suite.layer_coverage import classes, required

MODULES = (scenarios_cross_layers.__name__,)


@pytest.mark.parametrize("size", [4, 2, 1])
def test_scenarios(size: int, tmp_path: Path) -> None:
    problems = ranks.failures(ranks.run(size, MODULES, tmp_path), MODULES)
    assert not problems, problems


def test_inventory_is_complete() -> None:
    assert len(ranks.scenarios_of(MODULES[0])) == 8


@pytest.mark.parametrize(
    ("got", "other", "differs"),
    [
        ([0.0, 1.0], [-0.0, 1.0], False),
        ([torch.inf, 1.0], [torch.inf, 1.0], False),
        ([torch.nan, 1.0], [torch.nan, 1.0], True),
        ([1.0, 1.0], [1.0, 1.0078125], True),
    ],
)
def test_bits_that_count(got: list[float], other: list[float], differs: bool) -> None:
    mine, theirs = (torch.tensor([values], dtype=torch.bfloat16) for values in (got, other))
    found = judge_equal("layer.equal", 2, mine, theirs, ((7,),), 3, "there")
    assert (found is not None) == differs
    if found is not None:
        assert (found.round, found.source_rank, found.token, found.routed) == (2, 3, 0, "[7]")


def test_loads_follow_the_replica_of_each_row() -> None:
    """Of expert 0's two replicas a rank's first token takes the first, its second token the other."""
    cell = layer_cell(world_size=2, experts=4, redundant=2, top_k=1, check="eplb")
    case = one(cell, (0,), (0,), (0,), (1,), physical=(0, 1, 1, 0))
    (table,) = tables_of(case)
    rows = case.rounds[0].routing.rows  # type: ignore[union-attr]
    assert load_of(rows, table, cell).tolist() == [2, 0, 1, 1]
    assert load_of(((), ((0,), (-1,))), table, cell).tolist() == [1, 0, 0, 0]
    assert judge_load(0, torch.tensor([1, 1]), torch.tensor([1, 1]), [2, 3]) is None
    found = judge_load(0, torch.tensor([1, 0]), torch.tensor([1, 1]), [2, 3])
    assert found is not None
    assert found.message.endswith("first at physical expert 3")
    assert judge_logical_load(0, [2, 0, 1, 1], table, rows, 2) is None
    wrong = judge_logical_load(0, [2, 0, 1, 0], table, rows, 2)
    assert wrong is not None
    assert (wrong.got, wrong.wanted) == ("2", "3")


def test_a_cell_of_replicas_needs_a_load_from_another_rank() -> None:
    cell = layer_cell(world_size=2, experts=4, redundant=2, top_k=1, check="eplb")
    assert "load from another rank" in required(cell, short=False, masked=False, quantised=False)
    held = (0, 1, 1, 0)  # physical experts 0 and 1 are rank 0's; its first two tokens take either replica
    assert "load from another rank" not in classes(one(cell, (0,), physical=held))
    assert "load from another rank" in classes(one(cell, (0,), (0,), physical=held))
    assert "load from another rank" not in classes(one(cell, (-1,), physical=held))
