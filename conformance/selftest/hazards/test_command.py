"""``--hazards`` as a user gives it: what it prints, what it records, how it ends, and what it refuses.

Scope: whole runs on the double. A pass proves nothing about MoRI, and not that a report tells all there is.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from accelerated.standin.mori_ep.hazards import VARIABLE
from conformance.hazards import command
from conformance.hazards.prober import Prober
from conformance.selftest.engine.helpers import wait_until
from conformance.selftest.suite.runs import Run, finish, run, start
from conformance.selftest.suite.test_harness import options
from conformance.selftest.suite.test_rocm_machine import on_rocm
from conformance.suite.failure import STANDIN_MARK
from conformance.suite.options import hazards_of
from conformance.suite.records import HazardBeginRecord, HazardRecord, read_records
from conformance.verdicts import ExitCode

ON = "weights-disagree,host-assert-kills"
ASKED = ("host-assert-kills", "weights-disagree", "quant-members-refused", "push-fence", "standard-moe-inert")


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    output = tmp_path_factory.mktemp("hazards")
    asked = ("--hazards", ",".join(ASKED), "--backend", "mori-standin")
    return run(output / "out", *asked, environment={VARIABLE: ON})


def test_each_hazard_has_its_verdict(probed: Run) -> None:
    assert probed.code == ExitCode.OK, probed.text
    states = {r.hazard: r.state for r in probed.records if isinstance(r, HazardRecord)}
    assert states == {
        "weights-disagree": "PRESENT",
        "push-fence": "ABSENT",
        "standard-moe-inert": "UNTESTED",
        "quant-members-refused": "ABSENT",
        "host-assert-kills": "PRESENT",
    }
    assert list(states)[-1] == "host-assert-kills", "what may damage the machine comes last"


def test_the_report_tells_what_was_seen_and_how_to_see_it_again(probed: Run) -> None:
    again = f"{VARIABLE}={ON} pytest conformance --hazards weights-disagree --backend mori-standin --device cpu"
    for part in (
        "hazards of mori-standin (STAND-IN):",
        "PRESENT  weights-disagree [7.1#4, 10#17] IntraNode EP 4 gfx942",
        "PRESENT: on rank 3: weights of 0 received rows: 2 of 2 tokens wrong",
        f"again: {again}",
        "ABSENT in 100 rounds (a rate of 3.0% or more is excluded at 95 %)",
        "rank 0 died of SIGABRT in dispatch of round 0, last words: mori stand-in: host assertion",
        "hazards: 2 PRESENT, 2 ABSENT, 1 UNTESTED",
        STANDIN_MARK,
    ):
        assert part in probed.text, part


def test_the_records_hold_the_same(probed: Run) -> None:
    begun = [r.hazard for r in probed.records if isinstance(r, HazardBeginRecord)]
    found = {r.hazard: r for r in probed.records if isinstance(r, HazardRecord)}
    assert begun == [name for name, record in found.items() if record.tried]
    assert set(found) - set(begun) == {"standard-moe-inert"}
    fence = found["push-fence"]
    assert (fence.rounds, fence.times, round(fence.rate, 3)) == (100, 0, 0.030)
    assert all(r.standin and r.backend == "mori-standin" and r.reference for r in found.values())
    assert (probed.opening.tier, probed.opening.standins) == ("hazards", ("mori-standin",))
    assert probed.opening.fingerprint[VARIABLE] == ON
    assert probed.cells == {}


def test_what_is_present_gates_if_asked(tmp_path: Path) -> None:
    done = run(tmp_path / "out", "--hazards", "combine-clears-total", "--gate-hazards", "--backend", "mori-standin")
    assert done.code == ExitCode.PRODUCT_FAILURE, done.text


def test_a_command_that_is_killed_leaves_what_it_wrote(tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = ("--hazards", "weights-disagree,stale-lock-hangs", "--backend", "mori-standin")
    process = start(out, *asked, environment={VARIABLE: "weights-disagree,stale-lock-hangs"})

    def hanging() -> bool:
        files = list(out.glob("records/*/hazards.jsonl"))
        return bool(files) and b'"hazard":"stale-lock-hangs"' in files[0].read_bytes()

    wait_until(hanging)
    process.kill()
    finish(process, out)
    (directory,) = (out / "records").iterdir()
    records = list(read_records(directory))
    assert [r.hazard for r in records if isinstance(r, HazardBeginRecord)] == ["weights-disagree", "stale-lock-hangs"]
    assert [(r.hazard, r.state) for r in records if isinstance(r, HazardRecord)] == [("weights-disagree", "PRESENT")]


def test_a_suite_that_fails_is_no_hazard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python would end with 1, which under ``--gate-hazards`` says PRESENT."""

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Prober, "probe", full)
    chosen = replace(options(tmp_path, "mori-standin"), hazards=("push-fence",), gate_hazards=True)
    assert command.run(chosen) == ExitCode.INFRASTRUCTURE
    assert "INFRA: the suite failed" in capsys.readouterr().out


def test_a_missing_library_is_no_absence(tmp_path: Path) -> None:
    done = on_rocm(tmp_path, "--hazards", "all", "--backend", "mori")
    assert done.code == ExitCode.INFRASTRUCTURE, done.text
    assert "mori is not installed for this Python" in done.text
    assert "ABSENT" not in done.text


def test_an_unknown_name_is_one_line_of_usage(tmp_path: Path) -> None:
    done = run(tmp_path / "out", "--hazards", "weights_disagree")
    assert done.code == ExitCode.USAGE, done.text
    assert "Traceback" not in done.text
    assert "weights_disagree is no hazard; give 'all' or some of async-blockwise-width" in done.text


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"ep_sizes_given": True}, "--ep-sizes"),
        ({"kernel_types": ("IntraNode",)}, "--kernel-type"),
        ({"replay": (Path("case.json"),)}, "--replay"),
        ({"world": "here:1"}, "--world"),
        ({"backends": ("reference", "reference+reference")}, "none of 'reference, reference+reference' is"),
    ],
)
def test_what_a_probe_does_not_take_is_refused(tmp_path: Path, change: dict[str, Any], part: str) -> None:
    with pytest.raises(pytest.UsageError, match=re.escape(part)):
        command.run(replace(options(tmp_path, "mori-standin"), hazards=("push-fence",), **change))


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"--gate-hazards": True}, "--gate-hazards without --hazards"),
        ({"--hazards": "all", "capabilities": True}, "--capabilities"),
        ({"--hazards": " "}, "nothing is no hazard"),
    ],
)
def test_options_that_contradict_each_other(given: dict[str, Any], part: str) -> None:
    with pytest.raises(pytest.UsageError, match=part):
        hazards_of(SimpleNamespace(getoption=given.get))  # type: ignore[arg-type]


def test_the_layers_half_is_probed_once(tmp_path: Path) -> None:
    names = ("mori-standin", "aiter-standin", "mori-standin+aiter-standin")
    assert command.subjects(replace(options(tmp_path, ""), backends=names)) == ("mori-standin",)
