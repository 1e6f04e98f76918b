"""The harness of one worker: runs a cell's cases under Hypothesis, examines failures, writes records.

A failing case is repeated (its rate recorded), reduced to its minimum, confirmed on a fresh pool and stored; then one
exception whose type is named after (verdict, check) is raised. Hypothesis only draws: verdicts are memoised by case id,
so it sees the same outcome however often it asks. What the harness does not decide: exit codes; the controller does,
from the records.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis.database import DirectoryBasedExampleDatabase
from hypothesis.strategies import SearchStrategy

from accelerated.contract import Contract, MaskedSlots
from accelerated.interface import Backend
from accelerated.registry import backend
from conformance import __version__
from conformance.cases import Case, Cell, Explicit
from conformance.engine.driver import Driver, InfraError, Limits, Outcome
from conformance.engine.lease import core_slots, lease
from conformance.engine.pool import stop_forkserver
from conformance.engine.reducer import Reducer, Reduction
from conformance.generation import cases, strata
from conformance.suite import coverage
from conformance.suite.draws import isolate_draws
from conformance.suite.failure import ConformanceFailure, Failure, failure_type
from conformance.suite.options import Options
from conformance.suite.plan import PlannedCell
from conformance.suite.records import BeginRecord, CellRecord, EndRecord, RecordWriter
from conformance.verdicts import Verdict

#: Probability with which a candidate that does fail may be taken for one that passes.
MISS_PROBABILITY = 0.003
MAX_REPEATS = 256
RATE_REPEATS = 60
REDUCTION_HANG_FLOOR_S = 2.5


@dataclass
class Tally:
    """What happened in one cell so far."""

    distinct: set[str] = field(default_factory=set)
    classes: set[str] = field(default_factory=set)
    worst: float = 0.0
    failure: Failure | None = None


class Harness:
    """One worker's driver, records and leases."""

    def __init__(
        self, options: Options, writer: RecordWriter, devices: tuple[str, ...] = (), limits: Limits | None = None
    ) -> None:
        self.options = options
        on_cpu = options.device == "cpu"
        self._limits = limits or (Limits() if on_cpu else replace(Limits(), hang_budget=3, floor_s=30.0))
        self._writer = writer
        self._devices = devices
        self._driver: Driver | None = None
        self._driver_of = ""
        isolate_draws()

    def close(self) -> None:
        """End the pool, and the forkserver with it."""
        if self._driver is not None:
            self._driver.close()
        stop_forkserver()
        self._writer.close()

    # ------------------------------------------------------------------ one cell
    def check(self, planned: PlannedCell) -> None:
        """Run a cell and raise if it failed.

        Raises:
            ConformanceFailure: the product failed; its type is named after (verdict, check).
            InfraError: the harness or the machine failed.
            MistrustedError: the data drawn were too degenerate to mean anything.
        """
        made = backend(planned.cell.backend, self.options.arch)
        contract = made.contract(planned.cell.problem(), planned.cell.kernel_type)
        tally = Tally()
        with self._cell(planned, made, tally):
            parts = strata(planned.cell, contract, planned.examples)
            for archetype, examples in parts:
                strategy = cases(planned.cell, contract, archetype)
                self._draw(
                    planned, strategy, examples, archetype, lambda case: self._examine(planned, made, case, tally)
                )
            required = coverage.required(planned.cell.world_size, masked=len(parts) > 1)
            missing = required - tally.classes
            if missing and tally.failure is None:  # a finding ends the drawing early
                raise MistrustedError(f"no case of {planned.cell.label} has: {', '.join(sorted(missing))}")

    def replay(self, case: Case, planned: PlannedCell) -> None:
        """Run one recorded case and raise if it fails; it is not reduced again."""
        made = backend(case.cell.backend, self.options.arch)
        tally = Tally()
        with self._cell(planned, made, tally):
            self._examine(planned, made, case, tally, origin="replay")

    @contextmanager
    def _cell(self, planned: PlannedCell, made: Backend, tally: Tally) -> Iterator[None]:
        """Lease, run the body, write the cell's record whatever happens."""
        names, count = (self._devices, planned.cell.world_size) if self._devices else (core_slots(), 1)
        with lease(names, count):
            started = time.monotonic()
            verdict, reason = Verdict.PASS, ""
            try:
                yield
            except MistrustedError as error:
                verdict, reason = Verdict.MISTRUSTED, str(error)
                raise
            except InfraError as error:
                verdict, reason = Verdict.INFRA, str(error)
                raise
            except ConformanceFailure:
                raise  # its verdict is the tally's
            except Exception as error:
                # Whatever else went wrong is ours: without this the record would say PASS.
                verdict, reason = Verdict.INFRA, f"{type(error).__name__}: {error}"
                raise
            except BaseException:
                verdict = Verdict.NOT_RUN  # interrupted by the user
                raise
            finally:
                if tally.failure is not None:
                    verdict = tally.failure.verdict if planned.claimed else Verdict.FINDING
                    if planned.companion and made.judged_by == "oracle":
                        # The yardstick itself is off (a collective, a cast): nothing is known about the product.
                        verdict, reason = (
                            Verdict.INFRA,
                            f"the reference disagrees with the oracle: {tally.failure.headline}",
                        )
                self._writer.write(
                    CellRecord(
                        label=planned.cell.label,
                        cell=planned.cell,
                        verdict=verdict,
                        standin=made.standin,
                        companion=planned.companion,
                        distinct=len(tally.distinct),
                        planned=planned.examples,
                        ratio=tally.worst,
                        seconds=time.monotonic() - started,
                        reason=reason,
                        failure=str(tally.failure.directory) if tally.failure else "",
                        summary=tally.failure.headline if tally.failure else "",
                    )
                )

    def _draw(
        self,
        planned: PlannedCell,
        strategy: SearchStrategy[Case],
        examples: int,
        part: str,
        examine: Callable[[Case], None],
    ) -> None:
        """Draw the cell's cases. In explore, batches with fresh seeds until the cell's share of the budget is spent."""
        explore = self.options.tier == "explore"
        database = DirectoryBasedExampleDatabase(self.options.output / "hypothesis" / "examples") if explore else None
        deadline = time.monotonic() + planned.seconds
        raised: list[Exception] = []
        for batch in count():
            run_settings = settings(
                max_examples=examples,
                deadline=None,
                database=database,
                phases=(Phase.explicit, Phase.reuse, Phase.generate) if explore else (Phase.explicit, Phase.generate),
                report_multiple_bugs=False,
                suppress_health_check=(HealthCheck.too_slow,),
                verbosity=Verbosity.quiet,
            )

            @seed(_seed(planned.cell, part, self.options.seed + batch if explore else 0))
            @run_settings
            @given(case=strategy)
            def one(case: Case) -> None:
                # Hypothesis asks for a failing case again, and takes one that does not come back for a flake.
                if raised:
                    raise raised[0]
                try:
                    examine(case)
                except Exception as error:
                    raised.append(error)
                    raise

            one()
            if not explore or time.monotonic() > deadline:
                return

    # ------------------------------------------------------------------ one case
    def _examine(
        self, planned: PlannedCell, made: Backend, case: Case, tally: Tally, origin: str = "generated"
    ) -> None:
        if case.id in tally.distinct:
            if tally.failure is not None and case.id == tally.failure.original.id and planned.claimed:
                raise failure_type(tally.failure)(tally.failure)
            return
        if tally.failure is not None:
            return  # an unclaimed cell: one finding is enough
        driver = self._driver_for(case.cell.backend)
        outcome = self._run(driver, case, origin, first=True)
        tally.distinct.add(case.id)
        tally.classes.update(coverage.classes(case))
        tally.worst = max(tally.worst, outcome.ratio)
        if outcome.passed:
            return
        tally.failure = self._analyse(driver, made, case, outcome, reduce=origin == "generated")
        tally.failure.store(self.options.failures)
        if planned.claimed:
            raise failure_type(tally.failure)(tally.failure)

    def _run(
        self,
        driver: Driver,
        case: Case,
        origin: str,
        *,
        limit_s: float | None = None,
        first: bool = False,
        stacks: bool = True,
    ) -> Outcome:
        self._writer.write(BeginRecord(case.id, case.cell.label, origin, case))
        outcome = Outcome(Verdict.INFRA)
        try:
            outcome = driver.run(case, limit_s=limit_s, stacks=stacks)
        finally:
            self._writer.write(
                EndRecord(
                    case.id,
                    case.cell.label,
                    origin,
                    outcome.verdict,
                    outcome.check,
                    min(outcome.ratio, 1e300),
                    outcome.seconds,
                    case.tokens,
                    coverage.classes(case) if first else (),
                )
            )
        return outcome

    def _driver_for(self, name: str) -> Driver:
        if self._driver is None or self._driver_of != name:
            if self._driver is not None:
                self._driver.close()
            self._driver = Driver(
                name, arch=self.options.arch, device=self.options.device, limits=self._limits, progress=self._tell
            )
            self._driver_of = name
        return self._driver

    def _tell(self, text: str) -> None:
        """Append a line of progress to the run's ``progress.log``; pytest captures what a test prints."""
        with (self._writer.path.parent / "progress.log").open("a") as log:
            log.write(f"{time.strftime('%H:%M:%S')} {self._driver_of} {text}\n")

    # ------------------------------------------------------------------ failures
    def _analyse(self, driver: Driver, made: Backend, case: Case, outcome: Outcome, *, reduce: bool) -> Failure:
        # What is known already stands, whatever happens to the harness from here on.
        failure = Failure(made.name, made.standin, original=case, minimal=case, outcome=outcome)
        try:
            failure.failed, failure.repeats = self._rate(driver, case, outcome)
            attempts = 1
            # What never fails again cannot be reduced: every candidate would be refused, at the highest price.
            if reduce and failure.failed > 1:
                attempts = self._reduce(driver, made, failure)
            self._confirm(driver, failure, attempts)
        except InfraError as error:
            failure.cut_short = str(error).partition("\n")[0]
        return failure

    def _confirm(self, driver: Driver, failure: Failure, attempts: int) -> None:
        """Have the minimal case fail once more on a fresh pool; its outcome is the one to be reported."""
        driver.discard()
        for _ in range(max(2, attempts)):
            again = self._repeat(driver, failure.minimal, failure.outcome)
            if again.key == failure.outcome.key:
                failure.outcome, failure.reproduced = again, True
                break
        driver.rebuild()

    def _rate(self, driver: Driver, case: Case, outcome: Outcome) -> tuple[int, int]:
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

    def _repeat(self, driver: Driver, case: Case, outcome: Outcome) -> Outcome:
        """Run once more; what hung gets the limit of an ordinary case, though the pool is fresh."""
        limit = driver.limits.floor_s if outcome.verdict is Verdict.HANG else None
        return self._run(driver, case, "repeat", limit_s=limit)

    def _reduce(self, driver: Driver, made: Backend, failure: Failure) -> int:
        """Replace the failure's minimal case by the smallest one that a search finds; the runs a candidate got.

        A smaller case has fewer calls that can go wrong, so it may fail less often than the original did: the rate is
        taken again at the minimum, and the search repeated while that asks for more runs of every candidate.
        """
        deadline = time.monotonic() + self.options.reduce_budget_s
        attempts, failed, runs = 0, failure.failed, failure.repeats
        while _attempts(failed, runs) > attempts and not failure.exhausted:
            attempts = _attempts(failed, runs)
            reduction = self._search(driver, made, failure, attempts, deadline - time.monotonic())
            failure.minimal, failure.exhausted = reduction.case, reduction.exhausted
            failure.tried += reduction.tried
            if attempts > 1:
                failed, runs = self._rate(driver, failure.minimal, failure.outcome)
        return attempts

    def _search(self, driver: Driver, made: Backend, failure: Failure, attempts: int, budget_s: float) -> Reduction:
        costly = 0

        def fails(candidate: Case) -> bool:
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

        def allowed(candidate: Case) -> bool:
            return costly < driver.limits.hang_budget and _legal(made, candidate, self.options)

        reduction = Reducer(fails, allowed, budget_s).reduce(failure.minimal)
        reduction.exhausted = reduction.exhausted or costly >= driver.limits.hang_budget
        return reduction


