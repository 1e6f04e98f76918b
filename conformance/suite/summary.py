"""The verdict of a run and its terminal summary, from the records and what pytest reported besides.

What the summary never does: let a stand-in's result read as hardware's; the banner says so in large letters.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from conformance.cases import AnyCell, LayerCell
from conformance.row_cases import RowCell
from conformance.suite.records import BeginRecord, CellRecord, EndRecord, Record, RunRecord
from conformance.suite.soak_summary import soak_lines, soaked_rounds
from conformance.suite.waiver_summary import emptied_cells, print_waivers, stale_waivers
from conformance.verdicts import PRODUCT_FAILURES, ExitCode, Verdict, exit_code

#: Verdicts with which a test item does not fail.
_NOT_FAILED = frozenset({Verdict.PASS, Verdict.FINDING, Verdict.XFAIL, Verdict.QUARANTINED})
#: Verdicts that follow from judging.
_JUDGED = PRODUCT_FAILURES | {Verdict.XFAIL, Verdict.XPASS}
#: How a yardstick's record begins to say that it is off, whatever was judged by it.
YARDSTICK_OFF = "the reference disagrees"


@dataclass
class Ended:
    """How the run ended, as far as the records cannot tell: what pytest reported to the process that started it."""

    lost_worker: bool = False
    interrupted: bool = False
    failed: dict[str, str] = field(default_factory=dict)  # failed items, with the label of their cell or ""


@dataclass
class Totals:
    """Everything the summary prints."""

    run: RunRecord | None = None
    cells: list[CellRecord] = field(default_factory=list)
    ends: list[EndRecord] = field(default_factory=list)
    unmatched: list[BeginRecord] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)  # failed items that no failed cell stands for
    ended: Ended = field(default_factory=Ended)
    soaked: dict[tuple[str, str], int] = field(default_factory=dict)  # rounds by backend and kernel type

    @property
    def verdicts(self) -> list[Verdict]:
        """Verdict of every planned cell, and of everything else that failed."""
        not_run = [Verdict.NOT_RUN] * (len(self.not_run) + self.ended.interrupted)
        return [c.verdict for c in self.cells] + not_run + [Verdict.INFRA] * len(self.strays)

    @property
    def exit_code(self) -> ExitCode:
        """Exit code of the run."""
        stale = bool(stale_waivers(self.run, self.cells) or emptied_cells(self.cells))
        return exit_code(self.verdicts, lost_worker=self.ended.lost_worker, stale_waivers=stale)


def total(records: Iterable[Record], ended: Ended | None = None) -> Totals:
    """Fold records into totals.

    Args:
        records: all records of one run.
        ended: what pytest reported besides.
    """
    totals = Totals(ended=ended or Ended())
    open_cases: Counter[tuple[str, str]] = Counter()
    begun: dict[tuple[str, str], BeginRecord] = {}
    for record in records:
        if isinstance(record, RunRecord):
            totals.run = record
        elif isinstance(record, CellRecord):
            totals.cells.append(record)
        elif isinstance(record, BeginRecord):
            open_cases[(record.cell, record.case_id)] += 1
            begun[(record.cell, record.case_id)] = record
        elif isinstance(record, EndRecord):
            totals.ends.append(record)
            open_cases[(record.cell, record.case_id)] -= 1
    totals.unmatched = [begun[key] for key, count in open_cases.items() if count > 0]
    totals.soaked = soaked_rounds(totals.ends, begun)
    _count_cut_off(totals, begun)
    _void_what_was_judged_wrongly(totals)
    finished = {c.label for c in totals.cells}
    totals.not_run = sorted(set(totals.run.planned if totals.run else ()) - finished)
    bad = Counter(c.label for c in totals.cells if c.verdict not in _NOT_FAILED)
    for item, label in totals.ended.failed.items():
        if not label or bad[label] <= 0:
            totals.strays.append(item)
        bad[label] -= 1
    return totals


def _count_cut_off(totals: Totals, begun: dict[tuple[str, str], BeginRecord]) -> None:
    """Give a cell that was lost or interrupted after a case of it had failed that case's verdict."""
    judged = {c.label for c in totals.cells if c.verdict is not Verdict.NOT_RUN}
    unclaimed = totals.run.unclaimed if totals.run else ()
    for end in totals.ends:
        gating = end.origin in ("generated", "replay") or (end.origin == "waived" and not end.expected)
        gates = gating and end.verdict in PRODUCT_FAILURES
        if not gates or end.cell in judged or end.cell in unclaimed or (end.cell, end.case_id) not in begun:
            continue
        judged.add(end.cell)
        verdict, reason = end.verdict, f"case {end.case_id} failed {end.check}; what followed was cut off"
        if totals.run and end.cell in totals.run.yardsticks:
            verdict, reason = Verdict.INFRA, f"{YARDSTICK_OFF} with the oracle: {reason}"
        cell = begun[end.cell, end.case_id].case.cell
        totals.cells = [c for c in totals.cells if c.label != end.cell or c.verdict is not Verdict.NOT_RUN]
        totals.cells.append(
            CellRecord(
                label=end.cell,
                cell=cell,
                verdict=verdict,
                standin=totals.run is not None and cell.backend in totals.run.standins,
                companion=totals.run is not None and end.cell in totals.run.yardsticks,
                distinct=0,
                planned=0,
                ratio=end.ratio,
                seconds=end.seconds,
                reason=reason,
            )
        )


