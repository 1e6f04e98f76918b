"""Every seeded fault of calls in sequence is caught by the gate's sequences and reduced to a minimum as written down.

Scope: each fault on one kernel type, or on the first of several that shows it, through the real adapter, pool, driver
and harness, with the gate's budgets and seeds; and the minima themselves, run alone and without what each of them
needs. A pass says nothing about other orders of calls.
"""

from __future__ import annotations

import msgspec
import pytest

from accelerated.registry import backend
from conformance.cases import Explicit, Round, SequenceCase, SequenceCell
from conformance.engine.driver import Driver, Limits
from conformance.engine.sequence_steps import without
from conformance.faults import SEQUENCE_FAULTS, SequenceFault
from conformance.selftest.faults.conftest import LIMIT_S
from conformance.selftest.faults.test_faults import caught
from conformance.sequence_cases import Check, Poison, Recreate, Replay
from conformance.suite.cells import PlannedCell
from conformance.suite.harness import Harness
from conformance.suite.kinds import legal
from conformance.suite.sequence_plan import planned_sequences, sequence_cell
from conformance.verdicts import Verdict

_TOPOLOGIES = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (8, 1), (8, 2)]
_MINIMA = [(name, check) for name, fault in SEQUENCE_FAULTS.items() for check in fault.minima]


def gate_sequences(fault: SequenceFault) -> list[PlannedCell]:
    """The gate's sequences of a fault's kernel types, narrow ones first."""
    planned = planned_sequences(
        fault.backend,
        backend(fault.backend),
        companion=False,
        tier="gate",
        kernel_types=("IntraNode", "IntraNodeLL", "InterNode", "InterNodeV1", "InterNodeV1LL", "AsyncLL"),
        topologies=_TOPOLOGIES,
    )
    cells = [p for p in planned if isinstance(p, PlannedCell) and isinstance(p.cell, SequenceCell)]
    mine = [p for kind in fault.kernel_types for p in cells if p.cell.kernel_type == kind]
    return sorted(mine, key=lambda p: p.cell.world_size)


@pytest.mark.parametrize("name", SEQUENCE_FAULTS)
def test_fault_is_caught_and_reduced(harness: Harness, name: str) -> None:
    fault = SEQUENCE_FAULTS[name]
    _, failure = caught(harness, gate_sequences(fault))
    assert failure.verdict is Verdict.FAIL
    assert failure.outcome.check in fault.minima, failure.outcome.text
    case, minimum = failure.minimal, fault.minima[failure.outcome.check]
    assert isinstance(case, SequenceCase)
    assert case.sequence == minimum.steps
    assert tuple(r.routing.rows for r in case.rounds if isinstance(r.routing, Explicit)) == minimum.rounds
    cell = case.cell
    assert (cell.world_size, cell.nodes, cell.experts, cell.top_k, cell.mode) == (1, 1, 1, 1, "drained")
    assert (cell.second > 0, cell.modes) == (minimum.second, minimum.modes)
    assert failure.reproduced
    assert not failure.exhausted
    mismatch = failure.outcome.mismatch
    assert mismatch is not None
    assert f"step {mismatch.step}" in failure.report()


def minimal_case(fault: SequenceFault, check: str) -> SequenceCase:
    """The written minimum as a case."""
    minimum = fault.minima[check]
    cell = sequence_cell(fault.backend, fault.kernel_types[0], (1, 1), "drained")
    cell = msgspec.structs.replace(
        cell, experts=1, top_k=1, second=cell.second if minimum.second else 0, modes=minimum.modes
    )
    return SequenceCase(cell, tuple(Round(Explicit(rows)) for rows in minimum.rounds), minimum.steps)


@pytest.mark.parametrize(("name", "check"), _MINIMA)
def test_minimum_shows_the_fault_and_nothing_less_does(name: str, check: str) -> None:
    fault = SEQUENCE_FAULTS[name]
    case = minimal_case(fault, check)
    made = backend(fault.backend)
    assert legal(made, case, "gfx942")
    driver = Driver(fault.backend, limits=Limits(floor_s=LIMIT_S))
    assert driver.run(case).key == (Verdict.FAIL, check)
    for number, step in enumerate(case.sequence):
        if isinstance(step, Check | Poison | Recreate | Replay):
            less = without(case, {number, number + 1} if isinstance(step, Replay) else {number})
            assert driver.run(less).key != (Verdict.FAIL, check), number
    driver.close()


def test_what_is_poisoned_or_looked_at_shows_in_sequences_only() -> None:
    shown = {name for name, fault in SEQUENCE_FAULTS.items() for one in fault.minima.values() if _needs_sequence(one)}
    assert shown == set(SEQUENCE_FAULTS) - {"stale_tail"}


def _needs_sequence(minimum: object) -> bool:
    steps = getattr(minimum, "steps", ())
    kinds = (Check, Poison, Recreate, Replay)
    return bool(getattr(minimum, "second", False)) or any(isinstance(step, kinds) for step in steps)