def _attempts(failed: int, runs: int) -> int:
    """Runs that a candidate gets: with fewer, one that fails at this rate might pass by luck.

    The rate counts from few failures, the one that led here among them, so half of it is what can be relied on.
    """
    if failed == runs:
        return 1
    return min(MAX_REPEATS, math.ceil(math.log(MISS_PROBABILITY) / math.log(1 - failed / runs / 2)))


class MistrustedError(Exception):
    """The data of a cell were too degenerate for its checks to mean anything."""


def _seed(cell: Cell, part: str, offset: int) -> int:
    """Seed of a cell's draws: a hash of (suite version, cell), so a gate draws the same cases everywhere."""
    text = f"{__version__} {cell.label} {cell.check} {part} {offset}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


def _legal(made: Backend, case: Case, options: Options) -> bool:
    """Whether a reduced case is one the generator could have drawn: supported, and masked only where -1 is dropped."""
    from accelerated.contract import Standing
    from reference.problem import ProblemError

    try:
        problem = case.cell.problem()
    except ProblemError:
        return False
    if made.support(problem, case.cell.kernel_type).standing is Standing.REFUSED:
        return False
    contract: Contract = made.contract(problem, case.cell.kernel_type)
    if contract.masked_slots is MaskedSlots.DROPPED:
        return True
    return not any(
        -1 in row
        for a_round in case.rounds
        if isinstance(a_round.routing, Explicit)
        for rows in a_round.routing.rows
        for row in rows
    )
