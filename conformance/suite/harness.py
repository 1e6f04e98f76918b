"""The harness of one worker: runs a cell's cases under Hypothesis, examines failures, writes records.

A failing case is repeated (its rate recorded), reduced to its minimum, confirmed on a fresh pool and stored; then one
exception whose type is named after (verdict, check) is raised. Hypothesis only draws: verdicts are memoised by case id,
so it sees the same outcome however often it asks. What the harness does not decide: exit codes; the controller does,
from the records.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import NoReturn

import pytest

from accelerated.interface import Backend
from accelerated.registry import backend
from conformance.cases import AnyCase, AnyCell
from conformance.engine.driver import Driver, InfraError, Limits, Outcome, StartError
from conformance.engine.pool import stop_forkserver
from conformance.engine.world import World
from conformance.suite import kinds
from conformance.suite.analysis import Analysis
from conformance.suite.cells import PlannedCell
from conformance.suite.drawing import Drawing
from conformance.suite.failure import ConformanceFailure, Failure, failure_type
from conformance.suite.options import Options, transport_of
from conformance.suite.records import BeginRecord, CellRecord, EndRecord, RecordWriter
from conformance.suite.resources import Resources
from conformance.suite.summary import YARDSTICK_OFF
from conformance.suite.waived import UnexpectedPassError, Watch
from conformance.suite.waivers import forbidden, in_force
from conformance.verdicts import Verdict


@dataclass
class Tally:
    """What happened in one cell so far."""

    distinct: set[str] = field(default_factory=set)
    classes: set[str] = field(default_factory=set)
    worst: float = 0.0
    failure: Failure | None = None
    lacking: int = 0  # of the budget, for waivers


class Harness:
    """One worker's driver, records and leases."""

    def __init__(
        self,
        options: Options,
        writer: RecordWriter,
        devices: tuple[str, ...] = (),
        limits: Limits | None = None,
        following: Callable[[], AnyCell | None] = lambda: None,
        world: World | None = None,
    ) -> None:
        self.options = options
        self.following = following  # the cell that this worker runs next, if it is known
        self._writer = writer
        self._resources = Resources(
            options, devices, limits, progress=self._tell, on_teardown=self._torn_down, world=world
        )
        self._waivers = in_force(options.waivers, options)
        self._drawing = Drawing(options)
        self._unusable: dict[str, str] = {}
        self._driver: Driver

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
        """Run a cell and raise if it failed; one that is waived ends as pytest's xfail, or its skip if quarantined.

        Raises:
            ConformanceFailure: the product failed; its type is named after (verdict, check).
            InfraError: the harness or the machine failed.
            MistrustedError: the data drawn were too degenerate to mean anything, or waived and nothing failed.
            UnexpectedPassError: what a waiver says fails does not.
        """
        made = backend(planned.cell.backend, self.options.arch)
        tally, watch = Tally(), self._watch(planned, made)
        if watch.quarantine is not None:
            self._quarantined(planned, made, watch)
        contract = made.contract(planned.cell.problem(), planned.cell.kernel_type)
        with self._cell(planned, made, tally, watch):
            for case in kinds.fixed_cases(planned, contract):
                if not watch.avoids(case):
                    self._examine(planned, made, case, tally)
            parts = kinds.drawn_parts(planned.cell, contract, planned.examples)
            for part in parts:
                tally.lacking += self._drawing.draw(
                    planned, part, watch, lambda case: self._examine(planned, made, case, tally)
                )
            missing = kinds.required(planned, contract, parts) - tally.classes - watch.classes
            if missing and tally.failure is None:  # a finding ends the drawing early
                raise MistrustedError(f"no case of {planned.cell.label} has: {', '.join(sorted(missing))}")
            if watch.unsampled and tally.failure is None:
                self._drawing.seek(planned, parts, watch)
            watch.emptied = not tally.distinct
            self._sample(planned, made, tally, watch)
            if watch.verdict is Verdict.MISTRUSTED and tally.failure is None:
                raise MistrustedError(
                    f"every drawn case of {planned.cell.label} is waived, and none of those that were run failed; "
                    f"narrow the case table, or give quarantine = true: {watch.told()}"
                )
        self._conclude(watch, tally)

    def replay(self, case: AnyCase, planned: PlannedCell) -> None:
        """Run one recorded case and raise if it fails; it is not reduced again."""
        made = backend(case.cell.backend, self.options.arch)
        tally, watch = Tally(), self._watch(planned, made)
        if watch.avoids(case) and not watch.samples():
            self._quarantined(planned, made, watch)
        with self._cell(planned, made, tally, watch):
            self._sample(planned, made, tally, watch, reduce=False)
            if not watch.samples():
                self._examine(planned, made, case, tally, origin="replay")
        self._conclude(watch, tally)

    # ------------------------------------------------------------------ waivers
    def _watch(self, planned: PlannedCell, made: Backend) -> Watch:
        """The waivers of a cell; by what the others are judged is never waived."""
        yardstick = planned.companion and made.judged_by == "oracle"
        return Watch(() if yardstick else self._waivers, planned.cell)

    def _quarantined(self, planned: PlannedCell, made: Backend, watch: Watch) -> NoReturn:
        """Record what is never launched, and skip it."""
        text = watch.told()
        self._record(planned, made, Tally(), watch, Verdict.QUARANTINED, text, 0.0)
        pytest.skip(f"{Verdict.QUARANTINED.value}: {text}")

    def _sample(self, planned: PlannedCell, made: Backend, tally: Tally, watch: Watch, *, reduce: bool = True) -> None:
        """Run a few of the cases that waivers took out; what fails in another way than they say is a failure."""
        for case in watch.samples():
            # Nothing more can be run on a launched world that a failure, however expected, has ended.
            if tally.failure is not None or not watch.wanted(case) or self._driver.ended:
                continue
            outcome = self._run(self._driver, case, "waived", first=True, expected=partial(watch.expects, case))
            if not watch.settle(case, outcome):
                tally.distinct.add(case.id)
                self._failed(planned, made, case, tally, outcome, reduce=reduce)

    def _conclude(self, watch: Watch, tally: Tally) -> None:
        """Tell pytest of a cell of which nothing but what is waived failed."""
        if tally.failure is not None or watch.verdict is Verdict.PASS:
            return
        text = f"{watch.verdict.value}: {watch.told()}"
        if watch.verdict is Verdict.XPASS:
            raise UnexpectedPassError(text)
        if watch.verdict is Verdict.QUARANTINED:
            pytest.skip(text)
        pytest.xfail(text)

    @contextmanager
    def _cell(self, planned: PlannedCell, made: Backend, tally: Tally, watch: Watch) -> Iterator[None]:
        """Lease, run the body, write the cell's record whatever happens."""
        with self._resources.hold(planned.cell, self.following()) as self._driver:
            started = time.monotonic()
            verdict, reason = Verdict.PASS, ""
            try:
                if made.name in self._unusable:
                    raise InfraError(self._unusable[made.name])
                yield
                verdict, reason = watch.verdict, watch.told()
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
                self._record(planned, made, tally, watch, verdict, reason, time.monotonic() - started)

    def _record(
        self,
        planned: PlannedCell,
        made: Backend,
        tally: Tally,
        watch: Watch,
        verdict: Verdict,
        reason: str,
        seconds: float,
    ) -> None:
        """Write the record of a cell."""
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
                seconds=seconds,
                reason=reason,
                failure=str(tally.failure.directory) if tally.failure else "",
                summary=tally.failure.headline if tally.failure else "",
                waived=tuple(share.record() for share in watch.shares),
                lacking=tally.lacking,
            )
        )

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
        if not outcome.passed:
            self._failed(planned, made, case, tally, outcome, reduce=origin == "generated")

    def _failed(
        self, planned: PlannedCell, made: Backend, case: AnyCase, tally: Tally, outcome: Outcome, *, reduce: bool
    ) -> None:
        """Analyse and store a failure, and raise it where the cell is claimed."""
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
            transport=transport_of(made, self.options),
            world=self.options.world,
            nodes=self.options.launched.nodes if self.options.launched is not None else 1,
            cut_short="it did not end",
        )
        failure.store(self.options.failures)
        early = failure.directory
        failure.cut_short = ""
        # A minimum that a waiver covers would be taken for what is waived.
        apart = partial(forbidden, self._waivers)
        Analysis(self._run, self.options.reduce_budget_s, apart).complete(self._driver, made, failure, reduce=reduce)
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
        expected: Callable[[Outcome], bool] = lambda outcome: False,
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
                    expected(outcome),
                    outcome.kernels,
                )
            )
        return outcome

    def _tell(self, text: str) -> None:
        """Append a line of progress to the run's ``progress.log``; pytest captures what a test prints."""
        with (self._writer.path.parent / "progress.log").open("a") as log:
            log.write(f"{time.strftime('%H:%M:%S')} {text}\n")


class MistrustedError(Exception):
    """The data of a cell were too degenerate for its checks to mean anything, or waived altogether."""
