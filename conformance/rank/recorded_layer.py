"""A layer whose results are kept for a second judge.

Scope: copies on the device, made before the next forward pass; no host sync. What is kept proves nothing by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from accelerated.experts import LayerOperation
from reference.expert_weights import ExpertWeights


class RecordedLayer:
    """A :class:`accelerated.experts.LayerOperation` that keeps what each forward pass gave.

    Args:
        operation: the layer.
        loads: keep the experts' loads as well.
    """

    def __init__(self, operation: LayerOperation, *, loads: bool = False) -> None:
        self._operation, self._keeps_loads = operation, loads
        self.outputs: list[torch.Tensor] = []
        self.loads: list[torch.Tensor] = []
        if loads:
            operation.record_load()

    def clear(self) -> None:
        """Forget what was kept."""
        self.outputs.clear()
        self.loads.clear()

    def load(self, weights: ExpertWeights, owned: Sequence[int]) -> None:
        self._operation.load(weights, owned)

    def forward(self, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        output = self._operation.forward(rows, ids, weights)
        self.outputs.append(output.clone())
        if self._keeps_loads:
            self.loads.append(self._operation.expert_load())
        return output

    def record_load(self) -> None:
        self._operation.record_load()

    def expert_load(self) -> torch.Tensor:
        return self._operation.expert_load()

    def close(self) -> None:
        self._operation.close()
