"""What this build can do on this machine: every operator is built and called once, in processes that may die of it.

A library that cannot do something may abort instead of raising, so nothing of this happens in the process that asks.
Each combination of backend, kernel type or operator, EP size and nodes gets one small case on the smallest cell of the
plan; so do, of a dispatch, every wire, codec and mode by itself, and those of them together that the plan has together.
What the contract refuses is not tried: it is refused in the contract's words. What a waiver quarantines is not tried
either. What a matrix does not prove: that anything computes the right result for other inputs; the run does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from accelerated.contract import Standing
from accelerated.interface import Backend
from accelerated.registry import backend
from conformance.cases import AnyCase, AnyCell, Case, Cell, Explicit, GraphCell, LayerCell, Round, SequenceCell
from conformance.engine.driver import Driver, InfraError, Limits, Outcome, StartError
from conformance.row_cases import RowCell
from conformance.suite import call_plan, kinds
from conformance.suite.cells import Plan, PlannedCell, Unsupported
from conformance.suite.draws import isolate_draws
from conformance.suite.layer_plan import is_layer
from conformance.suite.options import Options
from conformance.suite.records import BeginRecord, Capability, CapabilityRecord, EndRecord, RecordWriter
from conformance.suite.resources import Resources
from conformance.suite.waivers import Waiver
from conformance.verdicts import ExitCode, Verdict
from reference.problem import ProblemError

#: Exceptions by which a build says that it was made without something; any other may be a defect of what is there.
_ABSENT = ("ImportError", "ModuleNotFoundError", "LibraryError")
#: Standing of a combination that is tried and takes some sizes only.
IN_PART = "refused in part"
#: What spares the other manners of a combination: each would cost a pool, or the time that a hang takes.
_DOWN = (Capability.CRASHES, Capability.HANGS, Capability.NOT_BUILT)
#: Drawn cases of which the smallest is taken where a cell has no smaller one.
_DRAWN = 8
Told = Callable[[CapabilityRecord], None]


def manner(cell: AnyCell) -> str:
    """How the calls of a cell differ from plain ones: wire format, combine codec, modes, and that they are captured."""
    if isinstance(cell, RowCell):
        return ""
    captured = "captured" if isinstance(cell, GraphCell) else ""
    return " ".join(part for part in (cell.wire, cell.codec, *cell.modes, captured) if part)


def widened(plan: Plan, options: Options) -> Plan:
    """The plan with every wire, codec and mode by itself wherever it has a kernel type, to be run or refused.

    In the plan they occur in as few cells as hold all pairs, and not where their kernel type runs otherwise.
    """
    cells, refused = list(plan.cells), dict.fromkeys(plan.unsupported)
    for name in options.backends if not options.only_models else ():
        made = backend(name, options.arch)
        offered = {*made.kernel_types, *getattr(made, "aliases", ())} if not is_layer(made) else set()
        found = [p.cell for p in plan.cells] + list(plan.unsupported)
        places = {(one.kernel_type, (one.world_size, one.nodes)) for one in found if one.backend == name}
        for kernel_type, place in sorted(one for one in places if one[0] in offered):
            for choice in call_plan.singles(call_plan.Choice(kernel_type, place)):
                single = _single(name, made, choice)
                if isinstance(single, PlannedCell):
                    cells.append(single)
                else:
                    refused[single] = None
            refused.update(dict.fromkeys(call_plan.refusals(name, made, kernel_type, place)))
    return Plan(tuple(cells), tuple(refused))


def _single(name: str, made: Backend, choice: call_plan.Choice) -> PlannedCell | Unsupported:
    """A choice on the first sizes on which it is claimed, else runs; else the first refusal."""
    unclaimed, reason = None, ""
    for shape in call_plan.SHAPES:
        cell = replace(choice, shape=shape).cell(name)
        try:
            support = made.support(cell.problem(), cell.kernel_type)
        except ProblemError as error:
            reason = reason or str(error)
            continue
        if support.standing is Standing.CLAIMED:
            return PlannedCell(cell, 1, claimed=True)
        if support.standing is Standing.UNCLAIMED:
            unclaimed = unclaimed or PlannedCell(cell, 1, claimed=False)
        reason = reason or support.reason
    return unclaimed or Unsupported(name, choice.kernel_type, *choice.place, reason, manner(cell))


def subjects(plan: Plan, barred: Sequence[Waiver] = ()) -> list[PlannedCell]:
    """The smallest cell of every combination, widest last; one that is quarantined only where there is no other."""

    def size(planned: PlannedCell) -> tuple[Any, ...]:
        cell = planned.cell
        never = any(waiver.whole and waiver.covers_cell(cell) for waiver in barred)
        return (never, not planned.claimed, cell.mode != "drained", cell.hidden * cell.capacity, cell.label)

    found: dict[tuple[Any, ...], PlannedCell] = {}
    for planned in sorted(plan.cells, key=size):
        cell = planned.cell
        if isinstance(cell, SequenceCell):
            continue  # calls that others try one by one
        found.setdefault((cell.backend, cell.world_size, cell.kernel_type, cell.nodes, manner(cell)), planned)
    return [found[key] for key in sorted(found)]


def tiny(planned: PlannedCell, made: Backend) -> AnyCase:
    """A small case with something to do: a token per rank for the next one's experts, or the least of its own kind."""
    cell = planned.cell
    if isinstance(cell, Cell) and not isinstance(cell, LayerCell | GraphCell):
        per_rank = cell.experts // cell.world_size
        rows = tuple(
            (tuple(((rank + 1) * per_rank + slot) % cell.experts for slot in range(cell.top_k)),)
            for rank in range(cell.world_size)
        )
        return Case(cell, (Round(Explicit(rows)),))
    contract = made.contract(cell.problem(), cell.kernel_type)
    fixed = [case for case in kinds.fixed_cases(planned, contract) if case.tokens]
    return min(fixed or list(_drawn(cell, contract)), key=lambda case: (case.tokens, case.steps))


