"""Experts and layers whose exceptions are marked as the backend's.

Scope: what :mod:`conformance.rank.guard` is to one call, for the operations of a layer. What passes here is not proven
right; it can be judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from accelerated.experts import ExpertOperation, LayerOperation
from conformance.rank.guard import backend_code, expect_tensor
from reference.expert_weights import ExpertWeights


class GuardedExperts:
    """Experts of one rank."""

    def __init__(self, operation: ExpertOperation) -> None:
        self._operation = operation

    def load(self, weights: ExpertWeights, owned: Sequence[int]) -> None:
        with backend_code():
            self._operation.load(weights, owned)

    def quantise(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        with backend_code():
            codes, scales = self._operation.quantise(rows)
            expect_tensor("codes", codes, rows.device)
            if scales is not None:
                expect_tensor("scales", scales, rows.device)
            return codes, scales

    def experts(
        self,
        rows: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        *,
        scales: torch.Tensor | None = None,
        num_rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        with backend_code():
            output = self._operation.experts(rows, ids, weights, scales=scales, num_rows=num_rows)
            expect_tensor("output", output, rows.device)
            return output

    def close(self) -> None:
        with backend_code():
            self._operation.close()


class GuardedLayer:
    """A whole layer."""

    def __init__(self, operation: LayerOperation) -> None:
        self._operation = operation
        self._device = torch.device("cpu")

    def load(self, weights: ExpertWeights, owned: Sequence[int]) -> None:
        with backend_code():
            self._operation.load(weights, owned)

    def forward(self, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        with backend_code():
            output = self._operation.forward(rows, ids, weights)
            expect_tensor("output", output, rows.device)
            self._device = rows.device
            return output

    def record_load(self) -> None:
        with backend_code():
            self._operation.record_load()

    def expert_load(self) -> torch.Tensor:
        with backend_code():
            load = self._operation.expert_load()
            expect_tensor("load", load, self._device)
            return load

    def close(self) -> None:
        with backend_code():
            self._operation.close()


class Together:
    """Operations of several shards, closed together."""

    def __init__(self, operations: Sequence[Any]) -> None:
        self._operations = operations

    def close(self) -> None:
        for operation in self._operations:
            with backend_code():
                operation.close()
