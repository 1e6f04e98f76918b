"""Input classes that a case of the experts or of a whole layer hits; a cell without the needed ones is MISTRUSTED.

What a hit class does not prove: that the backend took a different path because of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from conformance.cases import Case, Explicit, LayerCase, LayerCell, LayerRound, expand, routing_counts
from conformance.layer_pairs import one_term
from conformance.suite import coverage
from reference import eplb
from reference.placement import owned_experts, physical_to_global


def classes(case: LayerCase) -> tuple[str, ...]:
    """Names of the classes that any round of the case hits."""
    cell = case.cell
    hit = set() if cell.redundant else set(coverage.classes(_as_exchange(case)))
    owner = {
        expert: shard
        for shard in range(cell.shards)
        for expert in owned_experts(cell.experts, cell.shards, shard, cell.placement)
    }
    first = {owned_experts(cell.experts, cell.shards, s, cell.placement)[0] for s in range(cell.shards)}
    held: tuple[int, ...] = ()
    sizes = {routing_counts(a_round.routing) for a_round in case.rounds}
    if len(sizes) > 1:
        hit.add("sizes change")
    if cell.router and any(map(max, sizes)):
        hit.add("router")
    if cell.against and any(one_term(cell, a_round) for a_round in case.rounds if any(routing_counts(a_round.routing))):
        hit.add("outputs compared")
    for a_round in case.rounds:
        hit.add(f"values {a_round.values}")
        hit.add(f"weights {a_round.weighting}")
        if a_round.tail:
            hit.add("rows beyond the count")
        if a_round.quantised:
            hit.add("quantised rows")
        if a_round.relation:
            hit.add(f"relation {a_round.relation}")
        placed = a_round.physical or held
        if cell.redundant and placed != held:
            hit.add("experts moved")
        held = placed
        if cell.redundant and _crosses(cell, a_round, held):
            hit.add("load from another rank")
        if not cell.redundant and placed == physical_to_global(cell.experts, cell.world_size) and cell.world_size > 1:
            hit.add("round-robin placement")
        if cell.shards > 1:
            rows = [row for tokens in expand(cell, a_round.routing) for row in tokens]
            named = {e for row in rows for e in row if e >= 0}
            if rows and not named & first:
                hit.add("no token for a first expert")
            if rows and len({owner[e] for e in named}) < cell.shards:
                hit.add("shard without tokens")
    return tuple(sorted(hit))


def _crosses(cell: LayerCell, a_round: LayerRound, held: tuple[int, ...]) -> bool:
    """Whether a slot goes to a replica on another rank than its token's."""
    maps = eplb.logical_maps(held or eplb.initial_map(cell.logical, cell.redundant), cell.logical)
    per_rank = cell.experts // cell.world_size
    return any(
        eplb.physical_id(token, expert, maps) // per_rank != rank
        for rank, rows in enumerate(expand(cell, a_round.routing))
        for token, row in enumerate(rows)
        for expert in row
        if expert >= 0
    )


def _as_exchange(case: LayerCase) -> Case:
    """The exchange that a case is: its routing by physical experts, each round where its experts lie."""
    cell = case.cell
    held: tuple[int, ...] = ()
    built = []
    for a_round in case.rounds:
        held = a_round.physical or held
        if not held:
            built.append(a_round)
            continue
        place = {expert: position for position, expert in enumerate(held)}
        rows = tuple(
            tuple(tuple(place.get(e, e) for e in row) for row in tokens) for tokens in expand(cell, a_round.routing)
        )
        built.append(msgspec.structs.replace(a_round, routing=Explicit(rows)))
    return Case(cell, tuple(built))


def required(
    cell: LayerCell,
    *,
    short: bool,
    masked: bool,
    quantised: bool,
    duplicates: bool = True,
    round_robin: bool = False,
    counted: bool = True,
    relations: Sequence[str] = (),
) -> frozenset[str]:
    """Classes without which a cell's checks mean nothing.

    Args:
        cell: the cell.
        short: what does not depend on the size is another cell's.
        masked: part of the cases is for masked slots.
        quantised: rows may come quantised.
        duplicates: a row may name an expert twice.
        round_robin: part of the cases is for that placement.
        counted: a row count may be given.
        relations: all that say something about the cell.
    """
    if cell.whole:
        own = {"experts moved"} if cell.redundant else {"row crosses ranks"} if cell.world_size > 1 else set()
        own |= {"sizes change"} if cell.redundant or cell.mode != "drained" else set()
        own |= {"round-robin placement"} if round_robin else set()
        own |= {"router"} if cell.router else set()
        own |= {"round-robin placement"} if cell.router and cell.world_size > 1 and cell.mode != "drained" else set()
        own |= {"outputs compared"} if cell.against else set()
        own |= {"load from another rank"} if cell.redundant and not cell.router else set()
        return frozenset(own | ({"masked slot"} if masked and not cell.redundant else set()))
    if short:
        return frozenset({"weights signed", "weights single"})
    if cell.check == "sort":
        return frozenset({"weights signed", *({"no token for a first expert"} if cell.shards > 1 else ())})
    own = {"weights signed", "weights single", "weights zeros", "values integers", "values wide"}
    own |= {f"relation {name}" for name in relations} | ({"rows beyond the count"} if counted else set())
    own |= {"duplicate expert"} if duplicates and cell.top_k > 1 else set()
    own |= {"no token for a first expert", "shard without tokens"} if cell.shards > 1 else set()
    return frozenset(own | ({"quantised rows"} if quantised else set()) | ({"masked slot"} if masked else set()))
