"""Expert ids as they are dispatched. Torch-free, so the driver can spell them out too."""

from __future__ import annotations

from conformance.cases import Cell, Rows
from reference.placement import global_to_physical


def wire_rows(cell: Cell, rows: Rows) -> Rows:
    """Ids on the wire: global ids, or physical positions under round-robin placement (vLLM 0.33.0, routing tables)."""
    if cell.placement == "linear":
        return rows
    table = global_to_physical(cell.experts, cell.world_size)
    return tuple(tuple(tuple(table[e] if e >= 0 else e for e in row) for row in rank) for rank in rows)
