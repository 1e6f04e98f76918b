"""The verdict of a run and its terminal summary, from the records alone.

What the summary never does: let a stand-in's result read as hardware's; the banner says so in large letters.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from conformance.suite.records import BeginRecord, CellRecord, EndRecord, Record, RunRecord
from conformance.verdicts import PRODUCT_FAILURES, ExitCode, Verdict, exit_code


@dataclass
class Totals:
    """Everything the summary prints."""

    run: RunRecord | None = None
    cells: list[CellRecord] = field(default_factory=list)
    ends: list[EndRecord] = field(default_factory=list)
    unmatched: list[BeginRecord] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)
    lost_worker: bool = False

    @property
    def verdicts(self) -> list[Verdict]:
        """Verdict of every planned cell."""
        return [c.verdict for c in self.cells] + [Verdict.NOT_RUN] * len(self.not_run)

    @property
    def exit_code(self) -> ExitCode:
        """Exit code of the run."""
        return exit_code(self.verdicts, lost_worker=self.lost_worker)


def total(records: Iterable[Record], *, lost_worker: bool = False, collected: Iterable[str] | None = None) -> Totals:
    """Fold records into totals.

    Args:
        records: all records of one run.
        lost_worker: True if a worker process died.
        collected: labels of the cells that were selected to run; None means all planned ones.
    """
    totals = Totals(lost_worker=lost_worker)
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
        else:
            totals.ends.append(record)
            open_cases[(record.cell, record.case_id)] -= 1
    totals.unmatched = [begun[key] for key, count in open_cases.items() if count > 0]
    finished = {c.label for c in totals.cells}
    wanted = collected if collected is not None else (totals.run.planned if totals.run else ())
    totals.not_run = sorted(set(wanted) - finished)
    return totals


def print_summary(totals: Totals, console: Console) -> None:
    """Write the summary."""
    if totals.run is None:
        return
    _print_coverage(totals, console)
    _print_failures(totals, console)
    _print_unsupported(totals, console)
    run = totals.run
    where = f"{run.device}, contract of {run.arch}, tier {run.tier}"
    if run.standins:
        console.print(
            Panel(
                f"A STAND-IN WAS USED: {', '.join(run.standins)}\n"
                "NO AMD HARDWARE AND NO MoRI WAS TESTED. A pass here says that the suite, the reference and the "
                "adapter agree with a software double.",
                title="STAND-IN",
                style="bold",
            )
        )
    code = totals.exit_code
    console.print(f"{where}: exit {code.value} ({code.name.lower().replace('_', ' ')})")


def _print_coverage(totals: Totals, console: Console) -> None:
    generated: dict[tuple[str, str, int], set[str]] = defaultdict(set)
    worst: dict[tuple[str, str, int], float] = defaultdict(float)
    status: dict[tuple[str, str, int], set[Verdict]] = defaultdict(set)
    sizes: set[int] = set()
    for record in totals.cells:
        cell = record.cell
        row = (cell.backend + (" (STAND-IN)" if record.standin else ""), cell.kernel_type, cell.nodes)
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
        generated[(cell.backend + (" (STAND-IN)" if owner.standin else ""), cell.kernel_type, cell.world_size)].add(
            end.case_id
        )
    table = Table(title="distinct cases, worst error/bound", title_justify="left")
    table.add_column("backend")
    table.add_column("kernel type")
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
    console.print("classes hit: " + ", ".join(f"{name} {count}" for name, count in sorted(hits.items())))


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
    if totals.not_run:
        console.print(f"NOT RUN: {len(totals.not_run)} cells, first {totals.not_run[0]}", soft_wrap=True)


def _print_unsupported(totals: Totals, console: Console) -> None:
    assert totals.run is not None
    reasons: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for entry in totals.run.unsupported:
        nodes = f" on {entry['nodes']} nodes" if entry["nodes"] > 1 else ""
        reasons[(entry["backend"], entry["kernel_type"], entry["reason"])].append(f"EP {entry['world_size']}{nodes}")
    for (backend, kernel_type, reason), places in sorted(reasons.items()):
        console.print(
            f"UNSUPPORTED: {backend} {kernel_type}, {', '.join(places)}: {reason}", markup=False, soft_wrap=True
        )
