"""What the summary says of waivers, from the records.

Every entry of the file has its line, whether it did something or not. What it never says: that something waived passed
for being waived.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console

from conformance.suite.records import CellRecord, RunRecord, WaivedRecord
from conformance.suite.waiver_state import APPLIED, IDLE, STALE
from conformance.verdicts import Verdict

#: Cells of one verdict that have a line of their own.
_SHOWN = 6


def stale_waivers(run: RunRecord | None, cells: Sequence[CellRecord]) -> dict[int, str]:
    """Entries that keep nothing that there is from being drawn, with the reason.

    One whose cells all ended and had no case that it covers is stale as well.
    """
    if run is None:
        return {}
    found = {waiver.entry: waiver.detail for waiver in run.waivers if waiver.state == STALE}
    finished = [c for c in cells if c.verdict in (Verdict.PASS, Verdict.XFAIL, Verdict.XPASS, Verdict.QUARANTINED)]
    for waiver in run.waivers:
        mine = [w for c in finished for w in c.waived if w.entry == waiver.entry]
        reached = any(w.avoided or w.verdict is Verdict.QUARANTINED for w in mine)
        if waiver.state == APPLIED and len(mine) == waiver.cells and not reached:
            found[waiver.entry] = "none of the cases that its cells draw is covered; mend its case table or remove it"
    return found


def emptied_cells(cells: Sequence[CellRecord]) -> list[CellRecord]:
    """Cells of which waivers left nothing to be drawn, and in which nothing failed as they say."""
    return [c for c in cells if 0 < c.planned <= c.lacking and c.verdict is not Verdict.XFAIL]


def print_waivers(run: RunRecord, cells: Sequence[CellRecord], console: Console) -> None:
    """A line for the first cells that are not what they would be without waivers, then one for every entry."""
    for verdict in (Verdict.XPASS, Verdict.XFAIL, Verdict.QUARANTINED):
        found = [c for c in cells if c.verdict is verdict]
        for record in found[:_SHOWN]:
            line = record.reason.partition("\n")[0]
            console.print(f"{verdict.value}: {record.label}: {line}", markup=False, soft_wrap=True)
        if len(found) > _SHOWN:
            console.print(f"{verdict.value}: and {len(found) - _SHOWN} more cells, which the records name")
    lacking = [c for c in cells if c.lacking]
    if lacking:
        missing, budget = sum(c.lacking for c in lacking), sum(c.planned for c in lacking)
        console.print(
            f"WAIVED: {len(lacking)} cells lack {missing} of {budget} cases, because what they draw is waived",
            soft_wrap=True,
        )
    if emptied := emptied_cells(cells):
        console.print(
            f"WAIVED: nothing is left to be drawn of {len(emptied)} cells, first {emptied[0].label}; narrow a waiver's "
            "case table, or leave it out if these cells are meant as a whole",
            markup=False,
            soft_wrap=True,
        )
    stale = stale_waivers(run, cells)
    for waiver in run.waivers:
        name = f"waiver {waiver.entry} ({waiver.issue})"
        if waiver.entry in stale:
            text = f"STALE WAIVER: {name}: {stale[waiver.entry]}"
        elif waiver.state == IDLE:
            text = f"{name}: not applied: {waiver.detail}"
        else:
            text = f"{name}: {_totals(waiver.cells, [w for c in cells for w in c.waived if w.entry == waiver.entry])}"
            text += f", {waiver.detail}" if waiver.detail else ""
        console.print(f"{text}: {waiver.reason}", markup=False, soft_wrap=True)


def _totals(planned: int, mine: Iterable[WaivedRecord]) -> str:
    mine = list(mine)
    avoided, sampled, failed = (sum(getattr(w, name) for w in mine) for name in ("avoided", "sampled", "failed"))
    if any(w.verdict is Verdict.QUARANTINED for w in mine):
        return f"quarantined in {len(mine)} of {planned} cells, {avoided} drawn cases not launched"
    return (
        f"{len(mine)} of {planned} cells, {avoided} drawn cases taken out, {failed} of {sampled} sampled failed as "
        "expected"
    )
