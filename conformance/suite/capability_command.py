"""``pytest conformance --capabilities``: probe the combinations of the options, print the matrix, record it.

It runs no cell. Combinations are tried one after the other, because each may take its processes down. A backend that
is not installed is in the matrix as not built. What the exit code says is that of a run: 1 if something that is claimed
does not work, 3 if nothing is known of a backend under test or the suite itself failed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest
from rich.console import Console
from rich.table import Table

from accelerated.registry import backend
from conformance.engine.pool import stop_forkserver
from conformance.suite import controller
from conformance.suite.capabilities import (
    IN_PART,
    Prober,
    exit_code_of,
    manner,
    matrix_file,
    quarantines,
    subjects,
    widened,
)
from conformance.suite.command import answered
from conformance.suite.failure import STANDIN_MARK
from conformance.suite.kernels import mori_kernel, uncompiled_kernels
from conformance.suite.options import Options
from conformance.suite.records import Capability, CapabilityRecord, RecordWriter
from conformance.verdicts import ExitCode


def run(options: Options) -> int:
    """Probe, print and record; the exit code.

    Raises:
        pytest.UsageError: the options ask for what this machine does not have.
    """
    return answered(partial(_answer, options))


def _answer(options: Options, console: Console) -> ExitCode:
    for name, given in (("--replay", options.tier == "replay"), ("--world", bool(options.world))):
        if given:
            raise pytest.UsageError(f"{name} is given with --capabilities, which starts its own ranks; leave one out")
    # Every operator is in the plan of explore, and nothing that only others are judged by.
    options = replace(options, tier="explore", companions=())
    missing = {name: text for name in options.backends if (text := _missing(name, options))}
    plan = controller.plan_of(options)
    present = replace(options, backends=tuple(name for name in options.backends if name not in missing))
    machine = controller.Machine()
    if present.backends:
        present, machine = controller.fit_to_machine(present)
        options = replace(options, ep_sizes=present.ep_sizes, arch=present.arch)
        plan = controller.plan_of(options)
    plan = widened(plan, options)
    directory = controller.new_run_directory(options)
    controller.open_run(replace(options, tier="capabilities"), (), (), directory, machine.gpus)
    writer = RecordWriter(matrix_file(directory))
    records: list[CapabilityRecord] = []

    def told(record: CapabilityRecord) -> None:
        records.append(record)
        if record.tried:
            console.print(f"{_place(record)}: {_text(record)}", markup=False)

    prober = Prober(options, machine.uuids, writer, told)
    try:
        wanted = subjects(plan, quarantines(options))
        some = {(p.cell.backend, p.cell.kernel_type, p.cell.world_size, p.cell.nodes, manner(p.cell)) for p in wanted}
        for entry in plan.unsupported:
            # Of a combination that takes some sizes and not others, those that it takes are tried.
            key = (entry.backend, entry.kernel_type, entry.world_size, entry.nodes, entry.manner)
            prober.refused(entry, in_part=key in some)
        there = tuple(planned for planned in plan.cells if planned.cell.backend not in missing)
        uncompiled = uncompiled_kernels(options, replace(plan, cells=there))
        able = []
        for planned in wanted:
            reason = missing.get(planned.cell.backend) or uncompiled.get(
                mori_kernel(planned.cell, options.arch) or "", ""
            )
            if reason:
                prober.absent(planned, reason)
            else:
                able.append(planned)
        for index, planned in enumerate(able, 1):
            prober.probe(planned, able[index] if index < len(able) else None)
    finally:
        prober.close()
        stop_forkserver()
        writer.close()
    print_matrix(records, console)
    code = exit_code_of(records, options.backends)
    console.print(
        f"{options.device}, contract of {options.arch}: exit {code.value}; records: {writer.path}", markup=False
    )
    return code


def _missing(name: str, options: Options) -> str:
    """What a backend itself lacks to run here; empty if nothing."""
    findings = backend(name, options.arch).preflight(options.device)
    return "; ".join(f"{finding.what} ({finding.remedy})" for finding in findings)


def print_matrix(records: Sequence[CapabilityRecord], console: Console) -> None:
    """Write a matrix for every backend, then every message once with the places that it is about."""
    for name in dict.fromkeys(r.backend for r in records):
        mine = [r for r in records if r.backend == name]
        places = sorted({(r.world_size, r.nodes) for r in mine})
        mark = " (STAND-IN)" if any(r.standin for r in mine) else ""
        table = Table(title=f"capabilities of {name}{mark}", title_justify="left")
        table.add_column("kernel type or operator", overflow="fold")
        for size, nodes in places:
            table.add_column(f"EP {size}" + (f"/{nodes} nodes" if nodes > 1 else ""), justify="right")
        shown: dict[str, dict[tuple[int, int], str]] = defaultdict(dict)
        for r in (r for r in mine if r.standing != IN_PART):
            shown[f"{r.kernel_type} {r.manner}".strip()][r.world_size, r.nodes] = _word(r)
        for row in sorted(shown):
            table.add_row(row, *(shown[row].get(place, "-") for place in places))
        console.print(table)
        console.print("-: not tried; wires, codecs and modes are tried by themselves, and together where the plan does")
    reasons: dict[str, list[str]] = defaultdict(list)
    for r in (r for r in records if r.message):
        reasons[f"{_word(r)}: {_brief(r.message)}"].append(_place(r))
    for text, where in sorted(reasons.items()):
        more = f" and {len(where) - 1} more" if len(where) > 1 else ""
        console.print(f"{text} [{where[0]}{more}]", markup=False)
    if any(r.standin for r in records):
        console.print(STANDIN_MARK, markup=False)


def _place(r: CapabilityRecord) -> str:
    nodes = f" on {r.nodes} nodes" if r.nodes > 1 else ""
    return f"{r.backend} {r.kernel_type}{f' {r.manner}' if r.manner else ''} EP {r.world_size}{nodes}"


def _word(r: CapabilityRecord) -> str:
    """Standing where it runs, what became of it otherwise."""
    return r.standing if r.state is Capability.RUNS or r.standing == IN_PART else r.state.value


def _text(r: CapabilityRecord) -> str:
    return f"{_word(r)}{f' ({_brief(r.message)})' if r.message else ''}"


def _brief(message: str) -> str:
    """First and last line of a message: what happened, and how the library put it."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[0] if len(lines) < 2 else f"{lines[0]} {lines[-1]}"
