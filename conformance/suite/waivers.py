"""Waivers: known failures, written down by the user, each with the issue that tracks it and the inputs it is about.

A waiver is an entry of a TOML file (``--waivers FILE``)::

    [[waiver]]
    issue = "ROCm/mori#610"                                   # or a URL; an entry without one is refused
    reason = "wrong sums from 128 tokens on"
    cell = { backend = "mori", kernel_type = "InterNodeV1*", world_size = { min = 4 } }
    case = { max_tokens = { min = 128 } }                     # without it, every case of these cells
    expect = { verdict = "FAIL", check = "combine.output" }
    run = { arch = "gfx942" }                                 # optional: other runs leave the entry aside
    intermittent = true                                       # optional: a pass is told and does not count against it
    quarantine = true                                         # optional, in the place of expect: never launched

Cases that a waiver is about are taken out of what the property draws; everything else it draws stays and gates. A few
of what was taken out are run: they must fail as said. On a launched world what would end it is quarantined. What a
waiver never does: excuse another verdict or check, or a failure of what the results are judged by.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

import msgspec

from conformance.cases import AnyCase, AnyCell
from conformance.engine.driver import CHECKS, Outcome
from conformance.suite.case_facts import case_fields, cell_fields, look_at_case, look_at_cell
from conformance.suite.predicates import ANYTHING, Field, Predicate, PredicateError, known, parse
from conformance.verdicts import PRODUCT_FAILURES, Verdict

_ISSUE = re.compile(r"https?://[^\s/]+/\S+|[\w.-]+/[\w.-]+#\d+")
_KEYS = ("issue", "reason", "cell", "case", "expect", "run", "intermittent", "quarantine")
_RUN = {name: Field(str) for name in ("arch", "device", "tier", "transport")}
_EXPECT = {
    "verdict": Field(str, tuple(sorted(v.value for v in PRODUCT_FAILURES)), exact=True),
    "check": Field(str),
}
#: Begins the check of an exception; its type follows.
_RAISED = "raised."
#: The only check of a hang.
_HANG = "hang"
_GLOB = "*?["


class RunFacts(Protocol):
    """What a waiver may ask of a run: of its options."""

    @property
    def arch(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def tier(self) -> str: ...
    @property
    def transport(self) -> str: ...
    @property
    def launched(self) -> object | None: ...


class WaiverError(ValueError):
    """A file of waivers cannot be used. The message names the file, the entry, the value, the limit and the fix."""


@dataclass(frozen=True)
class Waiver:
    """One entry.

    Attributes:
        entry: its place in the file, from 1.
        issue: who tracks it.
        reason: in the user's words.
        cell: of which cells.
        case: which of their cases; without a condition, all.
        expect: verdict and check.
        run: in which runs; without a condition, in all.
        intermittent: the cases need not fail.
        quarantine: nothing of it is launched.
    """

    entry: int
    issue: str
    reason: str
    cell: Predicate
    case: Predicate = ANYTHING
    expect: Predicate = ANYTHING
    run: Predicate = ANYTHING
    intermittent: bool = False
    quarantine: bool = False

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"waiver {self.entry} ({self.issue})"

    @property
    def expectation(self) -> str:
        """Verdict and check as the file gives them."""
        return " ".join(" or ".join(map(str, condition.wanted)) for condition in self.expect.conditions)

    @property
    def whole(self) -> bool:
        """Whether it is about every case of its cells."""
        return not self.case.conditions

    def covers_cell(self, cell: AnyCell) -> bool:
        """Whether it is about cases of this cell."""
        return self.cell.holds(look_at_cell(cell))

    def covers(self, case: AnyCase) -> bool:
        """Whether it is about this case."""
        return self.covers_cell(case.cell) and self.case.holds(look_at_case(case))

    def expects(self, outcome: Outcome) -> bool:
        """Whether a case that ended so failed as the file says."""
        said: dict[str, object] = {"verdict": outcome.verdict.value, "check": outcome.check}
        return not self.quarantine and not outcome.passed and self.expect.holds(said.__getitem__)

    @property
    def ends_world(self) -> bool:
        """Whether a failure as expected may end a launched world: ranks die, or wait for one that raised."""
        wanted = {str(wanted) for condition in self.expect.conditions for wanted in condition.wanted}
        return any(w in (Verdict.CRASH.value, Verdict.HANG.value) or w.startswith(_RAISED) for w in wanted)

    def in_force(self, run: RunFacts) -> bool:
        """Whether it is about runs like this."""
        return self.run.holds(lambda name: getattr(run, name))


def in_force(waivers: Iterable[Waiver], run: RunFacts) -> tuple[Waiver, ...]:
    """The waivers that are about runs like this; on a launched world, what would end it is never launched."""
    taken = tuple(waiver for waiver in waivers if waiver.in_force(run))
    if run.launched is None:
        return taken
    return tuple(replace(w, quarantine=True, intermittent=False) if w.ends_world else w for w in taken)


def forbidden(waivers: Iterable[Waiver], case: AnyCase, outcome: Outcome) -> bool:
    """Whether a search for the minimum of ``outcome`` must leave this case alone."""
    return any(w.covers(case) and (w.quarantine or w.expects(outcome)) for w in waivers)


def read_waivers(path: Path) -> tuple[Waiver, ...]:
    """Read a file of waivers.

    Raises:
        WaiverError: it cannot be read, is not TOML, or an entry is not a waiver.
    """
    try:
        content = msgspec.toml.decode(path.read_bytes())
    except OSError as error:
        raise WaiverError(f"{path} cannot be read ({error.strerror}); name a TOML file") from error
    except (msgspec.MsgspecError, ValueError) as error:
        raise WaiverError(f"{path} is not TOML: {error}; mend it there") from error
    unknown = sorted(set(content) - {"waiver"})
    entries = content.get("waiver", [])
    if unknown or not isinstance(entries, list):
        what = f"has {unknown[0]!r}" if unknown else "has [waiver], a single table"
        raise WaiverError(f"{path} {what}; give entries under [[waiver]], with two brackets, and nothing else")
    made = []
    for number, entry in enumerate(entries, 1):
        try:
            made.append(_waiver(number, entry))
        except PredicateError as error:
            issue = entry.get("issue") if isinstance(entry, dict) else None
            raise WaiverError(f"{path}: waiver {number}{f' ({issue})' if issue else ''}: {error}") from error
    return tuple(made)


def _waiver(number: int, entry: Any) -> Waiver:
    if not isinstance(entry, dict):
        raise PredicateError(f"is {entry!r}; give a table")
    for key in entry:
        known(key, _KEYS, "key")
    issue = entry.get("issue", "")
    if not isinstance(issue, str) or not _ISSUE.fullmatch(issue):
        what = f"issue is {issue!r}" if issue else "there is no issue"
        raise PredicateError(f"{what}; give issue = a URL or ORG/REPO#NUMBER, such as 'ROCm/mori#610'")
    reason = entry.get("reason", "")
    if not isinstance(reason, str) or not reason.strip():
        raise PredicateError(f"reason is {reason!r}; say in a few words what is known")
    flags = {name: entry.get(name, False) for name in ("intermittent", "quarantine")}
    for name, value in flags.items():
        if type(value) is not bool:
            raise PredicateError(f"{name} is {value!r}; give true or false")
    cell = parse(entry.get("cell", {}), cell_fields(), "cell")
    if not cell.only("backend").conditions:
        raise PredicateError("cell has no backend; name whose failure it is, such as cell = { backend = 'mori' }")
    return Waiver(
        entry=number,
        issue=issue,
        reason=" ".join(reason.split()),
        cell=cell,
        case=parse(entry.get("case", {}), case_fields(), "case"),
        expect=_expectation(entry, quarantine=flags["quarantine"], intermittent=flags["intermittent"]),
        run=parse(entry.get("run", {}), _RUN, "run"),
        **flags,
    )


def _expectation(entry: dict[str, Any], *, quarantine: bool, intermittent: bool) -> Predicate:
    if quarantine:
        for key, given in (("expect", "expect" in entry), ("intermittent", intermittent)):
            if given:
                raise PredicateError(f"{key} is given with quarantine = true, which launches nothing; leave one out")
        return Predicate()
    expect = parse(entry.get("expect", {}), _EXPECT, "expect")
    verdicts = [str(wanted) for c in expect.only("verdict").conditions for wanted in c.wanted]
    checks = [str(wanted) for c in expect.only("check").conditions for wanted in c.wanted]
    if not verdicts:
        raise PredicateError(
            "expect has no verdict; say how it fails, such as expect = { verdict = 'FAIL', check = 'combine.output' }"
        )
    for verdict in verdicts:
        if verdict != Verdict.HANG.value and not checks:
            raise PredicateError(f"expect has verdict {verdict} and no check; name {_ASKED[verdict]}")
    for check in checks:
        _known_check(check, verdicts)
    for verdict in verdicts if checks else ():
        if not any(_verdict_of(check) == verdict for check in checks):
            raise PredicateError(f"expect has verdict {verdict} and no check of it; name {_ASKED[verdict]}, too")
    return expect


_ASKED = {
    Verdict.FAIL.value: "the check that fails, such as combine.output",
    Verdict.CRASH.value: "how it dies as its check, such as SIGSEGV or 'exit code 1'",
    Verdict.HANG.value: f"its check, {_HANG}",
}


def _verdict_of(check: str) -> str:
    """Verdict that a failure of this check has."""
    if check == _HANG:
        return Verdict.HANG.value
    died = check in {s.name for s in signal.Signals} or re.fullmatch(r"(signal|exit code) \d+", check)
    return Verdict.CRASH.value if died else Verdict.FAIL.value


def _known_check(check: str, verdicts: Sequence[str]) -> None:
    """Refuse a check that no rank makes, that no wanted verdict has, or that stands for unlike ones.

    An exception's is ``raised.`` and its type; a crash's is its signal or exit code.
    """
    place, verdict = "expect.check", _verdict_of(check)
    if verdict not in verdicts:
        raise PredicateError(f"{place} is {check!r}, which no {' or '.join(verdicts)} has; name {_ASKED[verdicts[0]]}")
    if verdict != Verdict.FAIL.value:
        return
    if check.startswith(_RAISED):
        if not check.removeprefix(_RAISED).strip(_GLOB):
            raise PredicateError(f"{place} is {check!r}, which excuses every exception; name its type")
        return
    if not any(letter in check for letter in _GLOB):
        known(check, (*CHECKS, f"{_RAISED}<type of the exception>"), place)
        return
    # replay.dispatch.* is one group of checks, replay.* is not.
    groups = sorted({c.rpartition(".")[0] for c in CHECKS if fnmatchcase(c, check)})
    if not groups:
        raise PredicateError(f"{place} is {check!r}, which no check matches; name one, such as combine.output")
    if len(groups) > 1 or any(letter in check.partition(".")[0] for letter in _GLOB):
        raise PredicateError(
            f"{place} is {check!r}, which excuses failures of {', '.join(groups)}; name the check that fails, or those "
            f"of one group, such as {groups[0]}.*"
        )
