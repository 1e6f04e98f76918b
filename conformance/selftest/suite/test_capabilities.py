"""The capability matrix: what is not there is found out by trying, and takes nothing with it that asks.

A pass does not prove that what a matrix calls claimed is right; the run does.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from accelerated.registry import backend
from conformance.engine.driver import Limits
from conformance.selftest.suite.capable_backend import ABSENT, NAME
from conformance.selftest.suite.runs import Run, run
from conformance.selftest.suite.test_harness import options
from conformance.selftest.suite.test_rocm_machine import on_rocm
from conformance.suite.capabilities import Prober, exit_code_of, subjects, tiny
from conformance.suite.controller import plan_of
from conformance.suite.records import Capability, CapabilityRecord, RecordWriter, read_records
from conformance.verdicts import ExitCode

#: What becomes of each kernel type, and a part of the message.
STATES = {
    "works": (Capability.RUNS, ""),
    "unclaimed": (Capability.RUNS, ""),
    "answers wrongly": (Capability.WRONG, "dispatch.count"),
    "refuses": (Capability.REFUSED, "does not like these ids"),
    "lacks": (Capability.NOT_BUILT, "no kernel of that name"),
    "stumbles": (Capability.REFUSED, "no attribute 'data_ptr'"),
    "dies": (Capability.CRASHES, "SIGSEGV during build"),
    "waits": (Capability.HANGS, "no answer during build"),
}


def probed(place: Path, name: str, *kernel_types: str) -> list[CapabilityRecord]:
    """Every combination of some kernel types on two ranks."""
    (place / "records").mkdir()
    chosen = replace(options(place, name), kernel_types=kernel_types, tier="explore")
    found: list[CapabilityRecord] = []
    writer = RecordWriter(place / "records" / "capabilities.jsonl")
    prober = Prober(chosen, (), writer, found.append, Limits(first_s=20.0))
    for planned in subjects(plan_of(chosen)):
        prober.probe(planned, None)
    prober.close()
    assert [r for r in read_records(place / "records") if isinstance(r, CapabilityRecord)] == found
    return found


def test_each_is_tried_and_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("conformance.engine.driver", fromlist=["x"]).BUILD_LIMIT_S, "cpu", 10.0)
    found = {record.kernel_type: record for record in probed(tmp_path, NAME) if not record.manner}
    assert {name: record.state for name, record in found.items()} == {n: state for n, (state, _) in STATES.items()}
    for name, (_, part) in STATES.items():
        assert part in found[name].message, found[name].message
    assert found["unclaimed"].standing == "unclaimed"
    assert exit_code_of(list(found.values()), [NAME]) is ExitCode.PRODUCT_FAILURE


def test_what_works_is_found_after_what_died(tmp_path: Path) -> None:
    found = probed(tmp_path, NAME, "dies", "works")
    plain = [(r.kernel_type, r.state) for r in found if not r.manner]
    assert plain == [("dies", Capability.CRASHES), ("works", Capability.RUNS)]
    varied = [r for r in found if r.manner]
    assert varied
    assert {(r.state, r.tried) for r in varied} == {(Capability.CRASHES, False)}, "not tried once more"


def test_a_library_that_does_not_initialise_is_not_built(tmp_path: Path) -> None:
    (found,) = probed(tmp_path, ABSENT, "works")
    assert found.state is Capability.NOT_BUILT
    assert "no such device" in found.message
    assert exit_code_of([found], [ABSENT]) is ExitCode.INFRASTRUCTURE


def test_every_operator_has_a_small_case(tmp_path: Path) -> None:
    for name in ("reference", "reference+reference"):
        made = backend(name, "gfx942")
        for planned in subjects(plan_of(replace(options(tmp_path, name), tier="explore"))):
            case = tiny(planned, made)
            assert case.cell == planned.cell
            assert 0 < case.tokens <= 4 * planned.cell.world_size or case.cell.check == "compiled", planned.cell.label


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A whole run that asks for the matrix."""
    output = tmp_path_factory.mktemp("matrix")
    kernels = ("works", "unclaimed", "declined", "dies")
    return run(
        output / "out",
        *("--capabilities", "--backend", NAME, "--ep-sizes", "2"),
        *(argument for name in kernels for argument in ("--kernel-type", name)),
    )


def test_a_matrix_is_printed_and_recorded(matrix: Run) -> None:
    assert matrix.code == ExitCode.PRODUCT_FAILURE, matrix.text
    records = [r for r in matrix.records if isinstance(r, CapabilityRecord)]
    states = {(r.kernel_type, r.nodes): (r.standing, r.state, r.tried) for r in records if not r.manner}
    assert states["works", 1] == ("claimed", Capability.RUNS, True)
    assert states["unclaimed", 1] == ("unclaimed", Capability.RUNS, True)
    assert states["declined", 1] == ("refused", Capability.REFUSED, False)
    assert states["dies", 1] == ("claimed", Capability.CRASHES, True)
    assert states["works", 2] == ("refused", Capability.REFUSED, False)
    for part in (f"capabilities of {NAME}", "│ dies", "crashes", "declined on 1 nodes is declined", "SIGSEGV"):
        assert part in matrix.text
    assert matrix.cells == {}
    assert matrix.opening.tier == "capabilities"


def test_a_claim_that_is_not_kept_outranks_what_is_not_known() -> None:
    def record(state: Capability, standing: str = "claimed", backend: str = "b") -> CapabilityRecord:
        return CapabilityRecord(backend, "k", 2, 1, standing, state)

    runs, dies, unknown = record(Capability.RUNS), record(Capability.CRASHES), record(Capability.UNKNOWN)
    assert exit_code_of([runs], ["b"]) is ExitCode.OK
    assert exit_code_of([runs, dies, unknown], ["b"]) is ExitCode.PRODUCT_FAILURE
    assert exit_code_of([runs, unknown], ["b"]) is ExitCode.INFRASTRUCTURE
    assert exit_code_of([runs, record(Capability.CRASHES, "unclaimed")], ["b"]) is ExitCode.OK
    lacks = record(Capability.NOT_BUILT)
    assert exit_code_of([runs, lacks], ["b"]) is ExitCode.PRODUCT_FAILURE, "the library is there"
    assert exit_code_of([record(Capability.RUNS, backend="other"), lacks], ["b", "other"]) is ExitCode.INFRASTRUCTURE
    assert exit_code_of([runs, record(Capability.CRASHES, backend="other")], ["b"]) is ExitCode.OK
    assert exit_code_of([record(Capability.REFUSED, "refused")], ["b"]) is ExitCode.INCOMPLETE


def test_a_missing_mori_is_in_the_matrix(tmp_path: Path) -> None:
    done = on_rocm(tmp_path, "--capabilities", "--backend", "mori", "--ep-sizes", "2", "--kernel-type", "IntraNode")
    assert done.code == ExitCode.INFRASTRUCTURE, done.text
    found = [r for r in done.records if isinstance(r, CapabilityRecord) and r.standing in ("claimed", "unclaimed")]
    assert found
    assert {(r.state, r.tried) for r in found} == {(Capability.NOT_BUILT, False)}
    assert "mori is not installed for this Python" in done.text


@pytest.mark.parametrize("option", [("--tier", "replay"), ("--world", "localhost:1")])
def test_a_matrix_starts_its_own_ranks(tmp_path: Path, option: tuple[str, ...]) -> None:
    done = run(tmp_path / "out", "--capabilities", "--backend", "reference", *option)
    assert done.code == ExitCode.USAGE, done.text
