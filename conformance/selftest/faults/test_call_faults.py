"""Every seeded fault of a wire, a codec or a way of calling is caught by a cell of the gate and reduced to its minimum.

Scope: faults x kernel types on which they are faults, each in the first of the gate's cells at EP 2 and 4 that asks for
what is wrong, through the real adapter, pool, driver and harness. A pass says nothing about other cells.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from accelerated.registry import backend
from conformance.cases import Case, Cell, Explicit
from conformance.faults import CALL_FAULTS, Fault
from conformance.faults.call_catalogue import has_what_is_wrong
from conformance.selftest.faults.test_faults import caught
from conformance.suite.call_plan import call_cells
from conformance.suite.cells import PlannedCell
from conformance.suite.harness import Harness
from reference.catalogue import KERNEL_TYPES

_TOPOLOGIES = [(2, 1), (2, 2), (4, 1), (4, 2), (8, 1), (8, 2)]
_PLACES = [(name, kind) for name, fault in CALL_FAULTS.items() for kind in KERNEL_TYPES if fault.applies(kind, 1)]


def cells_of(fault: Fault, kernel_type: str) -> list[PlannedCell]:
    """The gate's cells that ask for what is wrong, claimed and narrow ones first.

    Some of what a fault breaks is unclaimed in any case: what would be a finding counts as a failure here.
    """
    made = backend(fault.backend)
    planned = call_cells(
        fault.backend, made, companion=False, tier="gate", kernel_types=KERNEL_TYPES, topologies=_TOPOLOGIES
    )
    cells = [p for p in planned if isinstance(p, PlannedCell) and p.cell.kernel_type == kernel_type]
    wrong = [p for p in cells if isinstance(p.cell, Cell) and has_what_is_wrong(fault, p.cell)]
    ordered = sorted(wrong, key=lambda p: (not p.claimed, p.cell.world_size, p.cell.label))
    return [replace(p, claimed=True) for p in ordered]


@pytest.mark.parametrize(("name", "kernel_type"), _PLACES)
def test_fault_is_caught_and_reduced(harness: Harness, name: str, kernel_type: str) -> None:
    fault = CALL_FAULTS[name]
    _, failure = caught(harness, cells_of(fault, kernel_type))
    assert failure.outcome.key == (fault.verdict, fault.check), failure.outcome.text
    case, minimum = failure.minimal, fault.minimum
    assert isinstance(case, Case)
    cell = case.cell
    assert tuple(r.routing.rows for r in case.rounds if isinstance(r.routing, Explicit)) == minimum.rounds
    assert (cell.world_size, cell.nodes, cell.experts, cell.top_k, cell.mode) == (
        minimum.world_size,
        minimum.nodes,
        minimum.experts,
        minimum.top_k,
        minimum.mode,
    )
    assert (cell.wire, cell.codec, cell.modes) == (minimum.wire, minimum.codec, minimum.modes)
    assert all(r.hidden == 0 and r.delays_ms == () for r in case.rounds)
    assert failure.reproduced
    assert not failure.exhausted


def test_the_gate_has_a_cell_for_every_fault() -> None:
    for name, kernel_type in _PLACES:
        assert cells_of(CALL_FAULTS[name], kernel_type), (name, kernel_type)
