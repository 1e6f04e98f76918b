"""Every seeded fault of captured calls is caught by a cell of the gate and reduced to its written minimum.

Scope: the faults of the double, each on one kernel type after the other, through the real adapter, recorder, pool,
driver and harness; a warm cell, since what some of them bake in is a warm-up's. The same defects in the collectives
that a GPU captures are shown on a recorder in the rank selftests. A pass says nothing about a device's graphs.
"""

from __future__ import annotations

from typing import Any

import pytest

from accelerated.registry import backend
from conformance.cases import Explicit, GraphCase, GraphCell
from conformance.faults import GRAPH_FAULTS, GraphFault
from conformance.faults.graph_catalogue import BASES
from conformance.selftest.faults.test_faults import caught
from conformance.suite.cells import PlannedCell
from conformance.suite.graph_plan import FORMS, graph_cells
from conformance.suite.harness import Harness
from conformance.verdicts import Verdict
from reference.catalogue import KERNEL_TYPES
from reference.problem import Problem

_DOUBLES = [name for name, fault in GRAPH_FAULTS.items() if fault.base == BASES[0]]
_WARM = [form for form in FORMS if form.warm]


def cells_of(fault: GraphFault, turn: int) -> list[PlannedCell]:
    """A warm cell of explore, at EP 2 or 4, on a kernel type and of a form that take turns."""
    found = graph_cells(
        fault.backend,
        backend(fault.backend),
        companion=False,
        tier="explore",
        kernel_types=(KERNEL_TYPES[turn % len(KERNEL_TYPES)],),
        topologies=[((2, 4)[turn % 2], 1)],
        device="cpu",
    )
    form = _WARM[turn % len(_WARM)]
    return [p for p in found if isinstance(p, PlannedCell) and isinstance(p.cell, GraphCell) and _is(p.cell, form)]


def _is(cell: GraphCell, form: Any) -> bool:
    return (cell.length, cell.halves, cell.warm, cell.mode) == (form.length, form.halves, form.warm, form.mode)


@pytest.mark.parametrize(("turn", "name"), list(enumerate(_DOUBLES)))
def test_fault_is_caught_and_reduced(harness: Harness, turn: int, name: str) -> None:
    fault, minimum = GRAPH_FAULTS[name], GRAPH_FAULTS[name].minimum
    _, failure = caught(harness, cells_of(fault, turn))
    assert failure.outcome.key == (Verdict.FAIL, fault.check), failure.outcome.text
    case = failure.minimal
    assert isinstance(case, GraphCase)
    assert tuple(r.routing.rows for r in case.rounds if isinstance(r.routing, Explicit)) == minimum.rounds
    assert tuple(r.graph for r in case.rounds) == minimum.graphs
    cell = case.cell
    assert (cell.world_size, cell.experts, cell.top_k, cell.mode) == (
        minimum.world_size,
        minimum.world_size,
        1,
        "drained",
    )
    assert (cell.length, cell.halves, cell.warm, case.rebuilt) == (1, False, True, 0)
    assert failure.reproduced, failure.cut_short
    assert not failure.exhausted
    assert failure.failed == failure.repeats


@pytest.mark.parametrize("name", GRAPH_FAULTS)
def test_fault_is_a_backend_with_the_genuine_ones_contract(name: str) -> None:
    fault = GRAPH_FAULTS[name]
    made, genuine = backend(fault.backend), backend(fault.base)
    assert (made.name, made.standin) == (fault.backend, genuine.standin)
    problem = Problem(2, hidden=64, experts=4, top_k=2, capacity=16)
    for kernel_type in genuine.kernel_types:
        assert made.support(problem, kernel_type) == genuine.support(problem, kernel_type)
        assert made.contract(problem, kernel_type) == genuine.contract(problem, kernel_type)


def test_every_defect_is_on_every_base_that_can_have_it() -> None:
    assert len(GRAPH_FAULTS) == 4 * len(BASES) + 1
    assert {fault.base for fault in GRAPH_FAULTS.values()} == set(BASES)
