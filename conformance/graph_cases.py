"""Cases of captured calls: what a sequence of replays and eager rounds has to hold.

Every round of a case is one dispatch and combine, eager or by a graph. Graphs are captured before the first round, in
the order of their numbers, with contents that no round has. A graph of ``length`` rounds is replayed by as many
neighbouring rounds; at each position it has one number of tokens per rank, that of its first replay. So the cold first
replay is a case whose first round is replayed, several sizes are graphs with different numbers of tokens, and an odd
number of collectives is an odd ``length`` (two collectives to a round, one of each kind).

Dropping the operator is what a serving engine does when it is asked for a bigger one: graphs first, then the operator;
another is built, captured and replayed. Replaying a graph whose operator is gone is misuse, which no case asks for.
What a valid case does not prove: that a backend takes it; :func:`misfit` looks at its contract.
"""

from __future__ import annotations

from collections.abc import Iterator

from accelerated.contract import Contract
from conformance.cases import CaseError, GraphCase, expand, routing_counts

#: Rounds of a graph, graphs, and rounds of a case: stamps have to tell all contents of a run apart.
MAX_LENGTH, MAX_GRAPHS, MAX_ROUNDS = 3, 3, 12

#: A position of a graph, or an eager round: rounds of one slot have the same number of tokens.
Slot = tuple[int, int]


def slots_of(case: GraphCase) -> list[Slot]:
    """Of every round: (its graph, its position there), or (-1, its number) if it is eager."""
    found: list[Slot] = []
    position = 0
    for index, a_round in enumerate(case.rounds):
        if a_round.graph < 0:
            position = 0
            found.append((-1, index))
            continue
        if not index or case.rounds[index - 1].graph != a_round.graph:
            position = 0
        found.append((a_round.graph, position % case.cell.length))
        position += 1
    return found


def replays_of(case: GraphCase) -> Iterator[tuple[int, int]]:
    """(first round, number of rounds) of every replay and eager round, in order."""
    index = 0
    while index < len(case.rounds):
        length = case.cell.length if case.rounds[index].graph >= 0 else 1
        yield index, length
        index += length


def first_rounds(case: GraphCase) -> dict[int, int]:
    """First round of every graph's first replay, by the graph's number in ascending order."""
    found: dict[int, int] = {}
    for index, a_round in enumerate(case.rounds):
        if a_round.graph >= 0:
            found.setdefault(a_round.graph, index)
    return dict(sorted(found.items()))


def validate_graphs(case: GraphCase) -> None:
    """Check what a case of captured calls has beyond that of an exchange.

    Raises:
        CaseError: names the value, the limit and the fix.
    """
    cell = case.cell
    if not 1 <= cell.length <= (1 if cell.halves else MAX_LENGTH):
        raise CaseError(f"length is {cell.length}; give 1 to {MAX_LENGTH} rounds, or 1 with halves")
    if cell.wire or cell.codec or set(cell.modes) - {"handle"}:
        raise CaseError(f"{cell.wire or cell.codec or cell.modes} in a captured call; leave all but 'handle' out")
    if "handle" in cell.modes and not cell.warm:
        raise CaseError("a handle comes from an eager round before the capture; make warm true")
    if len(case.rounds) > MAX_ROUNDS:
        raise CaseError(f"{len(case.rounds)} rounds of captured calls; give at most {MAX_ROUNDS}")
    numbers = [a_round.graph for a_round in case.rounds]
    if not -1 <= min(numbers) <= max(numbers) < MAX_GRAPHS:
        raise CaseError(f"rounds are of the graphs {sorted(set(numbers))}; give -1 for eager ones to {MAX_GRAPHS - 1}")
    if any(a_round.hidden for a_round in case.rounds):
        raise CaseError("a round has short rows; captured calls have whole ones, give hidden 0")
    starts = _whole_replays(case)
    if case.rebuilt and case.rebuilt not in starts:
        raise CaseError(f"rebuilt is {case.rebuilt}; give 0, or where a replay or an eager round begins: {starts[1:]}")
    counts: dict[Slot, tuple[int, ...]] = {}
    for index, (slot, a_round) in enumerate(zip(slots_of(case), case.rounds, strict=True)):
        own = routing_counts(a_round.routing)
        if counts.setdefault(slot, own) != own:
            raise CaseError(
                f"round {index} has {own} tokens per rank and its graph was captured with {counts[slot]}; a replay "
                "has the captured numbers"
            )


def _whole_replays(case: GraphCase) -> list[int]:
    """Where replays and eager rounds begin.

    Raises:
        CaseError: a graph is replayed in part.
    """
    length, starts, index = case.cell.length, [], 0
    while index < len(case.rounds):
        starts.append(index)
        graph = case.rounds[index].graph
        if graph < 0:
            index += 1
            continue
        if [a_round.graph for a_round in case.rounds[index : index + length]] != [graph] * length:
            raise CaseError(f"round {index} begins a replay of graph {graph} that ends early; give {length} rounds")
        index += length
    return starts


def misfit(case: GraphCase, contract: Contract) -> str:
    """Why a contract does not promise what a case asks of a capture; empty if it does."""
    if not contract.captures:
        return contract.capture_refusal
    if not case.cell.warm and "cold" not in contract.captures:
        return "an operator's first call is not captured; warm it up"
    if "routing" in contract.captures and "handle" not in case.cell.modes:
        return ""
    if "handle" not in case.cell.modes:
        return "a routing is frozen in a handle; give the mode handle"
    rows: dict[Slot, object] = {}
    for slot, a_round in zip(slots_of(case), case.rounds, strict=True):
        own = expand(case.cell, a_round.routing)
        if slot[0] >= 0 and rows.setdefault(slot, own) != own:
            return "a replay changes the routing that the graph was captured with"
    return ""
