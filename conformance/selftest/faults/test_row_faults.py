"""Every seeded fault of a row operator is caught by the gate's cells and reduced to its written minimum.

Scope: faults through the real adapter, pool, driver and harness, on the smallest planned cells of their operator in
which they can show; the stand-in without a fault passes the same cells. A pass proves that these defects are caught
there, on two ranks or the fewest that they need, and nothing about others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import msgspec
import pytest

from accelerated.operators import operators_of
from accelerated.registry import backend
from conformance.engine.driver import Driver
from conformance.faults import ROW_FAULTS, RowFault, RowMinimum, row_replacements
from conformance.faults.row_fault import MinimalCall
from conformance.row_cases import LOGIT_KINDS, NONFINITE, Call, Pattern, RowCase, RowCell
from conformance.selftest.faults.conftest import gate_options
from conformance.selftest.faults.test_faults import caught
from conformance.suite.cells import PlannedCell
from conformance.suite.failure import Failure
from conformance.suite.harness import Harness
from conformance.suite.plan import GATE
from conformance.suite.records import RecordWriter
from conformance.suite.row_plan import row_cells
from conformance.verdicts import Verdict

STANDIN = "aiter-standin"
#: Each candidate costs a compilation, so that these are shown at their minimum and not reduced.
COMPILED = tuple(name for name, fault in ROW_FAULTS.items() if fault.subject == "compiled")
REDUCED = tuple(name for name in ROW_FAULTS if name not in COMPILED)
#: Of these, the smallest cell has float16 rows, which gfx942 stores like everything else; or it has no kinds of rows.
SECOND = ("residual_rounded_twice", "truncated_store", "rounded_store", "tie_broken_outside")

#: Kinds that every row of the ladder shows, or something plainer than what it holds.
_PLAIN = {"zero", "one_hot", "ones", "integers", "normal"}
#: Kinds of logits that every ladder of a router shows.
_TOGETHER = {"ties", *NONFINITE, *LOGIT_KINDS}

Harnesses = Callable[[str], Harness]


@pytest.fixture(scope="module")
def harness_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harnesses]:
    """A harness of the gate on the CPU for an architecture."""
    made: dict[str, Harness] = {}

    def harness(arch: str) -> Harness:
        if arch not in made:
            output = tmp_path_factory.mktemp(arch)
            made[arch] = Harness(gate_options(output, arch), RecordWriter(output / "records.jsonl"))
        return made[arch]

    yield harness
    for one in made.values():
        one.close()


def cells_of(fault: RowFault, name: str) -> list[PlannedCell]:
    """The gate's claimed cells of the property that catches a fault, smallest first, planned for a backend."""
    minimum = fault.minimum
    found = []
    for planned in row_cells(
        name,
        backend(name, fault.arch),
        companion=False,
        tier="gate",
        ep_sizes=(max(2, minimum.world_size),),
        operators=(fault.operator,),
        device="cpu",
    ):
        if not isinstance(planned, PlannedCell) or planned.cell.check != fault.subject or not planned.claimed:
            continue
        cell = planned.cell
        rows = max(call.rows for call in minimum.calls)
        repeats = len(minimum.calls) == 1 or minimum.calls[0].into or cell.mode == "free-running"
        shown = _PLAIN | _TOGETHER if cell.check == "route" else _PLAIN
        missing = planned.short and not {kind for call in minimum.calls for kind in call.kinds} <= shown
        if cell.hidden >= minimum.hidden and cell.capacity >= rows and repeats and not missing:
            found.append(planned)
    return sorted(found, key=lambda p: p.cell.hidden * p.cell.capacity)[: 2 if fault.name in SECOND else 1]


def minimum_of(case: RowCase) -> RowMinimum:
    """What a minimum says about a case."""
    calls = tuple(
        MinimalCall(
            kinds=tuple(p.kind for p in call.patterns),
            rows=call.rows,
            residual=tuple(p.kind for p in call.residual),
            num_rows=call.num_rows,
            weight=call.weight,
            into=call.into,
        )
        for call in case.calls
    )
    return RowMinimum(calls, case.cell.hidden, case.cell.world_size)


