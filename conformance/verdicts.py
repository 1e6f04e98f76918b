"""Verdicts and exit codes: the vocabulary every record, report and gate shares.

What a PASS does not prove: that the untested combinations work; the records list those as UNSUPPORTED or NOT RUN.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable


class Verdict(str, enum.Enum):
    """Outcome of a case or of a cell."""

    PASS = "PASS"
    FAIL = "FAIL"
    CRASH = "CRASH"
    HANG = "HANG"
    FINDING = "FINDING"  # a failure in an unclaimed cell: shown, not gating
    MISTRUSTED = "MISTRUSTED"  # the data were too degenerate for the checks to mean anything
    UNSUPPORTED = "UNSUPPORTED"
    XFAIL = "XFAIL"  # what is not waived passed, and what is failed as the waiver says
    XPASS = "XPASS"  # what a waiver says fails does not
    QUARANTINED = "QUARANTINED"  # a waiver says that it is never launched
    NOT_RUN = "NOT RUN"
    INFRA = "INFRA"


#: Verdicts that are the product's fault.
PRODUCT_FAILURES = frozenset({Verdict.FAIL, Verdict.CRASH, Verdict.HANG})


class ExitCode(enum.IntEnum):
    """Exit codes of a run, a contract with whatever calls the suite."""

    OK = 0
    PRODUCT_FAILURE = 1
    INCOMPLETE = 2
    INFRASTRUCTURE = 3
    USAGE = 4


def exit_code(verdicts: Iterable[Verdict], *, lost_worker: bool = False, stale_waivers: bool = False) -> ExitCode:
    """Exit code of a run from the verdicts of its cells.

    A product failure outranks everything; infrastructure outranks incompleteness; nothing at all is incomplete. So is a
    run whose waivers are out of date (XPASS, stale): they keep cases from being drawn for nothing. It is no product
    failure, because a search for the change that broke the product must not end at the one that mended it.
    """
    seen = set(verdicts)
    if seen & PRODUCT_FAILURES:
        return ExitCode.PRODUCT_FAILURE
    if lost_worker or Verdict.INFRA in seen:
        return ExitCode.INFRASTRUCTURE
    ran = seen & {Verdict.PASS, Verdict.FINDING, Verdict.XFAIL}
    if stale_waivers or seen & {Verdict.MISTRUSTED, Verdict.NOT_RUN, Verdict.XPASS} or not ran:
        return ExitCode.INCOMPLETE
    return ExitCode.OK
