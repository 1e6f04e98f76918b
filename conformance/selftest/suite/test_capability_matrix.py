"""What a capability matrix holds: every wire, codec and mode by itself, and nothing that is quarantined is launched.

A pass does not prove that a matrix of a real library is complete; what is in the plan is the plan's to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from accelerated.registry import backend
from conformance.cases import Case
from conformance.selftest.suite.capable_backend import LEAVES_BADLY, NAME
from conformance.selftest.suite.runs import Run, run
from conformance.selftest.suite.test_capabilities import probed
from conformance.selftest.suite.test_harness import options
from conformance.selftest.suite.test_waiver_file import entry
from conformance.suite import capabilities, capability_command, controller
from conformance.suite.call_plan import Choice, singles
from conformance.suite.capabilities import Prober, manner, permitted, quarantines, subjects, widened
from conformance.suite.controller import plan_of
from conformance.suite.options import Options
from conformance.suite.records import BeginRecord, Capability, CapabilityRecord, RecordWriter, read_records
from conformance.suite.waivers import read_waivers
from conformance.verdicts import ExitCode


def of(records: Sequence[object]) -> dict[tuple[str, str, int, int], CapabilityRecord]:
    found = [r for r in records if isinstance(r, CapabilityRecord)]
    return {(r.kernel_type, r.manner, r.world_size, r.nodes): r for r in found}


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Run:
    arguments = ("--backend", "mori-standin", "--ep-sizes", "2", "--kernel-type", "InterNodeV1")
    return run(tmp_path_factory.mktemp("matrix") / "out", "--capabilities", *arguments)


def test_every_wire_codec_and_mode_is_tried_by_itself_or_refused(matrix: Run) -> None:
    assert matrix.code == ExitCode.OK, matrix.text
    found = of(matrix.records)
    made = backend("mori-standin", "gfx942")
    for nodes in (1, 2):
        for choice in singles(Choice("InterNodeV1", (2, nodes))):
            cell = choice.cell("mori-standin")
            standing = made.support(cell.problem(), cell.kernel_type).standing.value
            record = found[cell.kernel_type, manner(cell), 2, nodes]
            assert record.standing == standing, cell.label
            assert record.tried == (record.state is Capability.RUNS) == (standing != "refused"), cell.label
    assert "weightless" in matrix.text


def test_no_refusal_of_the_plan_is_left_out(matrix: Run) -> None:
    refused = [r for r in matrix.records if isinstance(r, CapabilityRecord) and r.state is Capability.REFUSED]
    told = {(r.world_size, r.nodes, r.message) for r in refused}
    wanted = {(entry["world_size"], entry["nodes"], entry["reason"]) for entry in planned_refusals(matrix.output)}
    assert wanted
    assert wanted <= told, wanted - told
    assert {r.standing for r in refused} == {"refused", "refused in part"}, "some sizes of what runs are refused"


def planned_refusals(output: Path) -> list[dict[str, object]]:
    chosen = replace(options(output, "mori-standin"), tier="explore", kernel_types=("InterNodeV1",))
    return [vars(entry) for entry in plan_of(chosen).unsupported]


def test_what_is_refused_everywhere_is_refused_in_every_manner(tmp_path: Path) -> None:
    chosen = replace(options(tmp_path, "mori-standin"), tier="explore", kernel_types=("IntraNode",))
    plan = widened(plan_of(chosen), chosen)
    refused = {entry.manner for entry in plan.unsupported if entry.nodes == 2}
    assert refused >= {manner(choice.cell("x")) for choice in singles(Choice("IntraNode", (2, 2)))} | {""}
    held = {manner(planned.cell) for planned in subjects(plan)}
    assert held >= {"fp8_blockwise", "weightless", "expert count"}


def waived(place: Path, *, kernel_types: tuple[str, ...] = ("works", "dies"), **change: str | None) -> Options:
    """Options with a quarantine of what dies, unless it is changed."""
    keys = {"cell": f"{{ backend = '{NAME}', kernel_type = 'dies' }}", "quarantine": "true", "expect": None, **change}
    (place / "known.toml").write_text(entry(**keys))
    chosen = replace(options(place, NAME), kernel_types=kernel_types, tier="explore")
    return replace(chosen, waivers=read_waivers(place / "known.toml"))


def probed_with(place: Path, chosen: Options) -> tuple[list[CapabilityRecord], list[str]]:
    """Plain combinations, and labels of the cells of which a case was begun."""
    (place / "records").mkdir()
    found: list[CapabilityRecord] = []
    prober = Prober(chosen, (), RecordWriter(place / "records" / "capabilities.jsonl"), found.append)
    for planned in subjects(plan_of(chosen)):
        prober.probe(planned, None)
    prober.close()
    begun = [r.cell for r in read_records(place / "records") if isinstance(r, BeginRecord)]
    return [r for r in found if not r.manner], begun


@pytest.mark.parametrize("case", [None, "{ max_tokens = { min = 0 } }"], ids=["cell", "every case"])
def test_what_is_quarantined_is_never_launched(tmp_path: Path, case: str | None) -> None:
    found, begun = probed_with(tmp_path, waived(tmp_path, case=case, run="{ tier = 'gate' }"))
    states = {r.kernel_type: (r.state, r.tried) for r in found}
    assert states == {"works": (Capability.RUNS, True), "dies": (Capability.QUARANTINED, False)}
    assert [label for label in begun if "dies" in label] == []
    (told,) = (r.message for r in found if r.kernel_type == "dies")
    assert told == "waiver 1 (ROCm/mori#610): wrong sums"
    assert capabilities.exit_code_of(found, [NAME]) is ExitCode.OK


def test_another_case_is_tried_where_the_small_one_is_quarantined(tmp_path: Path) -> None:
    cell = f"{{ backend = '{NAME}' }}"
    chosen = waived(tmp_path, kernel_types=("works",), cell=cell, case="{ max_tokens = { max = 1 } }")
    (planned,) = subjects(plan_of(chosen))
    case = permitted(planned, backend(NAME, "gfx942"), quarantines(chosen))
    assert isinstance(case, Case)
    assert max(max(counts) for counts in case.token_counts()) > 1
    (found,), (begun,) = probed_with(tmp_path, chosen)
    assert (found.state, found.case_id, begun) == (Capability.RUNS, case.id, planned.cell.label)


def test_a_failure_of_the_harness_is_not_the_products(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError("made up: no space")

    monkeypatch.setattr(capabilities, "tiny", fails)
    (found,) = probed(tmp_path, NAME, "works")
    assert (found.state, found.message) == (Capability.UNKNOWN, "OSError: made up: no space")
    assert capabilities.exit_code_of([found], [NAME]) is ExitCode.INFRASTRUCTURE


@pytest.mark.parametrize("where", ["plan_of", "new_run_directory", "open_run"])
def test_a_matrix_that_cannot_be_made_is_no_failure_of_the_product(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("made up: the harness fails")

    monkeypatch.setattr(controller, where, fails)
    chosen = replace(options(tmp_path, NAME), kernel_types=("works",))
    assert capability_command.run(chosen) == ExitCode.INFRASTRUCTURE
    assert "RuntimeError: made up: the harness fails" in capsys.readouterr().out


def test_an_unclaimed_backend_that_ends_badly_is_no_broken_claim(tmp_path: Path) -> None:
    ran, ended = probed(tmp_path, LEAVES_BADLY, "one-level")
    assert (ran.state, ended.state) == (Capability.RUNS, Capability.REFUSED)
    assert ended.message.startswith("when its processes ended: ")
    assert {ran.standing, ended.standing} == {"unclaimed"}
    assert capabilities.exit_code_of([ran, ended], [LEAVES_BADLY]) is ExitCode.OK
