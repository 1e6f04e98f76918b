"""Defects of captured calls, in wrappers around a genuine session's operations and graphs.

Scope: each changes what a captured call is given or gives back, or what a replay runs, by the interface alone, so that
it is the same defect on a double's recorder and on a device's graphs. Tensors that a defect bakes in were copied in an
eager call of the same tensors, i.e. in a warm-up: a copy made inside a capture would be captured, too. They prove
nothing about how a library comes by such a defect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from accelerated.graphs import graphs_of
from accelerated.interface import Combined, Graph, Operation, RankContext, Received, Session


class Defect:
    """No defect: what captures and eager calls of one operator have in common.

    Attributes:
        capture: number of the capture that is going on, from 1 up, or 0.
        captures: that there were on this operator.
    """

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Another operator."""
        self.capture = self.captures = 0

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        """What is dispatched in the place of the rows given."""
        return rows

    def received(self, rows: torch.Tensor, received: Received) -> None:
        """Change what was received."""

    def combined(self, combined: Combined) -> None:
        """Change what was combined."""

    def wrapped(self, graph: Graph) -> Graph:
        """A captured graph."""
        return graph


class StaleCapture(Defect):
    """A captured dispatch sends copies of its rows that an eager one before it made."""

    def renew(self) -> None:
        """Another operator."""
        super().renew()
        self._copies: dict[int, torch.Tensor] = {}

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        """The copy, of the same address, in a capture."""
        if self.capture:
            return self._copies.get(rows.data_ptr(), rows)
        self._copies[rows.data_ptr()] = rows.clone()
        return rows


class FrozenCount(Defect):
    """A captured dispatch says that as many rows came as in the eager one before it."""

    def renew(self) -> None:
        """Another operator."""
        super().renew()
        self._counts: dict[int, torch.Tensor] = {}

    def received(self, rows: torch.Tensor, received: Received) -> None:
        """The count of the eager call, in a capture."""
        if self.capture:
            received.count = self._counts.get(rows.data_ptr(), received.count)
        else:
            self._counts[rows.data_ptr()] = received.count.clone()


class ColdReplay(Defect):
    """The first replay of every graph runs nothing."""

    def wrapped(self, graph: Graph) -> Graph:
        """A graph that has to be warmed up."""
        return _Cold(graph)


class _Cold:
    def __init__(self, genuine: Graph) -> None:
        self._genuine, self._warm = genuine, False

    def replay(self) -> None:
        """Nothing the first time."""
        if self._warm:
            self._genuine.replay()
        self._warm = True

    def release(self) -> None:
        """As the genuine one."""
        self._genuine.release()


class _OfTheFirst(Defect):
    """Something that the first capture has, and that the calls of later ones take in the place of their own."""

    def renew(self) -> None:
        """Another operator."""
        super().renew()
        self._first: list[torch.Tensor] = []
        self._of, self._taken = 0, (0, 0)

    def _instead(self, own: torch.Tensor) -> torch.Tensor:
        """The first capture's, as long as the own one; the own one while there is none, or where it is longer."""
        self._of = self._of or self.capture
        if self.capture == self._of:
            self._first.append(own)
            return own
        capture, position = self._taken
        position = position if capture == self.capture else 0
        self._taken = self.capture, position + 1
        first = self._first[position % len(self._first)]
        return first[: len(own)] if len(own) <= len(first) else own


class SecondSize(_OfTheFirst):
    """Later graphs dispatch from the inputs of the first."""

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        """The first graph's, in a capture."""
        return self._instead(rows) if self.capture else rows


class SharedResult(_OfTheFirst):
    """Later graphs hand out the result of the first."""

    def combined(self, combined: Combined) -> None:
        """The first graph's, in a capture; a copy there, since libraries have one buffer for all calls."""
        if self.capture:
            own = combined.output.clone() if self._of in (0, self.capture) else combined.output
            combined.output = self._instead(own)


DEFECTS: dict[str, type[Defect]] = {
    "stale_capture": StaleCapture,
    "frozen_count": FrozenCount,
    "cold_replay": ColdReplay,
    "second_size": SecondSize,
    "shared_result": SharedResult,
}


class FaultySession:
    """Wraps what a session builds and captures."""

    def __init__(self, genuine: Session, context: RankContext, defect: Defect) -> None:
        self._genuine, self._context, self._defect = genuine, context, defect

    @property
    def graphs(self) -> FaultyGraphs:
        """What captures, where anything does."""
        return FaultyGraphs(graphs_of(self._genuine, self._context), self._defect)

    def build(self, problem: Any, kernel_type: str) -> FaultyOperation:
        """Build the genuine operation, and wrap it."""
        built = self._genuine.build(problem, kernel_type)
        self._defect.renew()
        return FaultyOperation(built, self._defect)

    def close(self) -> None:
        """Close the genuine session."""
        self._genuine.close()


class FaultyGraphs:
    """Counts captures for a defect, and has it wrap their graphs."""

    def __init__(self, genuine: Any, defect: Defect) -> None:
        self._genuine, self._defect = genuine, defect

    def warm_up(self) -> AbstractContextManager[None]:
        """As the genuine one."""
        found: AbstractContextManager[None] = self._genuine.warm_up()
        return found

    @contextmanager
    def capture(self) -> Iterator[Graph]:
        """Capture with the defect at work."""
        defect = self._defect
        defect.captures += 1
        with self._genuine.capture() as graph:
            defect.capture = defect.captures
            try:
                yield defect.wrapped(graph)
            finally:
                defect.capture = 0


class FaultyOperation:
    """An operation with a defect in what captured calls get and give."""

    def __init__(self, genuine: Operation, defect: Defect) -> None:
        self._genuine, self._defect = genuine, defect

    def prepare(self, rows: torch.Tensor, *others: Any) -> Received:
        """Dispatch what the defect makes of the rows."""
        return self._received(rows, self._genuine.prepare(self._defect.rows(rows), *others))

    def _received(self, rows: torch.Tensor, received: Received) -> Received:
        self._defect.received(rows, received)
        if received.replay is not None:
            received.replay = self._replay(received.replay)
        return received

    def _replay(self, again: Callable[..., Received]) -> Callable[..., Received]:
        return lambda rows, *others: self._received(rows, again(self._defect.rows(rows), *others))

    def finalize(self, expert_rows: torch.Tensor, received: Received) -> Combined:
        """Combine, and have the defect change the result."""
        combined = self._genuine.finalize(expert_rows, received)
        self._defect.combined(combined)
        return combined

    def close(self) -> None:
        """Close the genuine operation."""
        self._genuine.close()
