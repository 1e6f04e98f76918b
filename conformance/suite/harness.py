"""The harness of one worker: runs a cell's cases under Hypothesis, examines failures, writes records.

A failing case is repeated (its rate recorded), reduced to its minimum, confirmed on a fresh pool and stored; then one
exception whose type is named after (verdict, check) is raised. Hypothesis only draws: verdicts are memoised by case id,
so it sees the same outcome however often it asks. What the harness does not decide: exit codes; the controller does,
from the records.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis.database import DirectoryBasedExampleDatabase
from hypothesis.strategies import SearchStrategy

from accelerated.interface import Backend
from accelerated.registry import backend
from conformance import __version__
from conformance.cases import AnyCase, AnyCell
from conformance.engine.driver import Driver, InfraError, Limits, Outcome, StartError
from conformance.engine.pool import stop_forkserver
from conformance.suite import kinds
from conformance.suite.analysis import Analysis
from conformance.suite.cells import PlannedCell
from conformance.suite.draws import isolate_draws
from conformance.suite.failure import ConformanceFailure, Failure, failure_type
from conformance.suite.options import Options
from conformance.suite.records import BeginRecord, CellRecord, EndRecord, RecordWriter
from conformance.suite.resources import Resources
from conformance.suite.summary import YARDSTICK_OFF
from conformance.verdicts import Verdict


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
        self,
        options: Options,
        writer: RecordWriter,
        devices: tuple[str, ...] = (),
        limits: Limits | None = None,
        following: Callable[[], AnyCell | None] = lambda: None,
    ) -> None:
        self.options = options
        self.following = following  # the cell that this worker runs next, if it is known
        self._writer = writer
        self._resources = Resources(options, devices, limits, progress=self._tell, on_teardown=self._torn_down)
        self._unusable: dict[str, str] = {}
        self._driver: Driver
        isolate_draws()

    def close(self) -> None:
        """End the pool, and the forkserver with it."""
        self._resources.release()
        stop_forkserver()
        self._writer.close()

    def _torn_down(self, cell: AnyCell, outcome: Outcome) -> None:
        """Record a pool that did not finalise."""
        made = backend(cell.backend, self.options.arch)
        self._writer.write(
            CellRecord(
                label=f"teardown after {cell.label}",
                cell=cell,
                verdict=outcome.verdict,
                standin=made.standin,
                companion=False,
                distinct=0,
                planned=0,
                ratio=0.0,
                seconds=outcome.seconds,
                reason=outcome.text,
                summary=f"{outcome.verdict.value} {outcome.check}: {outcome.text.splitlines()[0]}",
            )
        )

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
            for case in kinds.fixed_cases(planned, contract):
                self._examine(planned, made, case, tally)
            parts = kinds.drawn_parts(planned.cell, contract, planned.examples)
            for name, examples, strategy in parts:
                self._draw(planned, strategy, examples, name, lambda case: self._examine(planned, made, case, tally))
            missing = kinds.required(planned, contract, parts) - tally.classes
            if missing and tally.failure is None:  # a finding ends the drawing early
                raise MistrustedError(f"no case of {planned.cell.label} has: {', '.join(sorted(missing))}")

    def replay(self, case: AnyCase, planned: PlannedCell) -> None:
        """Run one recorded case and raise if it fails; it is not reduced again."""
        made = backend(case.cell.backend, self.options.arch)
        tally = Tally()
        with self._cell(planned, made, tally):
            self._examine(planned, made, case, tally, origin="replay")

    @contextmanager
    def _cell(self, planned: PlannedCell, made: Backend, tally: Tally) -> Iterator[None]:
        """Lease, run the body, write the cell's record whatever happens."""
        with self._resources.hold(planned.cell, self.following()) as self._driver:
            started = time.monotonic()
            verdict, reason = Verdict.PASS, ""
            try:
                if made.name in self._unusable:
                    raise InfraError(self._unusable[made.name])
                yield
            except StartError as error:
                # Every further cell would spend the same time on the same end.
                self._unusable[made.name] = reason = str(error)
                verdict = Verdict.INFRA
                raise
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
                            f"{YARDSTICK_OFF} with the oracle: {tally.failure.headline}",
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
        strategy: SearchStrategy[Any],
        examples: int,
        part: str,
        examine: Callable[[AnyCase], None],
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
                derandomize=False,  # Hypothesis sets it where CI is set; the seed below is what counts everywhere
                database=database,
                phases=(Phase.explicit, Phase.reuse, Phase.generate) if explore else (Phase.explicit, Phase.generate),
                report_multiple_bugs=False,
                suppress_health_check=(HealthCheck.too_slow,),
                verbosity=Verbosity.quiet,
            )

            @seed(_seed(planned.cell, part, self.options.seed + batch if explore else 0))
            @run_settings
            @given(case=strategy)
            def one(case: AnyCase) -> None:
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
        self, planned: PlannedCell, made: Backend, case: AnyCase, tally: Tally, origin: str = "generated"
    ) -> None:
        if case.id in tally.distinct:
            if tally.failure is not None and case.id == tally.failure.original.id and planned.claimed:
                raise failure_type(tally.failure)(tally.failure)
            return
        if tally.failure is not None:
            return  # an unclaimed cell: one finding is enough
        outcome = self._run(self._driver, case, origin, first=True)
        tally.distinct.add(case.id)
        tally.classes.update(kinds.classes(case))
        tally.worst = max(tally.worst, outcome.ratio)
        if outcome.passed:
            return
        # What is known already stands, whatever happens to the harness from here on.
        tally.failure = failure = Failure(
            made.name,
            made.standin,
            original=case,
            minimal=case,
            outcome=outcome,
            device=self.options.device,
            arch=self.options.arch,
            caveat=kinds.caveat(made, self.options.device),
            cut_short="it did not end",
        )
        failure.store(self.options.failures)
        early = failure.directory
        failure.cut_short = ""
        Analysis(self._run, self.options.reduce_budget_s).complete(
            self._driver, made, failure, reduce=origin == "generated"
        )
        failure.store(self.options.failures)
        if failure.directory != early:
            shutil.rmtree(early)  # the minimum has a directory of its own, which holds the original too
        if planned.claimed:
            raise failure_type(tally.failure)(tally.failure)

    def _run(
        self,
        driver: Driver,
        case: AnyCase,
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
                    kinds.classes(case) if first else (),
                )
            )
        return outcome

    def _tell(self, text: str) -> None:
        """Append a line of progress to the run's ``progress.log``; pytest captures what a test prints."""
        with (self._writer.path.parent / "progress.log").open("a") as log:
            log.write(f"{time.strftime('%H:%M:%S')} {text}\n")


class MistrustedError(Exception):
    """The data of a cell were too degenerate for its checks to mean anything."""


def _seed(cell: AnyCell, part: str, offset: int) -> int:
    """Seed of a cell's draws: a hash of (suite version, cell), so a gate draws the same cases everywhere."""
    text = f"{__version__} {cell.label} {cell.check} {part} {offset}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
