"""Cases of captured calls: one that every cell begins with, and drawn ones, legal by construction.

What is never drawn: numbers of tokens that change from replay to replay, which are frozen in a graph, and a routing
that changes where the contract freezes it.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from hypothesis import strategies as st

from accelerated.contract import Contract, MaskedSlots
from conformance.cases import Explicit, GraphCase, GraphCell, GraphRound, Round, Rows, routing_counts
from conformance.generation import MASKED, applies, rounds
from conformance.graph_cases import MAX_GRAPHS, MAX_ROUNDS
from conformance.recipes import ARCHETYPES, Row

#: What happens in the case that a cell begins with, by the most rounds of a graph: "A" and "B" are replays of graphs of
#: different sizes, "e" is an eager round, "|" drops the operator and builds another. No eager round comes before the
#: first replay, so that in a cold cell the operator's first call is a captured one.
_SCRIPTS = {1: "ABAeA|BeAB", 2: "AB|AeA", 3: "AB|Ae"}
_GRAPHS = "AB"


def first_case(cell: GraphCell, contract: Contract) -> GraphCase:
    """Two sizes, replayed before and after eager rounds, in turn, with contents and routings that change."""
    rerouted = "routing" in contract.captures and not cell.modes
    sizes = (min(cell.most_tokens, 5), min(cell.most_tokens, 2))
    built: list[GraphRound] = []
    rebuilt = 0
    script = _SCRIPTS[cell.length]
    for place, letter in enumerate(script):
        if letter == "|":
            rebuilt = len(built)
            continue
        graph = _GRAPHS.find(letter)
        before = script[:place].count(letter) if rerouted or graph < 0 else 0
        for position in range(cell.length if graph >= 0 else 1):
            turn = before + position
            rows = _spread(cell, sizes[max(graph, 0)], position, turn, contract)
            values = ("integers", "normal", "wide")[len(built) % 3]
            built.append(GraphRound(Explicit(rows), values, len(built), graph=graph))  # type: ignore[arg-type]
    return GraphCase(cell, tuple(built), rebuilt)


def _spread(cell: GraphCell, tokens: int, position: int, turn: int, contract: Contract) -> Rows:
    """A few tokens per rank, no rank the same number, whose experts move on with every turn."""
    ranks, least = cell.world_size, 0 if contract.idle_ranks else 1
    counts = [max(least, (tokens + rank - position) % (tokens + 1)) for rank in range(ranks)]

    def row(rank: int, token: int) -> Row:
        # All slots of a token on one rank half the time, so that the received counts change with the turn.
        per_rank = cell.experts // ranks
        start = (rank + turn + token // 2) % ranks * per_rank + turn % per_rank
        step = 1 if token % 2 else per_rank + 1
        return tuple((start + slot * step) % cell.experts for slot in range(cell.top_k))

    return tuple(tuple(row(rank, token) for token in range(count)) for rank, count in enumerate(counts))


@st.composite
def graph_cases(draw: st.DrawFn, cell: GraphCell, contract: Contract, only: str = "") -> GraphCase:
    """One to three graphs of drawn sizes, replayed in a drawn order with eager rounds between them.

    ``only`` names an archetype that every round is to have.
    """
    names = [only] if only else [a for a in ARCHETYPES if applies(a, cell, contract)]
    delays = cell.mode != "drained"
    sizes = draw(st.integers(1, min(MAX_GRAPHS, MAX_ROUNDS // cell.length - 1)))
    firsts = [
        [draw(rounds(cell, names, delays=delays, contract=contract)) for _ in range(cell.length)] for _ in range(sizes)
    ]
    order = draw(st.lists(st.integers(-1, sizes - 1), min_size=2, max_size=6))
    # A graph that is never replayed is not captured.
    replayed = sorted({graph for graph in order if graph >= 0} or {0})
    order = order if max(order) >= 0 else [*order, 0]
    built: list[GraphRound] = []
    starts = []
    for graph in order:
        length = cell.length if graph >= 0 else 1
        if len(built) + length > MAX_ROUNDS:
            break
        starts.append(len(built))
        for position in range(length):
            if graph < 0:
                a_round = draw(rounds(cell, names, delays=delays, contract=contract))
            else:
                a_round = draw(_again(cell, names, contract, firsts[graph][position]))
            number = replayed.index(graph) if graph >= 0 else graph
            built.append(GraphRound(**msgspec.structs.asdict(a_round), graph=number))
    return GraphCase(cell, tuple(built), draw(st.sampled_from((0, *starts[1:]))))


@st.composite
def _again(draw: st.DrawFn, cell: GraphCell, names: Sequence[str], contract: Contract, first: Round) -> Round:
    """A round of the same numbers of tokens: other contents, and where it may change half the time another routing."""
    if "routing" in contract.captures and not cell.modes and draw(st.booleans()):
        counts = routing_counts(first.routing)
        return draw(rounds(cell, names, delays=cell.mode != "drained", contract=contract, counts=counts))
    return msgspec.structs.replace(first, seed=draw(st.integers(0, 2**20 - 1)))


def graph_strata(cell: GraphCell, contract: Contract, examples: int) -> list[tuple[str, int]]:
    """Parts of a cell's budget: (archetype or "" for the mixture, cases)."""
    if examples < 2 or contract.masked_slots is not MaskedSlots.DROPPED:
        return [("", examples)]
    return [("", examples - 1), (MASKED, 1)]
