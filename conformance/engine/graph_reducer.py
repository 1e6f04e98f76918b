"""Reduction of a failing case of captured calls.

As :class:`conformance.engine.reducer.Reducer`, except that replays go as a whole, and tokens from all rounds of a
position of a graph at once. The result is a local minimum: no single step makes it smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from conformance.cases import Case, GraphCase
from conformance.engine import graph_steps, steps
from conformance.engine.graph_steps import Place
from conformance.engine.reducer import Fails, Reducer, Search
from conformance.graph_cases import slots_of

#: So many places are tried with a token alone before the search by halves.
_ALONE = 12


class GraphReducer(Reducer):
    """Reduction of a :class:`conformance.cases.GraphCase`."""

    _best: GraphCase

    def __init__(self, fails: Fails, allowed: Callable[[Case], bool], budget_s: float, candidates: int = 2000) -> None:
        Search.__init__(self, graph_steps.size, fails, allowed, budget_s, candidates)  # type: ignore[arg-type]

    def _fewer_rounds(self) -> None:
        self._descend(lambda case: graph_steps.fewer_replays(_graphs(case)))
        self._descend(lambda case: graph_steps.plainer_graphs(_graphs(case)))
        self._descend(lambda case: graph_steps.fewer_replays(_graphs(case)))

    def _fewer_tokens(self, fraction: int | None = None) -> None:
        """Everything out, all but one, each place, then halves, quarters ... of each place, down to one."""
        del fraction
        if self._best.tokens == 0 or self._try(steps.map_tokens(self._best, lambda i, r, tokens: ())):
            return
        if self._first(graph_steps.single_tokens(self._best, _ALONE)):
            return
        places = graph_steps.places(self._best)
        for place in places:
            self._try(graph_steps.map_place(self._best, place, lambda tokens: ()))
        for place in places:
            length = graph_steps.tokens_at(self._best, place) // 2
            while length:
                start = 0
                while start < graph_steps.tokens_at(self._best, place):
                    if not self._try(_cut(self._best, place, start, start + length)):
                        start += length
                length //= 2

    def _lower_capacity(self) -> None:
        """Lower the capacity where it is the cause, i.e. a full rank cannot spare a token, neither first nor last."""
        while (full := self._full_place()) is not None:
            last = graph_steps.tokens_at(self._best, full)
            cuts = (_cut(self._best, full, last - 1, last), _cut(self._best, full, 0, 1))
            if not self._first(cuts):
                self._first(steps.lower_capacity(self._best))
                return

    def _full_place(self) -> Place | None:
        capacity = self._best.cell.capacity
        found = graph_steps.places(self._best)
        return next((place for place in found if graph_steps.tokens_at(self._best, place) == capacity), None)

    def _simpler_rows(self) -> None:
        """All tokens alike, then token by token the plainest row of a place, and of a round, that still fails."""
        self._first(steps.same_rows(self._best))
        for place in graph_steps.places(self._best):
            for token in range(graph_steps.tokens_at(self._best, place)):
                self._simpler_token(place, token)
        super()._simpler_rows()

    def _simpler_token(self, place: Place, token: int) -> None:
        def others(case: Case) -> Iterator[Case]:
            graphs = _graphs(case)
            index = slots_of(graphs).index(place[0])
            row = steps.rows_of(graphs.rounds[index])[place[1]][token]
            for simpler in steps.plainer_rows(row, case.cell):
                yield graph_steps.map_place(
                    graphs,
                    place,
                    lambda tokens, new=simpler: (*tokens[:token], new, *tokens[token + 1 :]),  # type: ignore[misc]
                )

        self._descend(others)


def _graphs(case: Case) -> GraphCase:
    assert isinstance(case, GraphCase)
    return case


def _cut(case: GraphCase, place: Place, start: int, stop: int) -> GraphCase:
    return graph_steps.map_place(case, place, lambda tokens: (*tokens[:start], *tokens[stop:]))
