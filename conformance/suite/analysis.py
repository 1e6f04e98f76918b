"""Analysis of one failing case: how often it fails, its minimum, and whether that fails on a fresh pool.

What an analysis does not decide: the verdict. The failure it is given stands whatever happens here; the harness may be
interrupted at any point of it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Protocol

from accelerated.interface import Backend
from conformance.cases import AnyCase
from conformance.engine.driver import Driver, InfraError, Outcome
from conformance.engine.reducer import Reduction
from conformance.suite import kinds
from conformance.suite.failure import Failure
from conformance.verdicts import Verdict

#: Probability with which a candidate that does fail may be taken for one that passes.
MISS_PROBABILITY = 0.003
MAX_REPEATS = 256
RATE_REPEATS = 60
REDUCTION_HANG_FLOOR_S = 2.5


class RunCase(Protocol):
    """Runs a case on a driver and records it."""

    def __call__(
        self, driver: Driver, case: AnyCase, origin: str, *, limit_s: float | None = None, stacks: bool = True
    ) -> Outcome:
        """Outcome of one run."""


class Analysis:
    """Rates, reduces and confirms failures."""

    def __init__(
        self,
        run: RunCase,
        budget_s: float,
        forbidden: Callable[[AnyCase, Outcome], bool] = lambda case, outcome: False,
    ) -> None:
        self._run = run
        self._budget_s = budget_s
        self._forbidden = forbidden  # cases that a search for the minimum of an outcome must leave alone

    def complete(self, driver: Driver, made: Backend, failure: Failure, *, reduce: bool) -> None:
        """Fill in rate, minimal case and confirmation of ``failure``, in place."""
        if driver.ended:
            failure.cut_short = f"the launched world is over ({driver.ended})"
            return
        try:
            failure.failed, failure.repeats = self._rate(driver, failure.original, failure.outcome)
            attempts = 1
            # What never fails again cannot be reduced: every candidate would be refused, at the highest price.
            if reduce and failure.failed > 1:
                attempts = self._reduce(driver, made, failure)
            self._confirm(driver, failure, attempts)
        except InfraError as error:
            failure.cut_short = str(error).partition("\n")[0]

    def _confirm(self, driver: Driver, failure: Failure, attempts: int) -> None:
        """Have the minimal case fail once more on a fresh pool; its outcome is the one to be reported."""
        driver.discard()
        for _ in range(max(2, attempts)):
            again = self._repeat(driver, failure.minimal, failure.outcome)
            if again.key == failure.outcome.key:
                failure.outcome, failure.reproduced = again, True
                break
        driver.rebuild()

    def _rate(self, driver: Driver, case: AnyCase, outcome: Outcome) -> tuple[int, int]:
        """Failures and runs, the first included.

        What always fails is repeated three times; what does not, until it failed twice again or often enough not to.
        A crash or a hang costs a pool, so one more of them is enough; repeats that pass cost little.
        """
        enough = 1 if outcome.verdict in (Verdict.CRASH, Verdict.HANG) else 3
        again = 0
        for repeat in range(1, RATE_REPEATS + 1):
            again += self._repeat(driver, case, outcome).key == outcome.key
            if again >= enough or 2 <= again < repeat:
                break
        return again + 1, repeat + 1

    def _repeat(self, driver: Driver, case: AnyCase, outcome: Outcome) -> Outcome:
        """Run once more; what hung gets the limit of an ordinary case, though the pool is fresh."""
        limit = driver.limits.floor_s if outcome.verdict is Verdict.HANG else None
        return self._run(driver, case, "repeat", limit_s=limit)

    def _reduce(self, driver: Driver, made: Backend, failure: Failure) -> int:
        """Replace the failure's minimal case by the smallest one that a search finds; the runs a candidate got.

        A smaller case has fewer calls that can go wrong, so it may fail less often than the original did: the rate is
        taken again at the minimum, and the search repeated while that asks for more runs of every candidate.
        """
        deadline = time.monotonic() + self._budget_s
        attempts, failed, runs = 0, failure.failed, failure.repeats
        while _attempts(failed, runs) > attempts and not failure.exhausted:
            attempts = _attempts(failed, runs)
            reduction = self._search(driver, made, failure, attempts, deadline - time.monotonic())
            failure.minimal, failure.exhausted = reduction.case, reduction.exhausted
            failure.tried += reduction.tried
            if attempts > 1:
                failed, runs = self._rate(driver, failure.minimal, failure.outcome)
        return attempts

    def _search(
        self, driver: Driver, made: Backend, failure: Failure, attempts: int, budget_s: float
    ) -> Reduction[Any]:
        costly = 0

        def fails(candidate: AnyCase) -> bool:
            nonlocal costly
            driver.rebuild()  # what the candidate before left behind must not make this one fail
            for _ in range(attempts):
                hung = failure.verdict is Verdict.HANG
                limit = max(REDUCTION_HANG_FLOOR_S, driver.patient_s) if hung else None
                seen = self._run(driver, candidate, "reduction", limit_s=limit, stacks=False)
                costly += seen.verdict in (Verdict.CRASH, Verdict.HANG)
                if seen.key == failure.outcome.key:
                    return True
            return False

        def allowed(candidate: AnyCase) -> bool:
            if costly >= driver.limits.hang_budget or self._forbidden(candidate, failure.outcome):
                return False
            return driver.holds(candidate.cell) and kinds.legal(made, candidate, failure.arch)

        reduction = kinds.reduced(failure.minimal, fails, allowed, budget_s)
        reduction.exhausted = reduction.exhausted or costly >= driver.limits.hang_budget
        return reduction


def _attempts(failed: int, runs: int) -> int:
    """Runs that a candidate gets: with fewer, one that fails at this rate might pass by luck.

    The rate counts from few failures, the one that led here among them, so half of it is what can be relied on.
    """
    if failed == runs:
        return 1
    return min(MAX_REPEATS, math.ceil(math.log(MISS_PROBABILITY) / math.log(1 - failed / runs / 2)))