def quarantines(options: Options) -> tuple[Waiver, ...]:
    """Waivers by which something is never launched: a matrix is of no tier, so those of every tier."""
    return tuple(
        waiver
        for waiver in options.waivers
        if waiver.quarantine and waiver.run.without(("tier",)).holds(lambda name: getattr(options, name))
    )


def permitted(planned: PlannedCell, made: Backend, barred: Sequence[Waiver]) -> AnyCase | None:
    """The small case, or the smallest other one if that is quarantined; None if no case is left."""

    def launched(case: AnyCase) -> bool:
        return not any(waiver.covers(case) for waiver in barred)

    first, cell = tiny(planned, made), planned.cell
    if launched(first):
        return first
    contract = made.contract(cell.problem(), cell.kernel_type)
    others = [*kinds.fixed_cases(planned, contract), *_drawn(cell, contract)]
    return min(
        (case for case in others if case.tokens and launched(case)),
        key=lambda case: (case.tokens, case.steps),
        default=None,
    )


def _drawn(cell: AnyCell, contract: object) -> Iterator[AnyCase]:
    found: list[AnyCase] = []
    for _, _, strategy in kinds.drawn_parts(cell, contract, _DRAWN):

        @seed(0)
        @settings(
            max_examples=_DRAWN,
            deadline=None,
            database=None,
            phases=(Phase.generate,),
            suppress_health_check=(HealthCheck.too_slow,),
        )
        @given(case=strategy)
        def one(case: AnyCase) -> None:
            found.append(case)

        one()
    return iter([case for case in found if case.tokens] or found)


