"""What a soak that found nothing says: the rate of faults that it would have shown.

Scope: rounds counted in the records, and arithmetic. Nothing is said of a path of which any soak failed, be it as a
waiver says: faults that were seen are not as rare as the rounds of the soaks that passed make them. It takes faults to
strike rounds independently of each other, and a round that is struck to be seen, since every element of it is judged; a
fault that strikes on other machines, sizes or loads only is not in the number.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping

from conformance.suite.records import BeginRecord, EndRecord
from conformance.verdicts import PRODUCT_FAILURES, Verdict

#: The property whose rounds count.
SOAK = "soak"
CONFIDENCE = 0.95
#: Backend and kernel type.
Path = tuple[str, str]


def soaked_rounds(ends: Iterable[EndRecord], begun: Mapping[tuple[str, str], BeginRecord]) -> dict[Path, int]:
    """Rounds of passed soaks, by backend and kernel type; without those of which a soak failed."""
    found: Counter[Path] = Counter()
    failed: set[Path] = set()
    for end in ends:
        begin = begun.get((end.cell, end.case_id))
        if begin is None or begin.case.cell.check != SOAK:
            continue
        path = begin.case.cell.backend, begin.case.cell.kernel_type
        if end.verdict in PRODUCT_FAILURES:
            failed.add(path)
        elif end.verdict is Verdict.PASS and end.origin in ("generated", "replay"):
            found[path] += begin.case.steps
    return {path: found[path] for path in sorted(found.keys() - failed)}


def one_in(rounds: int) -> int:
    """The rarest fault, one round in so many, that shows in so many rounds with the confidence.

    A fault that strikes a round with probability p is missed in n rounds with (1 - p)**n; 1 / p is rounded down, so
    that what is said holds.
    """
    return math.floor(1 / -math.expm1(math.log(1 - CONFIDENCE) / rounds))


def soak_lines(rounds: Mapping[Path, int]) -> list[str]:
    """Lines of the summary."""
    return [
        f"soak {backend} {kernel_type}: {count} rounds: a fault that strikes one round in {one_in(count)} or more "
        f"would have been seen with {CONFIDENCE:.0%}"
        for (backend, kernel_type), count in rounds.items()
        if count
    ]
