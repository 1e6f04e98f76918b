"""``pytest conformance --hazards NAME,...``: look for known hazards, each in a pool of its own, print and record.

It runs no cell. On hardware some probes write out of bounds, kill ranks or hang: they take every GPU of the machine for
themselves, come last, and run only because they were asked for. What is PRESENT does not fail the command unless
``--gate-hazards`` is given; what the exit code says otherwise is that of a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest
from rich.console import Console

from accelerated.layer import halves_of
from accelerated.registry import backend
from conformance.cases import Cell
from conformance.engine.pool import stop_forkserver
from conformance.hazards.catalogue import PROBES
from conformance.hazards.judge import HazardState
from conformance.hazards.probe import Probe
from conformance.hazards.prober import Prober
from conformance.suite import controller
from conformance.suite.cells import Plan, PlannedCell
from conformance.suite.command import answered
from conformance.suite.failure import STANDIN_MARK
from conformance.suite.kernels import uncompiled_kernels
from conformance.suite.options import Options, takes_transport
from conformance.suite.records import HazardRecord, RecordWriter
from conformance.verdicts import ExitCode


def run(options: Options) -> int:
    """Probe, print and record; the exit code.

    Raises:
        pytest.UsageError: the options ask for what this machine does not have, or what a probe does not take.
    """
    return answered(partial(_answer, options))


def _answer(options: Options, console: Console) -> ExitCode:
    options = replace(options, backends=subjects(options), companions=(), tier="hazards")
    _refuse(options)
    wanted = [PROBES[name] for name in PROBES if name in options.hazards]
    # Each probe has its own EP size; what is wider than the machine is not tried.
    options, machine = controller.fit_to_machine(options)
    directory = controller.new_run_directory(options)
    controller.open_run(options, (), (), directory, machine.gpus)
    writer = RecordWriter(directory / "hazards.jsonl")
    records: list[HazardRecord] = []

    def told(record: HazardRecord) -> None:
        records.append(record)
        console.print(described(record), markup=False)

    try:
        for name in options.backends:
            standin = backend(name, options.arch).standin
            console.print(f"hazards of {name}{' (STAND-IN)' if standin else ''}:", markup=False)
            prober = Prober(options, name, machine.uuids, writer, told)
            reasons = {} if standin else uncompiled(options, name, [p for p in wanted if not prober.fits(p)[1]])
            for probe in wanted:
                lacking = [kind for kind in probe.kernel_types if kind in reasons]
                if lacking:
                    prober.untested(probe, reasons[lacking[0]])
                else:
                    prober.probe(probe)
    finally:
        stop_forkserver()
        writer.close()
    code = exit_code_of(records, gate=options.gate_hazards)
    console.print(totals(records), markup=False)
    if any(r.standin for r in records):
        console.print(STANDIN_MARK, markup=False)
    console.print(f"exit {code.value}; records: {writer.path}", markup=False)
    return code


def subjects(options: Options) -> tuple[str, ...]:
    """MoRI and its double, of the backends under test and their halves.

    Raises:
        pytest.UsageError: neither is among them.
    """
    halves = (half.name for name in options.backends for half in halves_of(backend(name, options.arch)))
    found = tuple(dict.fromkeys(name for name in halves if takes_transport(name)))
    if not found:
        given = ", ".join(options.backends)
        raise pytest.UsageError(f"--hazards are MoRI's, and none of {given!r} is; give --backend mori or mori-standin")
    return found


def _refuse(options: Options) -> None:
    """Options that say what a run consists of; a probe has its own sizes.

    Raises:
        pytest.UsageError: one of them is given.
    """
    for name, given in (
        ("--replay", bool(options.replay)),
        ("--world", bool(options.world)),
        ("--ep-sizes", options.ep_sizes_given),
        ("--kernel-type", bool(options.kernel_types)),
        ("--operator", bool(options.operators)),
        ("--model", options.only_models),
        ("--waivers", bool(options.waivers)),
    ):
        if given:
            raise pytest.UsageError(f"{name} is given with --hazards, whose probes have their own sizes; leave it out")


def uncompiled(options: Options, name: str, probes: Sequence[Probe]) -> dict[str, str]:
    """Kernel types that do not compile on this machine, with the reason; each is compiled once, before any probe."""
    found: dict[str, str] = {}
    for kind in sorted({kind for probe in probes for kind in probe.kernel_types}):
        cell = Cell("hazard", name, kind, 4, 1, 8, 8, 2, 4, "bfloat16", "drained")
        failed = uncompiled_kernels(options, Plan((PlannedCell(cell, 1, claimed=False),), ()))
        if failed:
            found[kind] = f"{kind} does not compile: {', '.join(failed.values())}"
    return found


def described(record: HazardRecord) -> str:
    """A record in words: verdict, where the hazard is recorded, what was seen, and what shows it again."""
    probe = PROBES[record.hazard]
    joint = " " if record.rounds else ": "
    place = "" if probe.never else f" {probe.place} {record.arch}"
    lines = [f"{record.state:8} {record.hazard} [{record.reference}]{place}"]
    lines += [f"         {probe.text}"]
    lines += [f"         {record.state}{joint}{record.text}"]
    lines += [f"         {line}" for stack in record.stacks for line in stack.splitlines()]
    if record.tried:
        lines.append(f"         again: {record.command}")
    return "\n".join(lines)


def totals(records: Sequence[HazardRecord]) -> str:
    """How many of each verdict, the names of what is PRESENT and of what was not answered."""
    count = {state: [r.hazard for r in records if r.state == state.value] for state in HazardState}
    told = ", ".join(f"{len(names)} {state.value}" for state, names in count.items())
    present = count[HazardState.PRESENT]
    lines = [f"hazards: {told}"]
    lines += [f"PRESENT: {', '.join(present)}"] * bool(present)
    lines += [f"UNTESTED here: {', '.join(unanswered(records))}"] * bool(unanswered(records))
    return "\n".join(lines)


def unanswered(records: Sequence[HazardRecord]) -> list[str]:
    """Hazards that are UNTESTED though this suite can look for them."""
    return [r.hazard for r in records if r.state == HazardState.UNTESTED.value and not PROBES[r.hazard].never]


def exit_code_of(records: Sequence[HazardRecord], *, gate: bool) -> ExitCode:
    """Exit code of a report: PRESENT gates if asked, and then so does what was asked for and not looked for.

    A probe that broke or ended unexpectedly says nothing, nor does a report in which nothing could be looked for.
    """
    if gate and any(r.state == HazardState.PRESENT.value for r in records):
        return ExitCode.PRODUCT_FAILURE
    if any(r.broken for r in records):
        return ExitCode.INFRASTRUCTURE
    ran = any(r.tried and r.state != HazardState.UNTESTED.value for r in records)
    lost = any(r.unexpected and r.state == HazardState.UNTESTED.value for r in records)
    lost = lost or (gate and bool(unanswered(records)))
    return ExitCode.OK if ran and not lost else ExitCode.INCOMPLETE
