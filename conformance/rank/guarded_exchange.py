"""A dispatch/combine whose exceptions, and whose malformed results, are marked as the backend's.

What a result that passes here does not prove: that its content is right; the judge looks at that.
"""

from __future__ import annotations

import torch

from accelerated.interface import Combined, Operation, Received
from accelerated.wires import elements
from conformance.rank.guard import backend_code
from reference.problem import Problem


class GuardedExchange:
    """An operation behind the interface's own promises.

    Args:
        operation: of the backend.
        problem: that it was built for; its capacity does not matter here.
    """

    def __init__(self, operation: Operation, problem: Problem) -> None:
        self._operation, self._problem = operation, problem
        self._dtype: torch.dtype = getattr(torch, problem.dtype)
        self._tokens = 0  # of the last dispatch, which the next combine answers

    def prepare(
        self, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor | None = None
    ) -> Received:
        with backend_code():
            # A backend that knows no wire formats may lack the argument.
            given = (rows, ids, weights) if scales is None else (rows, ids, weights, scales)
            return self._checked(self._operation.prepare(*given), rows, scales)

    def _checked(self, received: Received, rows: torch.Tensor, scales: torch.Tensor | None) -> Received:
        capacity, modes, top_k = received.rows.shape[0], self._problem.modes, self._problem.top_k
        self._tokens = rows.shape[0]
        _expect("rows", received.rows, (capacity, rows.shape[1]), rows.dtype)
        if scales is not None:
            _expect("scales", received.scales, (capacity, scales.shape[1]), scales.dtype)
        elif received.scales is not None:
            raise TypeError("scales came back from a dispatch without wire; the interface asks for None")
        _expect("ids", received.ids, (capacity, top_k), torch.int32)
        _expect("weights", received.weights, (capacity, top_k), torch.float32)
        _expect("count", received.count, (1,), torch.int32)
        if received.counter is not None:
            _expect("counter", received.counter, (1,), torch.int32)
        if "expert count" in modes:
            _expect("expert count", received.expert_count, (self._problem.experts_per_rank,), torch.int32)
        if "zero-copy" in modes:
            # The experts write into it: what does not hold their rows would trip them.
            _expect("buffer", received.buffer, (capacity, elements(self._problem, rows)), self._dtype)
        self._guard_calls(received)
        return received

    def _guard_calls(self, received: Received) -> None:
        """Wrap what the harness may call later."""
        if received.source_map is not None:
            inner = received.source_map

            def source_map() -> torch.Tensor:
                with backend_code():
                    return inner()

            received.source_map = source_map
        if "handle" not in self._problem.modes:
            return
        if received.replay is None:
            raise TypeError("nothing to replay came back; the interface asks for it in the mode handle")
        again = received.replay

        def replay(rows: torch.Tensor, weights: torch.Tensor | None, scales: torch.Tensor | None) -> Received:
            with backend_code():
                return self._checked(again(rows, weights, scales), rows, scales)

        received.replay = replay

    def finalize(self, expert_rows: torch.Tensor, received: Received) -> Combined:
        with backend_code():
            combined = self._operation.finalize(expert_rows, received)
            _expect("output", combined.output, (self._tokens, expert_rows.shape[1]), expert_rows.dtype)
            if combined.weights is not None:
                _expect("combined weights", combined.weights, (self._tokens, self._problem.top_k), torch.float32)
            return combined

    def close(self) -> None:
        with backend_code():
            self._operation.close()


def _expect(name: str, got: object, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Malformed results are the backend's failure and must not trip our own code later.

    Raises:
        TypeError: ``got`` is no tensor of that shape and element type.
    """
    if not isinstance(got, torch.Tensor):
        raise TypeError(f"{name} is {type(got).__name__}; the interface asks for a tensor")
    if tuple(got.shape) != shape or got.dtype != dtype:
        raise TypeError(f"{name} is {list(got.shape)} {got.dtype}; the interface asks for {list(shape)} {dtype}")
