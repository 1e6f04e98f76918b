"""A router's exceptions and malformed results are the backend's failure.

Scope: one wrapper around an operation; what passes it can be judged and is not proven right.
"""

from __future__ import annotations

import torch

from accelerated.routers import RouteOperation, RouteResult
from conformance.rank.guard import backend_code, expect_tensor


class GuardedRouter:
    """A router whose exceptions are marked as the backend's."""

    def __init__(self, operation: RouteOperation) -> None:
        self._operation = operation

    def route(self, logits: torch.Tensor, bias: torch.Tensor | None) -> RouteResult:
        """See :class:`accelerated.routers.RouteOperation`.

        Raises:
            BackendError: the operation raised, or returned what is no result.
        """
        with backend_code():
            result = self._operation.route(logits, bias)
            if not isinstance(result, RouteResult):
                raise TypeError(f"the router's result is {type(result).__name__}; the interface asks for RouteResult")
            expect_tensor("weights", result.weights, logits.device)
            expect_tensor("ids", result.ids, logits.device)
            return result

    def close(self) -> None:
        """Release the operation."""
        with backend_code():
            self._operation.close()