def _void_what_was_judged_wrongly(totals: Totals) -> None:
    """Where the yardstick is off, nothing is known of what was judged by it: the same subject on as many ranks."""
    off = {
        (_subject(c.cell), c.cell.world_size): c
        for c in totals.cells
        if c.companion and c.verdict is Verdict.INFRA and c.reason.startswith(YARDSTICK_OFF)
    }
    for index, record in enumerate(totals.cells):
        yardstick = off.get((_subject(record.cell), record.cell.world_size))
        if yardstick is None or record.verdict not in _JUDGED:
            continue
        if record.cell.backend != yardstick.cell.backend:
            reason = f"{yardstick.reason} (void: {record.verdict.value} {record.summary or record.reason})"
            totals.cells[index] = msgspec.structs.replace(record, verdict=Verdict.INFRA, reason=reason, summary="")


def _subject(cell: AnyCell) -> str:
    """What part of the reference a cell is judged by; a compiler that is off says nothing about anything else."""
    if isinstance(cell, LayerCell):
        # Experts of one scheme say nothing about those of another; a sort has no yardstick but its model.
        return cell.check if cell.check == "sort" else cell.kernel_type.rpartition(".")[2].partition("@")[0]
    if isinstance(cell, RowCell) and cell.check == "compiled":
        return cell.check
    return cell.family.value if isinstance(cell, RowCell) else "dispatch and combine"


def print_summary(totals: Totals, console: Console) -> None:
    """Write the summary."""
    run = totals.run
    where = "no run was opened"
    if run is not None:
        where = f"{run.device}, contract of {run.arch}, tier {run.tier}"
        where += f", transport {run.transport}" if run.transport not in ("", "p2p") else ""
        where += f", launched world of {run.world}" if run.world else ""
        _print_coverage(totals, console)
    _print_failures(totals, console)
    if run is not None:
        print_waivers(run, totals.cells, console)
        _print_unsupported(run, console)
    if run is not None and run.standins:
        console.print(
            Panel(
                f"A STAND-IN WAS USED: {', '.join(run.standins)}\n"
                "NO AMD HARDWARE WAS TESTED, AND NOTHING OF THE LIBRARIES THEY STAND IN FOR. A pass here says that the "
                "suite, the reference and the adapters agree with a software double.",
                title="STAND-IN",
                style="bold",
            )
        )
    if run is not None and run.caveats:
        console.print(Panel("\n".join(run.caveats), title="CAVEAT", style="bold"))
    code = totals.exit_code
    console.print(f"{where}: exit {code.value} ({code.name.lower().replace('_', ' ')})")


