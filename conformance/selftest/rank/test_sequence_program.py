"""The program of a sequence on gloo ranks: every kind of step passes where it should, and failures name their step.

Scope: two ranks, the double, the reference and the all-gather through the engine; which fault each kind of step brings
out is the business of the seeded faults. A pass says nothing about devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec
import pytest

from accelerated.registry import backend
from conformance.cases import SequenceCase
from conformance.engine.driver import Driver, Limits, _progress
from conformance.row_cases import Mode
from conformance.selftest.suite.sequence_examples import every_step, replays
from conformance.sequence_cases import Check, Combine, Delay, Dispatch, Poison, Sequence
from conformance.suite.kinds import legal
from conformance.verdicts import Verdict

MODES: tuple[Mode, ...] = ("drained", "free-running")
FAULT = "conformance.faults:shared_output"


@pytest.fixture(scope="module")
def drivers() -> Iterator[Callable[[str], Driver]]:
    """One driver for each backend."""
    made: dict[str, Driver] = {}

    def driver(name: str) -> Driver:
        return made.setdefault(name, Driver(name, limits=Limits(floor_s=20.0)))

    yield driver
    for one in made.values():
        one.close()


def runnable(case: SequenceCase) -> SequenceCase:
    """The case without poison that its backend's contract has no place for."""
    made = backend(case.cell.backend)
    if legal(made, case, "gfx942"):
        return case
    steps = tuple(Check(s.of) if isinstance(s, Poison) and s.what == "tail" else s for s in case.sequence)
    return msgspec.structs.replace(case, sequence=steps)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("name", "kernel_type"),
    [("mori-standin", "IntraNode"), ("mori-standin", "AsyncLL"), ("reference", "one-level"), ("allgather", "naive")],
)
def test_every_kind_of_step_passes(drivers: Callable[[str], Driver], name: str, kernel_type: str, mode: Mode) -> None:
    case = runnable(every_step(name, kernel_type, mode))
    for _ in range(2):  # the second time on operators that are made anew
        outcome = drivers(name).run(case)
        assert outcome.passed, outcome.text


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "kernel_type"), [("mori-standin", "InterNodeV1"), ("reference", "one-level")])
def test_replays_of_the_last_round_and_of_an_older_one_pass(
    drivers: Callable[[str], Driver], name: str, kernel_type: str, mode: Mode
) -> None:
    outcome = drivers(name).run(replays(name, kernel_type, mode))
    assert outcome.passed, outcome.text


@pytest.mark.parametrize("mode", MODES)
def test_a_replay_into_other_places_is_named(drivers: Callable[[str], Driver], mode: Mode) -> None:
    name = "conformance.faults:replay_in_other_places"
    outcome = drivers(name).run(replays(name, "InterNodeV1", mode))
    assert outcome.key == (Verdict.FAIL, "replay.dispatch.places"), outcome.text


def test_what_a_backend_gives_away_may_be_looked_at_for_ever(drivers: Callable[[str], Driver]) -> None:
    case = every_step("allgather", "naive", "free-running")
    late: Sequence = (Dispatch(0, 0), Combine(0), Dispatch(0, 1), Combine(0), Check(0), Check(1), Check(2))
    case = msgspec.structs.replace(case, rounds=case.rounds[:2], sequence=late)
    assert legal(backend("allgather"), case, "gfx942")
    assert drivers("allgather").run(case).passed


def test_a_delayed_rank_is_late(drivers: Callable[[str], Driver]) -> None:
    case = every_step("mori-standin", "IntraNode", "drained")
    late: Sequence = (Delay(1, 90), Dispatch(0, 0), Combine(0))
    outcome = drivers("mori-standin").run(msgspec.structs.replace(case, rounds=case.rounds[:1], sequence=late))
    assert outcome.passed
    assert outcome.seconds > 0.09


def test_the_rank_that_is_at_an_earlier_step_holds_the_others_up() -> None:
    phases = ["finalize at step 3 of round 2", "prepare at step 7 of round 0", "finalize at step 7 of round 0"]
    assert sorted(phases, key=_progress) == phases


@pytest.mark.parametrize("mode", MODES)
def test_a_failure_names_its_step_and_what_changed(drivers: Callable[[str], Driver], mode: Mode) -> None:
    case = every_step(FAULT, "IntraNode", mode)
    steps: Sequence = (Dispatch(0, 0), Dispatch(1, 1), Combine(0), Check(2), Combine(1), Check(2))
    case = msgspec.structs.replace(case, rounds=case.rounds[:2], sequence=steps)
    if mode == "free-running":  # the double shares what is large enough
        case = msgspec.structs.replace(case, cell=msgspec.structs.replace(case.cell, second=16))
    outcome = drivers(FAULT).run(case)
    assert outcome.key == (Verdict.FAIL, "kept.output"), outcome.text
    assert outcome.mismatch is not None
    assert (outcome.mismatch.step, outcome.mismatch.round) == (5, 0)
    assert "check what step 2 returned: " in outcome.text
    assert "of the output that step 2 returned changed since" in outcome.text
    assert "at step 5, round 0" in outcome.text
