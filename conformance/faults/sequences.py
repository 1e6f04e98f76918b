"""Operators that are right round by round and go wrong in the company of other calls.

Scope: subclasses of the double's operator with one defect each, overriding its documented hooks. What two operators of
a process share is shared here through the module, as it would be through a symmetric heap. They prove nothing about
timing.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import torch

from accelerated.standin.mori_ep.buffers import INT_POISON, Buffers
from accelerated.standin.mori_ep.config import EpDispatchCombineConfig
from accelerated.standin.mori_ep.ops import EpDispatchCombineOp
from accelerated.standin.mori_ep.state import CombineCall, DispatchCall
from accelerated.standin.mori_ep.wire import Arrival, DispatchWire

_alive: weakref.WeakSet[EpDispatchCombineOp] = weakref.WeakSet()


def _others(op: EpDispatchCombineOp) -> Iterator[EpDispatchCombineOp]:
    return (other for other in list(_alive) if other is not op)


class _Known(EpDispatchCombineOp):
    """An operator that others of the process find."""

    def __init__(self, config: EpDispatchCombineConfig) -> None:
        super().__init__(config)
        gc.collect()  # whether an operator is alive must not depend on when cycles are collected
        _alive.add(self)


class SharedReceived(_Known):
    """A second operator receives into the first one's memory, if that is large enough."""

    def __init__(self, config: EpDispatchCombineConfig) -> None:
        super().__init__(config)
        for other in _others(self):
            if other._buffers.out.numel() >= self._buffers.out.numel():
                self._buffers.out = other._buffers.out


class SharedOutput(_Known):
    """A second operator combines into the first one's output, if that is large enough."""

    def __init__(self, config: EpDispatchCombineConfig) -> None:
        super().__init__(config)
        for other in _others(self):
            if other._buffers.combined.numel() >= self._buffers.combined.numel():
                self._buffers.combined = other._buffers.combined


class ScribbledIds(_Known):
    """A combine stages its rows where another operator still holds the ids of what it received."""

    def _run_combine(self, call: CombineCall) -> None:
        super()._run_combine(call)
        for other in _others(self):
            other._buffers.ids.fill_(INT_POISON)


class OutputInReceived(EpDispatchCombineOp):
    """Combine writes its output into the memory of received rows, which the next dispatch overwrites."""

    def __init__(self, config: EpDispatchCombineConfig) -> None:
        super().__init__(config)
        self._buffers.combined = self._buffers.out


class MemoryLeft(EpDispatchCombineOp):
    """An operator made in the memory of a destroyed one delivers that one's first row first, once.

    The memory is cleared when no operator is left in it.
    """

    _first: torch.Tensor | None = None
    _found: torch.Tensor | None = None
    _left: torch.Tensor | None = None
    _count = 0

    def __init__(self, config: EpDispatchCombineConfig) -> None:
        gc.collect()
        super().__init__(config)
        if MemoryLeft._count:
            self._found = MemoryLeft._left
        MemoryLeft._left = None
        MemoryLeft._count += 1

    def __del__(self) -> None:
        MemoryLeft._count -= 1
        MemoryLeft._left = self._first

    def _deliver_rows(self, arrival: Arrival, slots: torch.Tensor) -> None:
        super()._deliver_rows(arrival, slots)
        if not int(arrival.total):
            return
        width = arrival.sections.payload.size(1) * arrival.sections.payload.element_size()
        out = Buffers.view(self._buffers.out, self._buffers.capacity + 1, width, torch.uint8)
        if self._found is not None and self._found.numel() == width:
            out[0] = self._found
        self._found = None
        self._first = out[0].clone()


class ReplayOfLastCount(EpDispatchCombineOp):
    """A replay packs as many rows as were dispatched last, not as many as its handle says."""

    _dispatched = 0

    def _pack_rows(self, wire: DispatchWire, call: DispatchCall, ids: torch.Tensor) -> torch.Tensor:
        tokens = ids.size(0)
        if not call.replay:
            self._dispatched = tokens
            return super()._pack_rows(wire, call, ids)
        missing = slice(min(self._dispatched, tokens), tokens)
        before = wire.sections.payload[missing].clone()
        packed = super()._pack_rows(wire, call, ids)
        wire.sections.payload[missing] = before
        return packed


class StaleTail(EpDispatchCombineOp):
    """After a small round, a large one delivers only as many rows as the small one had; the others are older."""

    _counts = (0, 0)

    def _deliver_rows(self, arrival: Arrival, slots: torch.Tensor) -> None:
        buffers, payload = self._buffers, arrival.sections.payload
        out = Buffers.view(buffers.out, buffers.capacity + 1, payload.size(1), payload.dtype)
        before, total = out.clone(), int(arrival.total)
        super()._deliver_rows(arrival, slots)
        earlier, last = self._counts
        if last < total:
            out[last : min(earlier, total)] = before[last : min(earlier, total)]
        self._counts = (last, total)


class TailIsState(EpDispatchCombineOp):
    """A mark behind the last received row tells combine that there is something to sum."""

    def _deliver_rows(self, arrival: Arrival, slots: torch.Tensor) -> None:
        super()._deliver_rows(arrival, slots)
        total = int(arrival.total)
        self._mark = total if total < self._buffers.capacity else -1
        self._buffers.ids[total, 0] = self._rank

    def _run_combine(self, call: CombineCall) -> None:
        super()._run_combine(call)
        if self._mark >= 0 and int(self._buffers.ids[self._mark, 0]) != self._rank:
            self._buffers.combined.zero_()


class _Remembers(EpDispatchCombineOp):
    """A dispatch that finds changed what it remembers of the round before delivers nothing but zeros."""

    _there: torch.Tensor | None = None
    _then: torch.Tensor | None = None

    def _remember(self, tensor: torch.Tensor) -> None:
        self._there, self._then = tensor, tensor.clone()

    def _deliver_rows(self, arrival: Arrival, slots: torch.Tensor) -> None:
        super()._deliver_rows(arrival, slots)
        if self._there is not None and self._then is not None:
            same = torch.equal(self._there.view(torch.uint8), self._then.view(torch.uint8))
            self._there = self._then = None
            if not same:
                self._buffers.out.zero_()


class OutputIsScratch(_Remembers):
    """The next dispatch relies on the output of combine, which the caller may have written into."""

    def _run_combine(self, call: CombineCall) -> None:
        super()._run_combine(call)
        rows = call.n * call.rows.size(1) * call.rows.dtype.itemsize
        self._remember(self._buffers.combined[:rows])


class LateRows(_Remembers):
    """The next dispatch relies on the experts' rows that combine was given."""

    def _run_combine(self, call: CombineCall) -> None:
        super()._run_combine(call)
        self._remember(call.rows)


class LateIds(_Remembers):
    """The next dispatch relies on the ids that combine was given."""

    def _run_combine(self, call: CombineCall) -> None:
        super()._run_combine(call)
        self._remember(call.indices)


class LateWeights(EpDispatchCombineOp):
    """Combine reads the weights that the caller gave to dispatch once more."""

    _weights: torch.Tensor | None = None

    def _run_dispatch(self, call: DispatchCall) -> None:
        super()._run_dispatch(call)
        self._weights = call.weights

    def _run_combine(self, call: CombineCall) -> None:
        super()._run_combine(call)
        if self._weights is not None:
            self._buffers.combined_weights[: len(self._weights)] += 0 * self._weights
