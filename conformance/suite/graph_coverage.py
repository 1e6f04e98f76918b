"""Input classes that a case of captured calls hits; a cell without the needed ones is MISTRUSTED.

What a hit class does not prove: that the backend took a different path because of it.
"""

from __future__ import annotations

from accelerated.contract import Contract
from conformance.cases import GraphCase, GraphCell, expand
from conformance.graph_cases import replays_of, slots_of
from conformance.suite import coverage


def classes(case: GraphCase) -> tuple[str, ...]:
    """Names of the classes that the rounds, and their order, hit."""
    hit = set(coverage.classes(case))
    order = [case.rounds[index].graph for index, _ in replays_of(case)]
    graphs = {graph for graph in order if graph >= 0}
    if order[0] >= 0:
        hit.add("begins with a replay")
        if not case.cell.warm:
            hit.add("cold capture")
    if len(graphs) > 1:
        hit.add("several sizes")
    if case.rebuilt:
        hit.add("operator dropped")
    if any(order[i] >= 0 and order[i] == order[i + 2] != order[i + 1] for i in range(len(order) - 2)):
        hit.add("between two replays another call")
    seen: dict[tuple[int, int], object] = {}
    for slot, a_round in zip(slots_of(case), case.rounds, strict=True):
        if slot[0] < 0:
            continue
        rows = expand(case.cell, a_round.routing)
        if slot in seen:
            hit.add("replayed again")
            if seen[slot] != rows:
                hit.add("replay with another routing")
        seen[slot] = rows
    return tuple(sorted(hit))


def required(cell: GraphCell, contract: Contract) -> frozenset[str]:
    """Classes without which a cell's checks mean nothing."""
    needed = {"begins with a replay", "several sizes", "operator dropped", "replayed again"}
    if not cell.warm:
        needed.add("cold capture")
    if cell.world_size > 1:
        needed.add("row crosses ranks")
    if "routing" in contract.captures and not cell.modes:
        needed.add("replay with another routing")
    return frozenset(needed)
