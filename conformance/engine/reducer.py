"""Reduction of a failing case to its minimum, on the case itself.

Hypothesis draws, this reduces: a failing case is made explicit and then narrowed (ranks, nodes), shortened (rounds,
tokens) and simplified (ids, values, delays, seeds) as long as the same (verdict, check) still shows. Working on rows
instead of on Hypothesis's choices lets a recipe become rows and an EP 8 failure become an EP 2 one, and makes the
minimum independent of the order of draws. The result is a local minimum: no single step makes it smaller.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec

from conformance.cases import Case, Explicit, Round, Rows, expand

Fails = Callable[[Case], bool]


@dataclass
class Reduction:
    """The smallest case found, how many candidates were tried, and whether the budget ended the search."""

    case: Case
    tried: int
    exhausted: bool


class _Budget(Exception):
    """The reduction's time or candidate budget is spent."""


class Reducer:
    """Greedy reduction with a budget of seconds and candidates."""

    def __init__(self, fails: Fails, allowed: Callable[[Case], bool], budget_s: float, candidates: int = 2000) -> None:
        self._fails, self._allowed = fails, allowed
        self._deadline = time.monotonic() + budget_s
        self._candidates = candidates
        self._seen: set[str] = set()
        self.tried = 0

    def reduce(self, case: Case) -> Reduction:
        """Smallest case reached from ``case``, which is known to fail."""
        explicit = _explicit(case)
        # Recipe and rows mean the same input, so the explicit form needs no run of its own.
        best = explicit
        exhausted = False
        try:
            changed = True
            while changed:
                changed = False
                for make in (_narrower, _fewer_rounds, _fewer_tokens, _simpler_rounds, _simpler_ids):
                    improved = self._descend(best, make)
                    changed = changed or improved is not best
                    best = improved
        except _Budget:
            exhausted = True
            best = self._best
        return Reduction(best, self.tried, exhausted)

    def _descend(self, case: Case, make: Callable[[Case], Iterator[Case]]) -> Case:
        self._best = case
        progress = True
        while progress:
            progress = False
            for candidate in make(self._best):
                if self._accept(candidate):
                    self._best = candidate
                    progress = True
                    break
        return self._best

    def _accept(self, candidate: Case) -> bool:
        identity = candidate.id
        if identity in self._seen or not self._allowed(candidate):
            return False
        self._seen.add(identity)
        if time.monotonic() > self._deadline or self.tried >= self._candidates:
            raise _Budget
        self.tried += 1
        return self._fails(candidate)


def _explicit(case: Case) -> Case:
    rounds = tuple(msgspec.structs.replace(r, routing=Explicit(expand(case.cell, r.routing))) for r in case.rounds)
    return msgspec.structs.replace(case, rounds=rounds)


def _rows(a_round: Round) -> Rows:
    assert isinstance(a_round.routing, Explicit)
    return a_round.routing.rows


def _with_rows(case: Case, index: int, rows: Rows) -> Case:
    return _with_round(case, index, msgspec.structs.replace(case.rounds[index], routing=Explicit(rows)))


def _with_round(case: Case, index: int, a_round: Round) -> Case:
    return msgspec.structs.replace(case, rounds=(*case.rounds[:index], a_round, *case.rounds[index + 1 :]))


def _narrower(case: Case) -> Iterator[Case]:
    """Half the ranks: keep the lower or the upper half's tokens, and fold expert ids onto the ranks that stay."""
    cell = case.cell
    half = cell.world_size // 2
    if cell.world_size % 2 or half < 1:
        return
    per_rank = cell.experts // cell.world_size
    for nodes in sorted({cell.nodes, 1} if cell.nodes <= half else {1}, reverse=True):
        narrow = msgspec.structs.replace(cell, world_size=half, nodes=nodes, experts=half * per_rank, model="")
        if narrow.top_k > narrow.experts:
            return
        for keep in (
            range(half),
            range(half, cell.world_size),
            range(0, cell.world_size, 2),
            range(1, cell.world_size, 2),
        ):
            rounds = []
            for a_round in case.rounds:
                rows = _rows(a_round)
                kept = tuple(tuple(tuple(_fold(e, keep, per_rank, half) for e in row) for row in rows[r]) for r in keep)
                delays = tuple(a_round.delays_ms[r] for r in keep) if a_round.delays_ms else ()
                rounds.append(msgspec.structs.replace(a_round, routing=Explicit(kept), delays_ms=delays))
            yield Case(narrow, tuple(rounds))


def _fold(expert: int, keep: range, per_rank: int, half: int) -> int:
    if expert < 0:
        return expert
    rank, slot = divmod(expert, per_rank)
    target = keep.index(rank) if rank in keep else rank % half
    return target * per_rank + slot


def _fewer_rounds(case: Case) -> Iterator[Case]:
    for index in range(len(case.rounds)):
        if len(case.rounds) > 1:
            yield msgspec.structs.replace(case, rounds=case.rounds[:index] + case.rounds[index + 1 :])


def _fewer_tokens(case: Case) -> Iterator[Case]:
    """Drop all tokens of a rank, then halves, quarters ... down to single tokens, in every round."""
    for index, a_round in enumerate(case.rounds):
        rows = _rows(a_round)
        for rank, tokens in enumerate(rows):
            size = len(tokens)
            while size >= 1:
                for start in range(0, len(tokens), size):
                    kept = tokens[:start] + tokens[start + size :]
                    yield _with_rows(case, index, (*rows[:rank], kept, *rows[rank + 1 :]))
                size //= 2


def _simpler_rounds(case: Case) -> Iterator[Case]:
    for index, a_round in enumerate(case.rounds):
        for change in ({"delays_ms": ()}, {"values": "integers"}, {"seed": 0}):
            simpler = msgspec.structs.replace(a_round, **change)
            if simpler != a_round:
                yield _with_round(case, index, simpler)


def _simpler_ids(case: Case) -> Iterator[Case]:
    """Give a token the plainest row that still fails, then lower its ids one by one."""
    top_k = case.cell.top_k
    plain = tuple(range(top_k))
    for index, a_round in enumerate(case.rounds):
        rows = _rows(a_round)
        for rank, tokens in enumerate(rows):
            for token, row in enumerate(tokens):
                for simpler in _plainer(row, plain):
                    changed = (*tokens[:token], simpler, *tokens[token + 1 :])
                    yield _with_rows(case, index, (*rows[:rank], changed, *rows[rank + 1 :]))
        # A token may have to move to an earlier rank for the case to be plainest.
        for rank in range(1, len(rows)):
            if rows[rank] and not rows[rank - 1]:
                moved = (*rows[: rank - 1], rows[rank], (), *rows[rank + 1 :])
                yield _with_rows(case, index, moved)


def _plainer(row: tuple[int, ...], plain: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Rows simpler than ``row``: in order 0..k-1, then each slot lowered; -1 is less plain than any expert."""
    if _cost(plain) < _cost(row):
        yield plain
    for slot, expert in enumerate(row):
        for lower in (slot, *range(min(expert, 8)), expert // 2, expert - 1):
            simpler = (*row[:slot], lower, *row[slot + 1 :])
            if lower >= 0 and _cost(simpler) < _cost(row):
                yield simpler


def _cost(row: tuple[int, ...]) -> tuple[int, int, tuple[int, ...]]:
    """Duplicates and masks first, then how far the ids are from 0..k-1, then the ids themselves."""
    odd = len(row) - len({e for e in row if e >= 0})
    away = sum(e != slot for slot, e in enumerate(row))
    return odd, away, row
