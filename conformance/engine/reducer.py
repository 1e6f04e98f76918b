"""Reduction of a failing case to its minimum, on the case itself.

Hypothesis draws, this reduces: a failing case is made explicit and then narrowed (ranks, nodes), shortened (rounds,
tokens) and simplified (geometry, settings, ids) as long as the same (verdict, check) still shows. Working on rows
instead of on Hypothesis's choices lets a recipe become rows and an EP 8 failure become an EP 2 one, and makes the
minimum independent of the order of draws. Bold steps come first, because a step that fails to fail is cheap, and one
that crashes or hangs is not. The result is a local minimum: no single step makes it smaller.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec

from conformance.cases import Case, SequenceCase
from conformance.engine import row_steps, sequence_steps, steps
from conformance.row_cases import RowCase

C = TypeVar("C", bound="Case | RowCase")
Fails = Callable[[Case], bool]

#: The first sweep over the tokens stops at this fraction of them; the rest waits until every row costs less to try.
_COARSE = 8
#: So many tokens are tried alone before the search by halves.
_ALONE = 12


@dataclass
class Reduction(Generic[C]):
    """The smallest case found, how many candidates were tried, and whether the budget ended the search."""

    case: C
    tried: int
    exhausted: bool


class _Budget(Exception):
    """The reduction's time or candidate budget is spent."""


class Search(Generic[C]):
    """Greedy search for a smaller failing case, with a budget of seconds and candidates.

    Every accepted candidate is smaller by ``size``, so the search ends by itself.
    """

    def __init__(
        self,
        size: Callable[[C], tuple[Any, ...]],
        fails: Callable[[C], bool],
        allowed: Callable[[C], bool],
        budget_s: float,
        candidates: int = 2000,
    ) -> None:
        self._measure, self._fails, self._allowed = size, fails, allowed
        self._deadline = time.monotonic() + budget_s
        self._candidates = candidates
        self._seen: set[str] = set()
        self.tried = 0

    def reduce(self, case: C) -> Reduction[C]:
        """Smallest case reached from ``case``, which is known to fail."""
        self._best = case
        self._size = self._measure(case)
        try:
            self._search()
        except _Budget:
            return Reduction(self._best, self.tried, exhausted=True)
        return Reduction(self._best, self.tried, exhausted=False)

    def _search(self) -> None:
        """Try candidates until none fails."""
        raise NotImplementedError

    def _try(self, candidate: C) -> bool:
        """Whether a candidate is smaller, allowed, new, and fails; it is the best one then."""
        size = self._measure(candidate)
        if size >= self._size:
            return False
        identity = candidate.id
        if identity in self._seen or not self._allowed(candidate):
            return False
        self._seen.add(identity)
        if time.monotonic() > self._deadline or self.tried >= self._candidates:
            raise _Budget
        self.tried += 1
        if not self._fails(candidate):
            return False
        self._best, self._size = candidate, size
        return True

    def _first(self, candidates: Iterable[C]) -> bool:
        """Take the first candidate that fails."""
        return any(self._try(candidate) for candidate in candidates)

    def _descend(self, make: Callable[[C], Iterable[C]]) -> None:
        """Take candidates until none of the best case's fails; after a success go on from there, then start over."""
        position = 0
        while True:
            for number, candidate in enumerate(make(self._best)):
                if number >= position and self._try(candidate):
                    position = number
                    break
            else:
                if position == 0:
                    return
                position = 0


class RowReducer(Search[RowCase]):
    """Reduction of a row operator's case."""

    def __init__(
        self,
        fails: Callable[[RowCase], bool],
        allowed: Callable[[RowCase], bool],
        budget_s: float,
        candidates: int = 2000,
    ) -> None:
        super().__init__(row_steps.size, fails, allowed, budget_s, candidates)

    def _search(self) -> None:
        before = None
        while before is not self._best:
            before = self._best
            for make in row_steps.STEPS:
                self._descend(make)


