"""A dispatch/combine whose exceptions, and whose malformed results, are marked as the backend's.

What a result that passes here does not prove: that its content is right; the judge looks at that.
"""

from __future__ import annotations

import torch

from accelerated.interface import Combined, Operation, Received
from conformance.rank.guard import backend_code


class GuardedExchange:
    """An operation behind the interface's own promises.

    Args:
        operation: of the backend.
        hidden: elements of a whole row.
        top_k: slots of a token.
        experts_per_rank: counted in the mode ``expert count``.
        modes: of the problem.
    """

    def __init__(
        self, operation: Operation, hidden: int, top_k: int, experts_per_rank: int = 0, modes: tuple[str, ...] = ()
    ) -> None:
        self._operation = operation
        self._hidden, self._top_k = hidden, top_k
        self._experts_per_rank, self._modes = experts_per_rank, modes

    def prepare(
        self, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor | None = None
    ) -> Received:
        with backend_code():
            # A backend that knows no wire formats may lack the argument.
            given = (rows, ids, weights) if scales is None else (rows, ids, weights, scales)
            return self._checked(self._operation.prepare(*given), rows, scales)

    def _checked(self, received: Received, rows: torch.Tensor, scales: torch.Tensor | None) -> Received:
        capacity = received.rows.shape[0]
        _expect("rows", received.rows, (capacity, rows.shape[1]), rows.dtype)
        if scales is not None:
            _expect("scales", received.scales, (capacity, scales.shape[1]), scales.dtype)
        elif received.scales is not None:
            raise TypeError("scales came back from a dispatch without wire; the interface asks for None")
        _expect("ids", received.ids, (capacity, self._top_k), torch.int32)
        _expect("weights", received.weights, (capacity, self._top_k), torch.float32)
        _expect("count", received.count, (1,), torch.int32)
        if "expert count" in self._modes:
            _expect("expert count", received.expert_count, (self._experts_per_rank,), torch.int32)
        if "zero-copy" in self._modes and received.buffer is None:
            raise TypeError("no buffer came back; the interface asks for one in the mode zero-copy")
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
        if "handle" not in self._modes:
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
            _expect("output", combined.output, tuple(combined.output.shape), expert_rows.dtype)
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
