"""What a reply means: the hazard, its absence, or nothing.

Scope: replies spelt out, without ranks. A pass does not prove that a rank dies of what its last words say.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from conformance.engine.pool import Reply
from conformance.engine.protocol import Answer, Status
from conformance.hazards.catalogue import PROBES
from conformance.hazards.judge import HazardState, Verdict, counted, judge, together
from conformance.hazards.protocol import Seen, write_seen

QUIET = PROBES["weights-disagree"]
DIES, HANGS, CHECKED = (PROBES[n] for n in ("host-assert-kills", "stale-lock-hangs", "intranode-receive-overflow"))
PRESENT, ABSENT, UNTESTED = HazardState.PRESENT, HazardState.ABSENT, HazardState.UNTESTED


def saw(*times: int) -> Reply:
    """Every rank answered."""
    return Reply({rank: Answer(1, rank, "pass", text=write_seen(Seen(n, f"saw {n}"))) for rank, n in enumerate(times)})


def ended(phase: str, words: str = "", *, dead: bool) -> Reply:
    """Rank 1 died, or did not answer; rank 0 answered."""
    reply = saw(0)
    if dead:
        reply.dead[1] = -6
    else:
        reply.missing.append(1)
    reply.phases[1], reply.stderr[1], reply.stacks[1] = f"{phase} of round 3", words, "where rank 1 was"
    return reply


def raised(status: Status, kind: str, text: str) -> Reply:
    reply = saw(0)
    reply.answers[1] = Answer(1, 1, status, text=f"Traceback\n{kind}: {text}", kind=kind)
    return reply


def test_one_rank_that_saw_it_is_enough() -> None:
    found = judge(QUIET, saw(0, 0, 1, 1))
    assert (found.state, found.times) == (PRESENT, 1)
    assert "ranks 2, 3: saw 1" in found.text
    assert judge(QUIET, saw(0, 0)).state is ABSENT


def test_what_was_seen_outweighs_how_others_ended() -> None:
    reply = saw(1)
    reply.dead[1] = -9
    assert judge(QUIET, reply).state is PRESENT


@pytest.mark.parametrize("phase", ["dispatch", "build", "combine"])
def test_a_death_counts_in_its_phase_only(phase: str) -> None:
    found = judge(DIES, ended(phase, "mori: assertion", dead=True))
    assert found.state is (PRESENT if phase == "dispatch" else UNTESTED)
    assert found.unexpected == (phase != "dispatch")
    assert "SIGABRT" in found.text
    assert "mori: assertion" in found.text


def test_an_unexpected_death_is_untested_and_keeps_the_stack() -> None:
    found = judge(QUIET, ended("dispatch", "a memory fault", dead=True))
    assert (found.state, found.unexpected) == (UNTESTED, True)
    assert found.stacks == ("a memory fault", "where rank 1 was")


def test_a_death_by_the_librarys_own_check_is_absence() -> None:
    assert judge(CHECKED, ended("dispatch", "device assertion: no room for so many rows", dead=True)).state is ABSENT
    assert judge(CHECKED, ended("dispatch", "a memory fault", dead=True)).state is PRESENT


def test_a_silence_counts_in_its_phase_only() -> None:
    assert judge(HANGS, ended("build", "waiting", dead=False)).state is PRESENT
    late = judge(HANGS, ended("look", "waiting", dead=False))
    assert (late.state, late.unexpected, late.stacks) == (UNTESTED, True, ("where rank 1 was",))
    assert judge(HANGS, ended("build alone", "waiting", dead=False)).state is UNTESTED


def test_an_exception_is_untested() -> None:
    found = judge(QUIET, raised("raised", "RuntimeError", "HIP error 98"))
    assert (found.state, found.unexpected, found.broken) == (UNTESTED, True, False)
    assert "HIP error 98" in found.text
    assert judge(QUIET, raised("harness", "ImportError", "no module")).broken


def test_rounds_are_counted_and_bound_a_rate() -> None:
    assert "in 2 of 100 rounds" in counted(Verdict(PRESENT, "x"), 2, 100).text
    absent = counted(Verdict(ABSENT, "x"), 0, 100)
    assert "in 100 rounds (a rate of 3.0% or more is excluded at 95 %)" in absent.text
    assert counted(Verdict(UNTESTED, "x"), 0, 100) == Verdict(UNTESTED, "x")


def test_kernel_types_are_put_together() -> None:
    one, none = Verdict(PRESENT, "seen", times=1), Verdict(ABSENT, "looked")
    lost = Verdict(UNTESTED, "died", unexpected=True, stacks=("here",))
    assert together({"A": none, "B": none}).state is ABSENT
    assert together({"A": none, "B": one}).text == "B PRESENT (seen); A ABSENT (looked)"
    mixed = together({"A": none, "B": lost})
    assert (mixed.state, mixed.unexpected, mixed.stacks) == (UNTESTED, True, ("here",))
    assert together({"A": replace(one, times=4), "B": one}).times == 4
