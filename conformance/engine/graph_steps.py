"""Steps of a reduction that only cases of captured calls have; the others are in :mod:`conformance.engine.steps`.

Scope: pure functions from a case with explicit rows to smaller ones. Rounds of one position of one graph have the same
number of tokens, so tokens go from all of them at once. Nothing here proves that the steps reach every smaller case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from conformance.cases import Explicit, GraphCase, GraphRound
from conformance.engine import steps
from conformance.engine.steps import Row
from conformance.graph_cases import Slot, replays_of, slots_of

#: One place of a slot: all its rounds, on one rank.
Place = tuple[Slot, int]


def size(case: GraphCase) -> tuple[Any, ...]:
    """What a reduction lowers: ranks, rounds, graphs and their form, then what every exchange has."""
    cell, rounds = case.cell, case.rounds
    exchange = steps.size(case)
    numbers = tuple(a_round.graph for a_round in rounds)
    return (
        cell.world_size,
        len(rounds),
        cell.length,
        cell.halves,
        len({number for number in numbers if number >= 0}),
        bool(case.rebuilt),
        *exchange[2:-1],
        not cell.warm,
        case.rebuilt,
        numbers,
        exchange[-1],
    )


def places(case: GraphCase) -> list[Place]:
    """Every (slot, rank)."""
    return [(slot, rank) for slot in dict.fromkeys(slots_of(case)) for rank in range(case.cell.world_size)]


def map_place(case: GraphCase, place: Place, change: Callable[[tuple[Row, ...]], Sequence[Row]]) -> GraphCase:
    """Change the tokens of one place."""
    slots = slots_of(case)
    rows = [
        [
            tuple(change(tokens)) if (slot, rank) == place else tokens
            for rank, tokens in enumerate(steps.rows_of(a_round))
        ]
        for slot, a_round in zip(slots, case.rounds, strict=True)
    ]
    return _with_rows(case, rows)


def tokens_at(case: GraphCase, place: Place) -> int:
    """Tokens of one place."""
    index = slots_of(case).index(place[0])
    return len(steps.rows_of(case.rounds[index])[place[1]])


def _with_rows(case: GraphCase, rows: Sequence[Sequence[tuple[Row, ...]]]) -> GraphCase:
    changed = tuple(
        msgspec.structs.replace(a_round, routing=Explicit(tuple(one)))
        for a_round, one in zip(case.rounds, rows, strict=True)
    )
    return msgspec.structs.replace(case, rounds=changed)


def kept(case: GraphCase, wanted: Sequence[int]) -> GraphCase:
    """The case with these rounds alone; graphs are numbered anew, without gaps."""
    rounds = [case.rounds[index] for index in wanted]
    found = sorted({a_round.graph for a_round in rounds if a_round.graph >= 0})
    rebuilt = sum(index < case.rebuilt for index in wanted)
    return msgspec.structs.replace(
        case,
        rounds=tuple(_numbered(a_round, found) for a_round in rounds),
        rebuilt=rebuilt if rebuilt < len(wanted) else 0,
    )


def _numbered(a_round: GraphRound, found: list[int]) -> GraphRound:
    number = found.index(a_round.graph) if a_round.graph >= 0 else -1
    return msgspec.structs.replace(a_round, graph=number)


def fewer_replays(case: GraphCase) -> Iterator[GraphCase]:
    """One replay or eager round alone, one graph alone, no eager rounds, all but one."""
    units = [range(first, first + length) for first, length in replays_of(case)]
    if len(units) < 2:
        return
    for unit in units:
        yield kept(case, unit)
    every = range(len(case.rounds))
    numbers = [a_round.graph for a_round in case.rounds]
    for graph in sorted(set(numbers)):
        for wanted in ([i for i in every if numbers[i] == graph], [i for i in every if numbers[i] != graph]):
            if 0 < len(wanted) < len(numbers):
                yield kept(case, wanted)
    for unit in units:
        yield kept(case, [index for index in every if index not in unit])


def plainer_graphs(case: GraphCase) -> Iterator[GraphCase]:
    """No operator dropped, whole rounds, one round to a graph, a warm-up, graphs in their order, one for two."""
    if case.rebuilt:
        yield msgspec.structs.replace(case, rebuilt=0)
    if case.cell.halves:
        yield _cell(case, halves=False)
    for position in range(case.cell.length) if case.cell.length > 1 else ():
        slots = slots_of(case)
        wanted = [i for i, (graph, at) in enumerate(slots) if graph < 0 or at == position]
        yield _cell(kept(case, wanted), length=1)
    if not case.cell.warm:
        yield _cell(case, warm=True)
    turns = list(dict.fromkeys(a_round.graph for a_round in case.rounds if a_round.graph >= 0))
    yield msgspec.structs.replace(case, rounds=tuple(_numbered(a_round, turns) for a_round in case.rounds))
    for gone in sorted({a_round.graph for a_round in case.rounds if a_round.graph > 0}):
        rounds = tuple(msgspec.structs.replace(r, graph=r.graph - (r.graph >= gone)) for r in case.rounds)
        yield msgspec.structs.replace(case, rounds=rounds)


def _cell(case: GraphCase, **changes: Any) -> GraphCase:
    return msgspec.structs.replace(case, cell=msgspec.structs.replace(case.cell, **changes))


def single_tokens(case: GraphCase, most: int) -> Iterator[GraphCase]:
    """One token of one place alone, the first few of them."""
    empty: GraphCase = steps.map_tokens(case, lambda i, r, tokens: ())  # type: ignore[assignment]
    slots = slots_of(case)
    for place in places(case)[:most]:
        for token in range(min(tokens_at(case, place), 2)):
            rows = [list(steps.rows_of(a_round)) for a_round in empty.rounds]
            for index, slot in enumerate(slots):
                if slot == place[0]:
                    rows[index][place[1]] = (steps.rows_of(case.rounds[index])[place[1]][token],)
            yield _with_rows(case, rows)
