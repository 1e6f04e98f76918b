"""Waivers at work in one cell: which drawn cases they take out, what their own samples do, and the verdict of both.

A case that a waiver covers is taken out after it was drawn, so the others are those that are drawn without the waiver;
the harness draws more in the place of what was taken out. What a sample does not prove: that the rest of what was taken
out fails as well.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from conformance.cases import AnyCase, AnyCell
from conformance.engine.driver import Outcome
from conformance.suite import kinds
from conformance.suite.records import WaivedRecord
from conformance.suite.waivers import Waiver
from conformance.verdicts import Verdict

#: Cases of a waiver that a cell runs, of those that it took out.
SAMPLES = 5


@dataclass
class Share:
    """What one waiver took out of a cell, and what became of its samples."""

    waiver: Waiver
    avoided: set[str] = field(default_factory=set)
    samples: list[AnyCase] = field(default_factory=list)
    sampled: int = 0
    failed: int = 0
    settled: bool = False  # a crash or a hang as expected costs a pool: one is enough

    @property
    def verdict(self) -> Verdict:
        """XFAIL, XPASS or QUARANTINED; PASS where nothing was run, or a failure that comes and goes stayed away."""
        if self.waiver.quarantine:
            return Verdict.QUARANTINED
        if self.failed:
            return Verdict.XFAIL
        return Verdict.XPASS if self.sampled and not self.waiver.intermittent else Verdict.PASS

    def record(self) -> WaivedRecord:
        """For the cell's record."""
        w = self.waiver
        return WaivedRecord(w.entry, w.issue, w.reason, self.verdict, len(self.avoided), self.sampled, self.failed)

    def told(self) -> str:
        """One line."""
        waiver = self.waiver
        if waiver.quarantine:
            what = "never launched" if waiver.whole else f"{len(self.avoided)} drawn cases were not launched"
            if waiver.ends_world:
                what += f", because {waiver.expectation} may end the launched world"
        elif not self.sampled:
            what = "none of the drawn cases is covered"
        else:
            what = f"{self.failed} of {self.sampled} waived cases failed as expected ({waiver.expectation})"
            if self.verdict is Verdict.XPASS:
                what += "; narrow the waiver, remove it, or say intermittent = true"
        return f"{waiver.name}: {what}: {waiver.reason}"


class Watch:
    """The waivers of one cell."""

    def __init__(self, waivers: Iterable[Waiver], cell: AnyCell) -> None:
        self.shares = [Share(waiver) for waiver in waivers if waiver.covers_cell(cell)]
        self.classes: set[str] = set()  # that the cases which were taken out had
        self.emptied = False  # nothing was left to be run but samples
        self._known: dict[str, list[Share]] = {}

    @property
    def quarantine(self) -> Share | None:
        """The waiver for which nothing of the cell is launched."""
        return next((s for s in self.shares if s.waiver.quarantine and s.waiver.whole), None)

    @property
    def whole(self) -> bool:
        """Whether every case of the cell is waived."""
        return any(share.waiver.whole for share in self.shares)

    def avoids(self, case: AnyCase) -> bool:
        """Whether a drawn case is not to be run as others are; it may become a sample."""
        if not self.shares:
            return False
        covering = self._covering(case)
        for share in covering:
            if case.id not in share.avoided:
                share.avoided.add(case.id)
                # What must never be launched is no sample of another waiver either.
                if not any(s.waiver.quarantine for s in covering) and len(share.samples) < SAMPLES:
                    share.samples.append(case)
        if covering:
            self.classes.update(kinds.classes(case))
        return bool(covering)

    def _covering(self, case: AnyCase) -> list[Share]:
        if case.id not in self._known:
            self._known[case.id] = [share for share in self.shares if share.waiver.covers(case)]
        return self._known[case.id]

    @property
    def unsampled(self) -> bool:
        """Whether a waiver has no sample although some of its cases may be launched."""
        return any(not s.samples and not s.avoided and not s.waiver.quarantine for s in self.shares)

    def samples(self) -> list[AnyCase]:
        """Every sample once."""
        return list({case.id: case for share in self.shares for case in share.samples}.values())

    def wanted(self, case: AnyCase) -> bool:
        """Whether a sample still tells something."""
        return not all(share.settled for share in self._covering(case))

    def settle(self, case: AnyCase, outcome: Outcome) -> bool:
        """Count a sample's outcome; False if it failed in a way that no waiver of it expects."""
        covering = self._covering(case)
        for share in covering:
            share.sampled += 1
            if share.waiver.expects(outcome):
                share.failed += 1
                share.settled |= outcome.verdict in (Verdict.CRASH, Verdict.HANG)
        return outcome.passed or self.expects(case, outcome)

    def expects(self, case: AnyCase, outcome: Outcome) -> bool:
        """Whether a waiver of the case says that it fails so."""
        return any(share.waiver.expects(outcome) for share in self._covering(case))

    @property
    def verdict(self) -> Verdict:
        """Verdict of a cell whose other cases pass: an unexpected pass outranks a failure as expected.

        Where there are no other cases, a cell of which nothing failed as said is quarantined or mistrusted, not passed.
        """
        if self.quarantine is not None:
            return Verdict.QUARANTINED
        taking = [share for share in self.shares if share.avoided]
        seen = {share.verdict for share in self.shares}
        for verdict in (Verdict.XPASS, Verdict.XFAIL):
            if verdict in seen:
                return verdict
        if not self.emptied or not taking:
            return Verdict.PASS
        barred = any(share.waiver.quarantine for share in taking)
        return Verdict.QUARANTINED if barred else Verdict.MISTRUSTED

    def told(self) -> str:
        """What the waivers did, those that the verdict comes from first."""
        ordered = sorted(self.shares, key=lambda share: share.verdict is not self.verdict)
        return "\n".join(share.told() for share in ordered)


class UnexpectedPassError(AssertionError):
    """Cases that a waiver says fail do not."""
