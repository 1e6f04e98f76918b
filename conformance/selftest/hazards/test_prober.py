"""What does not end as its hazard would is UNTESTED and says how it ended; what does not fit the machine is not tried.

Scope: the prober over pools of the double. A pass does not prove that a device survives a probe.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conformance.hazards import command
from conformance.hazards.catalogue import PROBES
from conformance.hazards.command import exit_code_of, totals
from conformance.hazards.probe import Probe
from conformance.hazards.prober import Patience, Prober
from conformance.selftest.suite.test_harness import options
from conformance.suite.cells import Plan
from conformance.suite.records import HazardBeginRecord, HazardRecord, RecordWriter, read_records
from conformance.verdicts import ExitCode

BAD = "conformance.selftest.hazards.bad_probes"


def bad(name: str, **change: Any) -> Probe:
    """A probe that ends badly; in the catalogue nothing does."""
    return replace(Probe(name, "nowhere", "what nobody expects", "nothing", BAD, world_size=2), **change)


def probed(place: Path, *probes: Probe, **change: Any) -> list[HazardRecord]:
    """What the prober notes of some probes."""
    found: list[HazardRecord] = []
    writer = RecordWriter(place / "hazards.jsonl")
    chosen = replace(options(place, "mori-standin"), **change)
    prober = Prober(chosen, "mori-standin", (), writer, found.append, Patience(3.0, 1.0))
    for probe in probes:
        prober.probe(probe)
    writer.close()
    written = list(read_records(place))
    assert [r for r in written if isinstance(r, HazardRecord)] == found
    assert [r.hazard for r in written if isinstance(r, HazardBeginRecord)] == [r.hazard for r in found if r.tried]
    return found


def test_an_unexpected_end_is_untested_with_its_reason(tmp_path: Path) -> None:
    dead, silent, raised, after = probed(tmp_path, bad("dies"), bad("waits"), bad("raises"), PROBES["weights-disagree"])
    assert {r.state for r in (dead, silent, raised)} == {"UNTESTED"}
    assert "rank 1 died of SIGABRT in look of round 0, last words: nobody expected this" in dead.text
    assert any("bad_probes.py" in stack for stack in dead.stacks), dead.stacks
    assert "no answer from rank 1 in look of round 0" in silent.text
    assert any("bad_probes.py" in stack and "waits" in stack for stack in silent.stacks), silent.stacks
    assert "no kernel for rank 0" in raised.text
    assert any("bad_probes.py" in stack for stack in raised.stacks)
    assert all(r.unexpected for r in (dead, silent, raised))
    assert after.state == "PRESENT", "what came before must not spoil the next probe"
    assert exit_code_of([dead, after], gate=False) is ExitCode.INCOMPLETE


def test_the_same_ends_where_they_are_the_hazard(tmp_path: Path) -> None:
    dead, silent = probed(tmp_path, bad("dies", death="look"), bad("waits", hang="look"))
    assert (dead.state, silent.state) == ("PRESENT", "PRESENT")


def test_a_broken_harness_ends_the_probing(tmp_path: Path) -> None:
    broken, after = probed(tmp_path, bad("no-such-probe"), PROBES["weights-disagree"])
    assert (broken.state, broken.broken) == ("UNTESTED", True)
    assert "no_such_probe" in broken.text
    assert (after.state, after.tried) == ("UNTESTED", False)
    assert "no-such-probe" in after.text
    assert exit_code_of([broken, after], gate=False) is ExitCode.INFRASTRUCTURE


def test_what_does_not_fit_is_not_tried(tmp_path: Path) -> None:
    other, never = found = probed(tmp_path, PROBES["fp4-odd-block"], PROBES["standard-moe-inert"], arch_given=True)
    assert (other.state, other.tried) == (never.state, never.tried) == ("UNTESTED", False)
    assert other.text == "only gfx950 can have it; this is gfx942"
    assert "--arch gfx942" in other.command
    assert exit_code_of(found, gate=True) is ExitCode.INCOMPLETE
    assert totals(found) == "hazards: 0 PRESENT, 0 ABSENT, 2 UNTESTED\nUNTESTED here: fp4-odd-block"


def test_a_machine_with_too_few_gpus(tmp_path: Path) -> None:
    chosen = replace(options(tmp_path, "mori"), device="cuda")
    prober = Prober(chosen, "mori", ("a", "b"), RecordWriter(tmp_path / "hazards.jsonl"), lambda record: None)
    assert prober.fits(PROBES["weights-disagree"])[1] == "it takes 4 GPUs; 2 are visible"
    assert prober.fits(PROBES["wave32-mask-shift"])[1] == "only gfx1250 can have it; this is gfx942"


def test_what_does_not_compile_is_told_before_anything_is_probed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiled(chosen: object, plan: Plan) -> dict[str, str]:
        (planned,) = plan.cells
        kind = planned.cell.kernel_type
        return {kind: "hipcc: no such instruction"} if kind == "AsyncLL" else {}

    monkeypatch.setattr(command, "uncompiled_kernels", compiled)
    chosen = replace(options(tmp_path, "mori"), device="cuda")
    reasons = command.uncompiled(chosen, "mori", [PROBES["weights-required"], PROBES["push-fence"]])
    assert reasons == {"AsyncLL": "AsyncLL does not compile: hipcc: no such instruction"}


def test_a_session_that_does_not_open_with_a_probes_own_variables_stops_nothing_else(tmp_path: Path) -> None:
    strange, after = probed(
        tmp_path, bad("raises", environment=(("MORI_SHMEM_HEAP_SIZE", "much"),)), PROBES["capacity-sized-outputs"]
    )
    assert (strange.state, strange.broken, strange.unexpected) == ("UNTESTED", False, True)
    assert "MORI_SHMEM_HEAP_SIZE" in strange.text
    assert after.state == "PRESENT"


@pytest.mark.parametrize(
    ("states", "gate", "code"),
    [
        (("ABSENT", "PRESENT"), False, ExitCode.OK),
        (("ABSENT", "PRESENT"), True, ExitCode.PRODUCT_FAILURE),
        (("ABSENT", "never"), True, ExitCode.OK),
        (("ABSENT", "UNTESTED"), True, ExitCode.INCOMPLETE),
        (("PRESENT", "UNTESTED"), True, ExitCode.PRODUCT_FAILURE),
        (("ABSENT", "UNTESTED"), False, ExitCode.OK),
        (("ABSENT", "broken"), True, ExitCode.INFRASTRUCTURE),
        (("PRESENT", "broken"), True, ExitCode.PRODUCT_FAILURE),
        (("ABSENT", "unexpected"), False, ExitCode.INCOMPLETE),
        (("UNTESTED",), False, ExitCode.INCOMPLETE),
        ((), True, ExitCode.INCOMPLETE),
    ],
)
def test_exit_codes(states: tuple[str, ...], gate: bool, code: ExitCode) -> None:
    records = [
        HazardRecord(
            "standard-moe-inert" if s == "never" else "push-fence",
            *("mori", "", "UNTESTED" if s.islower() else s, ""),
            tried=s not in ("never", "UNTESTED"),
            broken=s == "broken",
            unexpected=s == "unexpected",
        )
        for s in states
    ]
    assert exit_code_of(records, gate=gate) is code
