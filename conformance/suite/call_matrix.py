"""The matrix of kernel types, wires, combine codecs, EP sizes, nodes and modes that a run covered, from its records.

``python -m conformance.suite.call_matrix [DIRECTORY]``, with a run's directory of records (the newest one below
``.conformance/records`` without): tables of distinct cases for every two choices, and what was refused, with its
reason. What a number does not say: that the third choice beside those two was every one that there is.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from pathlib import Path

from rich.console import Console
from rich.table import Table

from conformance.cases import Cell, LayerCell
from conformance.suite.records import CellRecord, EndRecord, Record, RunRecord, read_records
from conformance.verdicts import PRODUCT_FAILURES, Verdict

#: Choices by name.
CHOICES: dict[str, Callable[[Cell], str]] = {
    "kernel type": lambda cell: cell.kernel_type,
    "wire": lambda cell: cell.wire or cell.dtype,
    "codec": lambda cell: cell.codec or "none",
    "EP x nodes": lambda cell: f"{cell.world_size} x {cell.nodes}",
    "mode": lambda cell: ", ".join(cell.modes) or "plain",
    "combined in": lambda cell: cell.dtype,
    "sequence": lambda cell: cell.check,
}

#: Verdicts of cases that were judged; what ended otherwise says nothing.
JUDGED = PRODUCT_FAILURES | {Verdict.PASS}
Pair = tuple[str, str]  # two choices
Covered = dict[Pair, dict[tuple[str, str], set[str]]]


def covered(records: Iterable[Record]) -> Covered:
    """Ids of the generated cases that were judged, of every two values of every two choices.

    Companions and placement do not count.
    """
    found: Covered = {pair: defaultdict(set) for pair in combinations(CHOICES, 2)}
    records = list(records)
    cells = {
        record.label: record.cell
        for record in records
        if isinstance(record, CellRecord)
        and isinstance(record.cell, Cell)
        and not isinstance(record.cell, LayerCell)
        and not record.companion
        and record.cell.check != "placement"
    }
    for record in records:
        if not isinstance(record, EndRecord) or record.origin != "generated" or record.verdict not in JUDGED:
            continue
        if record.cell in cells:
            cell = cells[record.cell]
            for left, right in found:
                found[left, right][CHOICES[left](cell), CHOICES[right](cell)].add(record.case_id)
    return found


def refusals(records: Iterable[Record]) -> dict[tuple[str, str], list[str]]:
    """Places, by (kernel type, reason), of what a backend refuses."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for record in records:
        if isinstance(record, RunRecord):
            for entry in record.unsupported:
                place = f"{entry['world_size']} x {entry['nodes']}"
                found[entry["kernel_type"], entry["reason"]].append(place)
    return dict(found)


def show(records: Sequence[Record], console: Console) -> None:
    """Print the tables and the refusals."""
    for (left, right), cases in covered(records).items():
        rows, columns = (sorted({key[side] for key in cases}) for side in (0, 1))
        table = Table(title=f"distinct cases: {left} by {right}", title_justify="left")
        table.add_column(left)
        for column in columns:
            table.add_column(column, justify="right", overflow="fold")
        for row in rows:
            table.add_row(row, *(str(len(cases[row, column])) if (row, column) in cases else "-" for column in columns))
        console.print(table)
    for (kernel_type, reason), places in sorted(refusals(records).items()):
        console.print(f"refused: {kernel_type}, EP x nodes {', '.join(places)}: {reason}", markup=False, soft_wrap=True)


def main(arguments: Sequence[str]) -> int:
    """Print the matrix of one run; 1 if there are no records."""
    parent = Path(".conformance") / "records"
    directory = Path(arguments[0]) if arguments else newest(parent)
    if directory is None or not directory.is_dir():
        where = directory or f"{parent.absolute()}, of a run that planned cells"
        print(f"no records at {where}; run the suite first, or name the directory of a run", file=sys.stderr)
        return 1
    show(list(read_records(directory)), Console(width=160))
    return 0


def newest(parent: Path) -> Path | None:
    """The newest run of cells; a matrix of capabilities plans none."""
    runs = sorted((path for path in parent.glob("*") if path.is_dir()), reverse=True)
    return next((path for path in runs if _planned(path)), None)


def _planned(directory: Path) -> bool:
    return any(isinstance(record, RunRecord) and record.planned for record in read_records(directory))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
