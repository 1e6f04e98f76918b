"""Input classes that a case of the experts or of a whole layer hits; a cell without the needed ones is MISTRUSTED.

What a hit class does not prove: that the backend took a different path because of it.
"""

from __future__ import annotations

from conformance.cases import Case, LayerCase, LayerCell, expand
from conformance.suite import coverage
from reference.placement import physical_to_global


def classes(case: LayerCase) -> tuple[str, ...]:
    """Names of the classes that any round of the case hits."""
    cell = case.cell
    # Under replicas the ranks follow from the placement: what the exchange's classes say of ids would be of others.
    hit = set() if cell.redundant else set(coverage.classes(Case(cell, case.rounds)))
    per_shard = max(cell.logical // cell.shards, 1)
    for a_round in case.rounds:
        hit.add(f"values {a_round.values}")
        hit.add(f"weights {a_round.weighting}")
        if a_round.tail:
            hit.add("rows beyond the count")
        if a_round.quantised:
            hit.add("quantised rows")
        if a_round.relation:
            hit.add(f"relation {a_round.relation}")
        if a_round.physical:
            hit.add("experts moved")
        if a_round.physical and a_round.physical == physical_to_global(cell.experts, cell.world_size):
            hit.add("round-robin placement")
        if cell.redundant or cell.shards > 1:
            rows = [row for tokens in expand(cell, a_round.routing) for row in tokens]
            named = {e for row in rows for e in row if e >= 0}
            if cell.shards > 1 and rows and not any(e % per_shard == 0 for e in named):
                hit.add("no token for a first expert")
            if cell.shards > 1 and rows and len({e // per_shard for e in named}) < cell.shards:
                hit.add("shard without tokens")
    return tuple(sorted(hit))


def required(
    cell: LayerCell, *, short: bool, masked: bool, quantised: bool, duplicates: bool = True, round_robin: bool = False
) -> frozenset[str]:
    """Classes without which a cell's checks mean nothing.

    Args:
        cell: the cell.
        short: what does not depend on the size is another cell's.
        masked: part of the cases is for masked slots.
        quantised: rows may come quantised.
        duplicates: a row may name an expert twice.
        round_robin: part of the cases is for that placement.
    """
    if cell.whole:
        own = {"experts moved"} if cell.redundant else {"row crosses ranks"} if cell.world_size > 1 else set()
        own |= {"round-robin placement"} if round_robin else set()
        return frozenset(own | ({"masked slot"} if masked and not cell.redundant else set()))
    if short:
        return frozenset({"weights signed"})
    if cell.check == "sort":
        return frozenset({"weights signed", *({"no token for a first expert"} if cell.shards > 1 else ())})
    own = {"weights signed", "weights zeros", "values integers", "values wide"}
    own |= {"duplicate expert"} if duplicates and cell.top_k > 1 else set()
    own |= {"no token for a first expert", "shard without tokens"} if cell.shards > 1 else set()
    return frozenset(own | ({"quantised rows"} if quantised else set()) | ({"masked slot"} if masked else set()))
