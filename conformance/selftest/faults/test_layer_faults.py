"""Every seeded fault of experts and layers is caught by the gate's cells and reduced to its written minimum.

Scope: faults through the real adapters, pool, driver and harness, on the planned cells of their path, two or four ranks
wide; the stand-in without a fault passes the same cells in the gate itself. A pass proves that these defects are caught
there, and nothing about others.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from accelerated.experts import SEPARATOR
from accelerated.layer import split_path
from accelerated.registry import backend
from conformance.cases import Explicit, LayerCase, LayerCell, LayerRound
from conformance.faults import LAYER_FAULTS, LayerFault
from conformance.selftest.faults.conftest import gate_options
from conformance.selftest.faults.test_faults import caught
from conformance.selftest.suite.runs import ROOT
from conformance.suite.cells import PlannedCell
from conformance.suite.failure import Failure
from conformance.suite.harness import Harness
from conformance.suite.plan import make_plan
from conformance.suite.records import RecordWriter
from conformance.verdicts import Verdict

#: What a round of a minimum is where the fault does not need it otherwise.
PLAIN = LayerRound(Explicit(((),)), values="integers", weighting="ones")
_SETTINGS = ("values", "weighting", "tail", "counted", "quantised", "relation")


@pytest.fixture(scope="module")
def harnesses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Harness]]:
    """A harness of the gate on the CPU for each architecture."""
    made = {}
    for arch in ("gfx942", "gfx950"):
        output = tmp_path_factory.mktemp(arch)
        made[arch] = Harness(gate_options(output, arch), RecordWriter(output / "records.jsonl"))
    yield made
    for one in made.values():
        one.close()


def gate_cells(fault: LayerFault) -> list[PlannedCell]:
    """The gate's claimed cells of the property that catches a fault, narrow ones first."""
    whole = SEPARATOR in fault.path
    parts = split_path(fault.path) if whole else None
    plan = make_plan(
        [(fault.backend, backend(fault.backend, fault.arch), False)],
        tier="gate",
        ep_sizes=(2,) if whole else (1,),
        kernel_types=(parts.kernel_type,) if parts else (),
        operators=(parts.operator if parts else fault.path,),
        models=(),
    )
    # What only a comparison with another exchange can see.
    compared = fault.check == "layer.equal"
    cells = [
        p
        for p in plan.cells
        if p.cell.check == fault.subject
        and p.claimed
        and bool(getattr(p.cell, "against", "")) == compared
        and bool(getattr(p.cell, "router", "")) == fault.routed
    ]
    return sorted(cells, key=_plainness)


def _plainness(planned: PlannedCell) -> tuple[int, ...]:
    cell = planned.cell
    assert isinstance(cell, LayerCell)
    return cell.world_size, cell.shared, cell.placement != "linear", cell.intermediate, cell.capacity


def assert_minimal(fault: LayerFault, failure: Failure) -> None:
    """The failure is the fault's, at the fault's true minimum, and it was seen again on a fresh pool."""
    assert failure.outcome.key == (Verdict.FAIL, fault.check)
    case = failure.minimal
    assert isinstance(case, LayerCase)
    found = tuple(r.routing.rows for r in case.rounds if isinstance(r.routing, Explicit))
    if fault.rounds:
        assert found == fault.rounds
    for name, value in fault.cell.items():
        assert getattr(case.cell, name) == value, name
    wanted = {name: fault.settings.get(name, getattr(PLAIN, name)) for name in _SETTINGS}
    for a_round in case.rounds:
        assert {name: getattr(a_round, name) for name in _SETTINGS} == wanted
    assert failure.failed == failure.repeats
    assert failure.reproduced
    assert not failure.exhausted


@pytest.mark.parametrize("name", LAYER_FAULTS)
def test_layer_fault_is_caught_and_reduced(harnesses: dict[str, Harness], name: str) -> None:
    fault = LAYER_FAULTS[name]
    cells = gate_cells(fault)
    assert cells
    _, failure = caught(harnesses[fault.arch], cells)
    assert_minimal(fault, failure)
    assert (failure.directory / "reproduce.py").exists()


@pytest.mark.parametrize("name", LAYER_FAULTS)
def test_fault_is_a_backend_with_its_bases_contract(name: str) -> None:
    fault = LAYER_FAULTS[name]
    made, genuine = backend(fault.backend, fault.arch), backend(fault.base, fault.arch)
    assert made.name == fault.backend
    assert made.standin == genuine.standin
    for planned in gate_cells(fault)[:2]:
        problem = planned.cell.problem()
        assert made.support(problem, planned.cell.kernel_type) == genuine.support(problem, planned.cell.kernel_type)


def test_every_property_of_experts_and_layers_has_a_fault() -> None:
    assert {fault.subject for fault in LAYER_FAULTS.values()} == {"sort", "experts", "layer", "eplb"}
    sorts = {f"sort.{name}" for name in ("layout", "totals", "entries", "weights", "experts", "cleared")}
    checks = {fault.check for fault in LAYER_FAULTS.values()}
    whole = {"layer.output", "layer.equal", "eplb.load", "eplb.replicas"}
    alone = {f"experts.{name}" for name in ("output", "relation", "bits", "shards")}
    assert checks == {"route.weights", *alone, *whole, *sorts}


@pytest.mark.parametrize(
    "name",
    ["weights_ignored", "alone_without_the_last", "local_experts_only", "weights_of_padded_rows", "row_bit_flipped"],
)
def test_the_stand_alone_script_shows_it(harnesses: dict[str, Harness], name: str) -> None:
    fault = LAYER_FAULTS[name]
    _, failure = caught(harnesses[fault.arch], gate_cells(fault))
    ranks = failure.minimal.cell.world_size
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    script = str(failure.directory / "reproduce.py")
    done = subprocess.run([*command, script], capture_output=True, text=True, check=False, timeout=120, cwd=ROOT)
    assert done.returncode == 1
    assert f"DIFFERS {fault.check}" in done.stdout
    assert "rank 0: largest error over bound" in done.stdout
