"""Two runs cell by cell: ``python -m conformance.suite.compare BEFORE AFTER``.

Each is a run's directory of records, or an ``--output-dir`` of which the newest run of cells is taken. What is told:
cells whose verdict is another one, cells that only one of the runs has, and cells whose largest error over bound rose.
Exit status 1 where a verdict is another one or a cell is gone. What equal verdicts do not prove: that both runs saw the
same cases, unless suite, tier and architecture are the same; what differs there is told first.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from conformance.suite.call_matrix import newest
from conformance.suite.records import CellRecord, RunRecord, read_records
from conformance.suite.summary import Totals, total

#: In the place of a verdict where a run has no such cell.
_NONE = "no such cell"


def settings(before: RunRecord, after: RunRecord) -> Iterator[str]:
    """What of the runs themselves differs, one line each."""
    for name in ("suite_version", "tier", "backends", "device", "arch", "transport", "world"):
        old, new = getattr(before, name), getattr(after, name)
        if old != new:
            yield f"the runs differ in {name}: {old} -> {new}; their cases need not be the same"


def changes(before: Totals, after: Totals) -> Iterator[str]:
    """Cells with another verdict and cells that only one run has, one line each."""
    old, new = _verdicts(before), _verdicts(after)
    cells = {cell.label: cell for cell in (*before.cells, *after.cells)}
    for label in sorted(old.keys() | new.keys()):
        was, now = old.get(label, _NONE), new.get(label, _NONE)
        if was != now:
            cell = cells.get(label)
            told = (cell.summary or cell.reason).partition("\n")[0] if cell is not None else ""
            yield f"{was} -> {now}: {label}{f': {told}' if told else ''}"


def rises(before: Totals, after: Totals) -> Iterator[str]:
    """Cells with the same verdict and a larger error over bound, the largest rise first, one line each."""
    old = {cell.label: cell for cell in before.cells}
    pairs = [(old[cell.label], cell) for cell in after.cells if cell.label in old]
    risen = [pair for pair in pairs if pair[0].verdict is pair[1].verdict and pair[1].ratio > pair[0].ratio]
    for was, now in sorted(risen, key=_rise, reverse=True):
        yield f"largest error over bound {was.ratio:.4g} -> {now.ratio:.4g}: {now.label}"


def _rise(pair: tuple[CellRecord, CellRecord]) -> float:
    return pair[1].ratio - pair[0].ratio


def _verdicts(totals: Totals) -> dict[str, str]:
    return {cell.label: cell.verdict.value for cell in totals.cells} | dict.fromkeys(totals.not_run, "NOT RUN")


def main(arguments: Sequence[str]) -> int:
    """Print what differs; 1 if a verdict does or a cell is gone, 2 if there is nothing to compare."""
    if len(arguments) != 2:
        print("give two directories: python -m conformance.suite.compare BEFORE AFTER", file=sys.stderr)
        return 2
    runs = []
    for given in map(Path, arguments):
        directory = newest(given / "records") or given
        totals = total(read_records(directory))
        if totals.run is None:
            print(f"no run at {given}; name an --output-dir or a directory below its records", file=sys.stderr)
            return 2
        runs.append(totals)
    before, after = runs
    assert before.run is not None
    assert after.run is not None
    for line in settings(before.run, after.run):
        print(line)
    changed = list(changes(before, after))
    for line in (*changed, *rises(before, after)):
        print(line)
    same = len(_verdicts(before).items() & _verdicts(after).items())
    print(f"{same} cells have the same verdict, {len(changed)} have not")
    return 1 if any(not line.startswith(_NONE) for line in changed) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