def assert_minimal(fault: RowFault, failure: Failure) -> None:
    """The failure is the fault's, at the fault's true minimum, and it was seen again on a fresh pool."""
    assert failure.outcome.key == (Verdict.FAIL, fault.check)
    assert isinstance(failure.minimal, RowCase)
    assert minimum_of(failure.minimal) == fault.minimum
    assert failure.minimal.cell.mode == "drained"
    assert not any(call.delays_ms for call in failure.minimal.calls)
    assert failure.failed == failure.repeats
    assert failure.reproduced
    assert not failure.exhausted


@pytest.mark.parametrize("name", REDUCED)
def test_row_fault_is_caught_and_reduced(harness_of: Harnesses, name: str) -> None:
    fault = ROW_FAULTS[name]
    cells = cells_of(fault, fault.backend)
    planned, failure = caught(harness_of(fault.arch), cells)
    assert planned == cells[-1], "no more cells are run without the fault"
    assert_minimal(fault, failure)
    assert (failure.directory / "reproduce.py").exists()


@pytest.mark.parametrize("name", COMPILED)
def test_fault_that_only_a_compiler_shows(name: str) -> None:
    fault = ROW_FAULTS[name]
    (planned,) = cells_of(fault, fault.backend)
    minimum = fault.minimum
    assert isinstance(planned.cell, RowCell)
    cell = msgspec.structs.replace(planned.cell, hidden=minimum.hidden)
    calls = [
        Call(c.rows, tuple(map(Pattern, c.kinds)), residual=tuple(map(Pattern, c.residual))) for c in minimum.calls
    ]
    driver = Driver(fault.backend, arch=fault.arch)
    few = [msgspec.structs.replace(call, rows=1) for call in calls]
    outcomes = [driver.run(RowCase(cell, tuple(these))) for these in (few, calls)]
    driver.close()
    assert outcomes[0].passed, outcomes[0].text
    assert outcomes[1].key == (Verdict.FAIL, fault.check)


def _genuine() -> dict[str, tuple[str, PlannedCell]]:
    """Architecture and cell by label, of every cell that a fault is caught in, without the fault."""
    planned = [(f.arch, cell) for f in map(ROW_FAULTS.__getitem__, REDUCED) for cell in cells_of(f, STANDIN)]
    return {f"{arch}-{cell.cell.label}": (arch, cell) for arch, cell in planned}


_GENUINE = _genuine()


@pytest.mark.parametrize("label", _GENUINE)
def test_no_false_alarm(harness_of: Harnesses, label: str) -> None:
    arch, planned = _GENUINE[label]
    # The ladder and a drawn case; the gate itself runs the rest.
    harness_of(arch).check(replace(planned, examples=min(planned.examples, 1)))


@pytest.mark.parametrize("name", ROW_FAULTS)
def test_fault_is_a_backend_with_the_standins_contract(name: str) -> None:
    fault = ROW_FAULTS[name]
    made, genuine = backend(fault.backend, fault.arch), backend(STANDIN, fault.arch)
    assert made.name == fault.backend
    assert made.standin
    assert operators_of(made) == operators_of(genuine)
    for planned in cells_of(fault, STANDIN):
        problem = planned.cell.problem()
        assert made.support(problem, fault.operator) == genuine.support(problem, fault.operator)
        assert made.contract(problem, fault.operator) == genuine.contract(problem, fault.operator)


def test_every_fault_replaces_something_and_nothing_else_does() -> None:
    held = [row_replacements.replacements(name) for name in ROW_FAULTS]
    assert all(held)
    assert sum(map(len, row_replacements.everything())) == len(ROW_FAULTS)


def test_one_process_has_one_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_replacements, "_installed", ["maximum_448"])
    with pytest.raises(RuntimeError, match="already has the fault maximum_448; open maximum_224 in another one"):
        row_replacements.load("maximum_224")


def test_every_property_of_row_operators_has_a_fault() -> None:
    assert {fault.subject for fault in ROW_FAULTS.values()} == {
        "codecs",
        "compiled",
        "quantise",
        "norm",
        "allreduce_norm",
        "route",
    }
    assert {slot.check for slot in GATE}.isdisjoint(fault.subject for fault in ROW_FAULTS.values())
