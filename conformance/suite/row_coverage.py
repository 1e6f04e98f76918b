"""Input classes that a case of a row operator hits; a cell without the needed ones is MISTRUSTED.

What a hit class does not prove: that the backend took a different path because of it.
"""

from __future__ import annotations

from accelerated.operators import Family
from conformance.row_cases import RowCase, RowCell


def classes(case: RowCase) -> tuple[str, ...]:
    """Names of the classes that any call of the case hits."""
    hit: set[str] = set()
    for call in case.calls:
        hit |= {f"rows {p.kind}" for p in call.patterns[: max(call.rows, 0)]}
        if call.rows == 0:
            hit.add("no rows")
        if call.rows == case.cell.capacity:
            hit.add("rows at capacity")
        if 0 <= call.num_rows < call.rows:
            hit.add("rows beyond the count")
        if any(call.delays_ms):
            hit.add("delayed rank")
    return tuple(sorted(hit))


def required(cell: RowCell, *, empty: bool, short: bool = False) -> frozenset[str]:
    """Classes without which a cell's checks mean nothing.

    ``empty``: calls without rows are legal; ``short``: the kinds of rows are another cell's.
    """
    if cell.check == "codecs":
        return frozenset({"rows every_code"})
    if cell.family is Family.ROUTE:
        # Without these nothing is known of ids that must stay distinct where there is nothing to choose by.
        own = {"rows normal", "rows all_masked"} | (set() if short else {"rows ties", "rows nan", "rows one_hot"})
        return frozenset(own | ({"no rows"} if empty else set()))
    own = {"rows normal", "rows row_scaled"} if short else {"rows normal", "rows zero", "rows ties"}
    return frozenset(own | ({"no rows"} if empty else set()))