class Prober:
    """Probes one combination after the other and records each."""

    def __init__(
        self,
        options: Options,
        devices: Sequence[str],
        writer: RecordWriter,
        told: Told,
        limits: Limits | None = None,
    ) -> None:
        self._options, self._writer, self._told = options, writer, told
        self._barred = quarantines(options)
        self._probed: dict[AnyCell, PlannedCell] = {}
        self._down: dict[tuple[str, str, int, int], Capability] = {}  # plain combinations that are not worth varying
        self._log = writer.path.parent / "progress.log"
        self._resources = Resources(options, devices, limits, progress=self._progress, on_teardown=self._torn_down)
        isolate_draws()

    def refused(self, entry: Unsupported, *, in_part: bool = False) -> None:
        """Note what a contract refuses: the combination, or some sizes of it."""
        self._note(
            CapabilityRecord(
                entry.backend,
                entry.kernel_type,
                entry.world_size,
                entry.nodes,
                standing=IN_PART if in_part else "refused",
                state=Capability.REFUSED,
                message=entry.reason,
                manner=entry.manner,
                standin=backend(entry.backend, self._options.arch).standin,
                tried=False,
            )
        )

    def absent(self, planned: PlannedCell, reason: str) -> None:
        """Note what is not there to be tried."""
        self._end(planned, Capability.NOT_BUILT, reason, tried=False)

    def probe(self, planned: PlannedCell, following: PlannedCell | None) -> None:
        """Build an operator, call it once, and note what became of it."""
        cell = planned.cell
        barring = [waiver for waiver in self._barred if waiver.covers_cell(cell)]
        if any(waiver.whole for waiver in barring):
            self._quarantined(planned, barring)
            return
        plain = (cell.backend, cell.kernel_type, cell.world_size, cell.nodes)
        if plain in self._down:
            self._end(planned, self._down[plain], "its plain calls end so; not tried", tried=False)
            return
        started, case_id = time.monotonic(), ""
        try:
            case = permitted(planned, backend(cell.backend, self._options.arch), barring)
            if case is None:
                self._quarantined(planned, barring)
                return
            case_id = case.id
            self._probed[cell] = planned
            with self._resources.hold(cell, following.cell if following else None) as driver:
                state, message = _state(self._run(driver, case))
        except StartError as error:
            state, message = Capability.NOT_BUILT, str(error)
        except InfraError as error:
            state, message = Capability.UNKNOWN, str(error)
        except Exception as error:  # noqa: BLE001  what is ours must not pass for the library's
            state, message = Capability.UNKNOWN, f"{type(error).__name__}: {error}"
        if state in _DOWN and not manner(cell):
            self._down[plain] = state
        self._end(planned, state, message, seconds=time.monotonic() - started, case_id=case_id)

    def close(self) -> None:
        """End the pools."""
        self._resources.release()

    def _run(self, driver: Driver, case: AnyCase) -> Outcome:
        label = case.cell.label
        self._writer.write(BeginRecord(case.id, label, "capability", case))
        outcome = Outcome(Verdict.INFRA)
        try:
            outcome = driver.run(case)
        finally:
            ratio = min(outcome.ratio, 1e300)
            self._writer.write(
                EndRecord(
                    case.id, label, "capability", outcome.verdict, outcome.check, ratio, outcome.seconds, case.tokens
                )
            )
        return outcome

    def _torn_down(self, cell: AnyCell, outcome: Outcome) -> None:
        state, message = _state(outcome)
        self._end(self._probed[cell], state, f"when its processes ended: {message}")

    def _quarantined(self, planned: PlannedCell, barring: Sequence[Waiver]) -> None:
        reasons = "; ".join(f"{waiver.name}: {waiver.reason}" for waiver in barring)
        self._end(planned, Capability.QUARANTINED, reasons, tried=False)

    def _end(
        self,
        planned: PlannedCell,
        state: Capability,
        message: str,
        *,
        seconds: float = 0.0,
        case_id: str = "",
        tried: bool = True,
    ) -> None:
        cell = planned.cell
        self._note(
            CapabilityRecord(
                cell.backend,
                cell.kernel_type,
                cell.world_size,
                cell.nodes,
                standing="claimed" if planned.claimed else "unclaimed",
                state=state,
                message=message,
                manner=manner(cell),
                standin=backend(cell.backend, self._options.arch).standin,
                cell=cell.label,
                case_id=case_id,
                seconds=seconds,
                tried=tried,
            )
        )

    def _note(self, record: CapabilityRecord) -> None:
        self._writer.write(record)
        self._told(record)

    def _progress(self, text: str) -> None:
        with self._log.open("a") as log:
            log.write(f"{time.strftime('%H:%M:%S')} {text}\n")


def _state(outcome: Outcome) -> tuple[Capability, str]:
    """What an outcome says of a combination, and why."""
    if outcome.passed:
        return Capability.RUNS, ""
    if outcome.verdict in (Verdict.CRASH, Verdict.HANG):
        state = Capability.CRASHES if outcome.verdict is Verdict.CRASH else Capability.HANGS
        return state, outcome.text
    if outcome.verdict is Verdict.INFRA:
        return Capability.UNKNOWN, outcome.text
    if not outcome.check.startswith("raised."):
        return Capability.WRONG, outcome.text
    absent = outcome.check.removeprefix("raised.") in _ABSENT
    return Capability.NOT_BUILT if absent else Capability.REFUSED, outcome.text


def exit_code_of(records: Sequence[CapabilityRecord], names: Sequence[str]) -> ExitCode:
    """Exit code of a matrix.

    What is claimed and not built is the product's failure where anything else of its backend runs.

    Args:
        records: its entries.
        names: backends under test; what others cannot do is no failure of theirs.
    """
    mine = [record for record in records if record.backend in names]
    claimed = [record for record in mine if record.standing == "claimed"]
    there = {record.backend for record in mine if record.state is Capability.RUNS}
    bad = (Capability.WRONG, Capability.CRASHES, Capability.HANGS, Capability.REFUSED)
    if any(record.tried and record.state in bad for record in claimed):
        return ExitCode.PRODUCT_FAILURE
    if any(record.state is Capability.NOT_BUILT and record.backend in there for record in claimed):
        return ExitCode.PRODUCT_FAILURE
    states = {record.state for record in mine}
    if states & {Capability.UNKNOWN, Capability.NOT_BUILT}:
        return ExitCode.INFRASTRUCTURE
    return ExitCode.OK if Capability.RUNS in states else ExitCode.INCOMPLETE


def matrix_file(directory: Path) -> Path:
    """Where the records of a matrix go, in the directory of its run."""
    return directory / "capabilities.jsonl"