class Reducer(Search[Case]):
    """Reduction of a dispatch/combine case."""

    def __init__(self, fails: Fails, allowed: Callable[[Case], bool], budget_s: float, candidates: int = 2000) -> None:
        super().__init__(steps.size, fails, allowed, budget_s, candidates)

    def reduce(self, case: Case) -> Reduction[Case]:
        """Smallest case reached from ``case``, which is known to fail."""
        # Recipe and rows mean the same input, so the explicit form needs no run of its own.
        return super().reduce(steps.explicit(case))

    def _search(self) -> None:
        self._narrow()
        while self._sweep() or self._narrow():
            pass

    # ------------------------------------------------------------------ the order of the search
    def _narrow(self) -> bool:
        before = self._best
        while self._first(steps.narrower(self._best)):
            pass
        return self._best is not before

    def _sweep(self) -> bool:
        before = self._best
        self._fewer_rounds()
        self._fewer_tokens(_COARSE)
        self._lower_capacity()
        self._descend(steps.plain)
        self._fewer_tokens()
        self._first(steps.all_alike(self._best))
        for make in (steps.settings, steps.fewer_slots, steps.fewer_experts, steps.fewer_elements):
            self._descend(make)
        self._simpler_rows()
        self._descend(steps.rank_moves)
        return self._best is not before

    # ------------------------------------------------------------------ rounds and tokens
    def _fewer_rounds(self) -> None:
        """Each round alone, then halves and quarters ... out, down to single rounds; or steps of a sequence."""
        if isinstance(self._best, SequenceCase):
            self._descend(sequence_steps.fewer_steps)  # type: ignore[arg-type]
            return
        if len(self._best.rounds) > 1:
            self._first([msgspec.structs.replace(self._best, rounds=(r,)) for r in self._best.rounds])
        length = len(self._best.rounds) // 2
        while length:
            start = 0
            while start < len(self._best.rounds):
                kept = self._best.rounds[:start] + self._best.rounds[start + length :]
                if not kept or not self._try(msgspec.structs.replace(self._best, rounds=kept)):
                    start += length
            length //= 2

    def _fewer_tokens(self, fraction: int | None = None) -> None:
        """Everything out, all but one, each rank of each round, then halves, quarters ... of all, down to one."""
        if self._best.tokens == 0 or self._try(steps.map_tokens(self._best, lambda i, r, tokens: ())):
            return
        if self._first(steps.single_tokens(self._best, _ALONE)):
            return
        for place in self._places():
            self._try(steps.map_at(self._best, place, lambda tokens: ()))
        length = self._best.tokens // 2
        shortest = 1 if fraction is None else max(1, self._best.tokens // fraction)
        while length >= shortest:
            start = 0
            while start < self._best.tokens:
                if not self._try(_without(self._best, start, start + length)):
                    start += length
            length //= 2

    def _lower_capacity(self) -> None:
        """Lower the capacity where it is the cause, i.e. a full rank cannot spare a token, neither first nor last.

        The capacity of all other cases stays, so a minimum with a lowered one says that the limit matters.
        """
        while (full := _full_rank(self._best)) is not None:
            shorter = (lambda tokens: tokens[:-1], lambda tokens: tokens[1:])
            if not self._first(steps.map_at(self._best, full, change) for change in shorter):
                self._first(steps.lower_capacity(self._best))
                return

    # ------------------------------------------------------------------ rows
    def _simpler_rows(self) -> None:
        """All tokens alike, then token by token the plainest row that still fails."""
        self._first(steps.same_rows(self._best))
        for index, rank in self._places():
            for token in range(len(steps.rows_of(self._best.rounds[index])[rank])):
                self._simpler_row((index, rank), token)

    def _simpler_row(self, place: tuple[int, int], token: int) -> None:
        index, rank = place

        def others(case: Case) -> Iterator[Case]:
            tokens = steps.rows_of(case.rounds[index])[rank]
            for simpler in steps.plainer_rows(tokens[token], case.cell):
                changed = (*tokens[:token], simpler, *tokens[token + 1 :])
                yield steps.map_at(case, place, lambda _, new=changed: new)  # type: ignore[misc]

        self._descend(others)

    def _places(self) -> list[tuple[int, int]]:
        """Every (round, rank)."""
        return [(i, r) for i in range(len(self._best.rounds)) for r in range(self._best.cell.world_size)]


def _without(case: Case, start: int, stop: int) -> Case:
    """Leave out the tokens numbered start to stop, counted through rounds and ranks."""
    number = 0
    rows = []
    for a_round in case.rounds:
        kept = []
        for tokens in steps.rows_of(a_round):
            first, last = max(0, start - number), max(0, stop - number)
            kept.append(tokens[:first] + tokens[last:])
            number += len(tokens)
        rows.append(kept)
    return steps.with_all_rows(case, rows)


def _full_rank(case: Case) -> tuple[int, int] | None:
    """A (round, rank) with as many tokens as the operator holds."""
    for index, counts in enumerate(case.token_counts()):
        for rank, count in enumerate(counts):
            if count == case.cell.most_tokens:
                return index, rank
    return None
