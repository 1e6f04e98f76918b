"""What a reply of a probe's ranks means: PRESENT, ABSENT, UNTESTED, and why.

Scope: a pure function of the catalogue's entry and the reply. It decides nothing about the machine beyond it.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, replace

from conformance.engine.pool import Reply, signal_name
from conformance.hazards.probe import Probe, undetected
from conformance.hazards.protocol import read_seen

_TRACEBACK_LINES = 6


class HazardState(str, enum.Enum):
    """What a probe found."""

    PRESENT = "PRESENT"
    ABSENT = "ABSENT"
    UNTESTED = "UNTESTED"


@dataclass(frozen=True)
class Verdict:
    """State of one hazard and what it rests on.

    ``broken`` says that the machine or the harness failed, ``unexpected`` that ranks ended in a way that is not the
    hazard's; either is UNTESTED. ``times`` and ``rounds`` count where it was looked for more than once.
    """

    state: HazardState
    text: str
    times: int = 0
    rounds: int = 0
    broken: bool = False
    unexpected: bool = False
    stacks: tuple[str, ...] = ()


def judge(probe: Probe, reply: Reply) -> Verdict:
    """The verdict on one question."""
    heard = {rank: read_seen(a.text) for rank, a in reply.answers.items() if a.status == "pass"}
    present = {rank: found for rank, found in heard.items() if found.times}
    if present:
        ranks = sorted(present)
        text = f"on rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}: {present[ranks[0]].text}"
        return Verdict(HazardState.PRESENT, text, times=max(found.times for found in present.values()))
    if reply.lost_lockstep:
        return Verdict(HazardState.UNTESTED, f"lost lockstep: {reply.lost_lockstep}", broken=True)
    if reply.dead:
        return _of_death(probe, reply)
    for status in ("harness", "raised"):
        for rank, answer in sorted(reply.answers.items()):
            if answer.status == status:
                return _of_exception(rank, answer.kind, answer.text, broken=status == "harness")
    if reply.missing:
        return _of_silence(probe, reply)
    return Verdict(HazardState.ABSENT, heard[min(heard)].text)


def _of_death(probe: Probe, reply: Reply) -> Verdict:
    ranks = sorted(reply.dead)
    rank = next((r for r in ranks if _in_phase(reply, r, probe.death)), ranks[0])
    words = reply.stderr.get(rank, "")
    text = f"rank {rank} died of {signal_name(reply.dead[rank])} in {reply.phases.get(rank, 'unknown')}"
    text += f", last words: {words.strip().splitlines()[-1]}" if words.strip() else ""
    if not _in_phase(reply, rank, probe.death):
        stacks = tuple(reply.stacks.values())
        return Verdict(HazardState.UNTESTED, f"unexpectedly, {text}", unexpected=True, stacks=(words, *stacks))
    if probe.refusal and re.search(probe.refusal, words):
        return Verdict(HazardState.ABSENT, f"the library checks it: {text}")
    return Verdict(HazardState.PRESENT, text, times=1)


def _of_exception(rank: int, kind: str, text: str, *, broken: bool) -> Verdict:
    last = text.strip().splitlines()[-1] if text.strip() else kind
    whose = "the harness" if broken else "the probe"
    return Verdict(
        HazardState.UNTESTED,
        f"rank {rank}: {whose} raised {last}",
        broken=broken,
        unexpected=not broken,
        stacks=("\n".join(text.strip().splitlines()[-_TRACEBACK_LINES:]),),
    )


def _of_silence(probe: Probe, reply: Reply) -> Verdict:
    where = ", ".join(f"rank {rank} in {reply.phases.get(rank, 'unknown')}" for rank in reply.missing)
    if any(_in_phase(reply, rank, probe.hang) for rank in reply.missing):
        words = next((w.strip().splitlines()[-1] for w in reply.stderr.values() if w.strip()), "")
        return Verdict(
            HazardState.PRESENT, f"no answer from {where}{f', last words: {words}' if words else ''}", times=1
        )
    stacks = tuple(reply.stacks.values())
    return Verdict(HazardState.UNTESTED, f"unexpectedly, no answer from {where}", unexpected=True, stacks=stacks)


def _in_phase(reply: Reply, rank: int, phase: str) -> bool:
    """Whether a rank was last in ``phase``; in none of a probe that names none."""
    return reply.phases.get(rank, "").startswith(f"{phase} of ")


def counted(verdict: Verdict, times: int, rounds: int) -> Verdict:
    """A verdict on several rounds: how often it was seen, or which rate they would have shown."""
    if rounds < 2 or verdict.state is HazardState.UNTESTED:
        return verdict
    if verdict.state is HazardState.PRESENT:
        return replace(verdict, text=f"in {times} of {rounds} rounds; {verdict.text}", times=times, rounds=rounds)
    rate = f"in {rounds} rounds (a rate of {undetected(rounds):.1%} or more is excluded at 95 %)"
    return replace(verdict, text=f"{rate}; {verdict.text}", rounds=rounds)


def together(verdicts: dict[str, Verdict]) -> Verdict:
    """The verdict on a hazard from those on its kernel types."""
    if len(verdicts) == 1:
        return next(iter(verdicts.values()))
    order = (HazardState.PRESENT, HazardState.UNTESTED, HazardState.ABSENT)
    state = next(s for s in order if any(v.state is s for v in verdicts.values()))
    ranked = sorted(verdicts.items(), key=lambda item: order.index(item[1].state))
    return Verdict(
        state,
        "; ".join(f"{kind} {v.state.value} ({v.text})" for kind, v in ranked),
        times=max(v.times for v in verdicts.values()),
        broken=any(v.broken for v in verdicts.values()),
        unexpected=any(v.unexpected for v in verdicts.values()),
        stacks=tuple(stack for v in verdicts.values() for stack in v.stacks),
    )