def _print_coverage(totals: Totals, console: Console) -> None:
    generated: dict[tuple[str, str, int], set[str]] = defaultdict(set)
    worst: dict[tuple[str, str, int], float] = defaultdict(float)
    status: dict[tuple[str, str, int], set[Verdict]] = defaultdict(set)
    sizes: set[int] = set()
    for record in totals.cells:
        cell = record.cell
        row = (cell.backend + (" (STAND-IN)" if record.standin else ""), _line_of(record), cell.nodes)
        key = (*row[:2], cell.world_size)
        sizes.add(cell.world_size)
        status[key].add(record.verdict)
        worst[key] = max(worst[key], record.ratio)
    names = {c.label: c for c in totals.cells}
    hits: Counter[str] = Counter()
    seen: set[str] = set()
    tokens: list[int] = []
    for end in totals.ends:
        if end.origin not in ("generated", "replay") or end.cell not in names or end.case_id in seen:
            continue
        owner = names[end.cell]
        cell = owner.cell
        seen.add(end.case_id)
        hits.update(end.classes)
        if cell.world_size > 1:
            tokens.append(end.tokens)
        name = cell.backend + (" (STAND-IN)" if owner.standin else "")
        generated[(name, _line_of(owner), cell.world_size)].add(end.case_id)
    table = Table(title="distinct cases, worst error/bound", title_justify="left")
    table.add_column("backend", overflow="fold")
    table.add_column("kernel type or operators", overflow="fold")
    for size in sorted(sizes):
        table.add_column(f"EP {size}", justify="right")
    for backend, kernel_type in sorted({key[:2] for key in status}):
        row_cells = []
        for size in sorted(sizes):
            key = (backend, kernel_type, size)
            row_cells.append(_table_cell(len(generated[key]), worst[key], status[key]) if key in status else "-")
        table.add_row(backend, kernel_type, *row_cells)
    console.print(table)
    wide = sum(len(ids) for (_, _, size), ids in generated.items() if size > 1)
    tokens.sort()
    middle = tokens[len(tokens) // 2] if tokens else 0
    shapes = sorted({c.cell.model for c in totals.cells if c.cell.model})
    console.print(
        f"{wide} distinct cases with EP 2 or more, median {middle} tokens; model shapes: {', '.join(shapes) or 'none'}"
    )
    for check in sorted({c.cell.check for c in totals.cells}):
        own = {end.case_id for end in totals.ends if end.cell in names and names[end.cell].cell.check == check}
        console.print(f"property {check}: {len(own & seen)} distinct cases")
    for line in soak_lines(totals.soaked):
        console.print(line, markup=False, soft_wrap=True)
    console.print("classes hit: " + ", ".join(f"{name} {count}" for name, count in sorted(hits.items())))


def _line_of(record: CellRecord) -> str:
    """Which line of the table a cell counts in: there are so many row operators that those that pass share one."""
    cell = record.cell
    if isinstance(cell, RowCell) and record.verdict is Verdict.PASS:
        return cell.family.value
    return cell.kernel_type


def _table_cell(cases: int, worst: float, verdicts: set[Verdict]) -> str:
    bad = sorted(v.value for v in verdicts if v is not Verdict.PASS)
    bound = f"{worst:.2f}" if worst <= 1e6 else "inf"
    return f"{cases} {bound}" + (f" {' '.join(bad)}" if bad else "")


def _print_failures(totals: Totals, console: Console) -> None:
    order = (*PRODUCT_FAILURES, Verdict.INFRA, Verdict.MISTRUSTED, Verdict.FINDING)
    for verdict in order:
        for record in (c for c in totals.cells if c.verdict is verdict):
            detail = record.summary or record.reason.splitlines()[0] if record.summary or record.reason else ""
            console.print(f"{verdict.value}: {record.label}: {detail}", markup=False, soft_wrap=True)
            if record.failure:
                console.print(f"    {record.failure}/report.txt", markup=False, soft_wrap=True)
    for begun in totals.unmatched:
        console.print(
            f"INFRA: case {begun.case_id} of {begun.cell} was under way when its worker was lost", soft_wrap=True
        )
    for item in totals.strays:
        console.print(f"INFRA: {item} failed outside of its cell", markup=False, soft_wrap=True)
    if totals.not_run:
        console.print(f"NOT RUN: {len(totals.not_run)} cells, first {totals.not_run[0]}", soft_wrap=True)


def _print_unsupported(run: RunRecord, console: Console) -> None:
    reasons: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for entry in run.unsupported:
        nodes = f" on {entry['nodes']} nodes" if entry["nodes"] > 1 else ""
        reasons[(entry["backend"], entry["kernel_type"], entry["reason"])].append(f"EP {entry['world_size']}{nodes}")
    for (backend, kernel_type, reason), places in sorted(reasons.items()):
        console.print(
            f"UNSUPPORTED: {backend} {kernel_type}, {', '.join(places)}: {reason}", markup=False, soft_wrap=True
        )
