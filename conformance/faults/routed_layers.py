"""Layers with one defect each between router and dispatch, around the genuine operations of a stand-in.

Scope: what only a layer with its router shows: the router alone is right, and so is the layer where it is given ids and
weights; see :mod:`conformance.faults.layer_catalogue`. They prove nothing about defects inside a kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from accelerated.routers import RouteResult
from conformance.faults.whole_layers import Layer


class Routed(Layer):
    """A layer without a defect that knows its router; the others change one step of either."""

    def router(self, genuine: Any) -> Router:
        """The layer's router."""
        return Router(genuine, self)

    def routed(self, found: RouteResult) -> RouteResult:
        """What the router returns."""
        return found


class Router:
    """A router whose results its layer sees."""

    def __init__(self, genuine: Any, layer: Routed) -> None:
        self._genuine, self._layer = genuine, layer

    def route(self, logits: Tensor, bias: Tensor | None) -> RouteResult:
        found: RouteResult = self._genuine.route(logits, bias)
        return self._layer.routed(found)

    def close(self) -> None:
        self._genuine.close()


class WeightsReadEarly(Routed):
    """``weights_read_early``."""

    _before: Tensor | None = None
    _late: tuple[Tensor, Tensor] | None = None

    def routed(self, found: RouteResult) -> RouteResult:
        before, self._before, self._late = self._before, found.weights, None
        if before is None or before.shape != found.weights.shape:
            return found
        unwritten = before.clone()
        self._late = unwritten, found.weights
        return RouteResult(unwritten, found.ids)

    def forward(self, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        output = super().forward(rows, ids, weights)
        if self._late is not None:
            self._late[0].copy_(self._late[1])
        return output


class IdsUntranslated(Routed):
    """``ids_untranslated``."""

    _raw: Tensor | None = None

    def routed(self, found: RouteResult) -> RouteResult:
        self._raw = found.ids
        return found

    def forward(self, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return super().forward(rows, ids if self._raw is None or len(ids) == 0 else self._raw, weights)


class WeightsOfPaddedRows(Routed):
    """``weights_of_padded_rows``."""

    def routed(self, found: RouteResult) -> RouteResult:
        weights = found.weights
        padded = torch.zeros(len(weights), weights.shape[1] + 1)
        padded[:, :-1] = weights
        return RouteResult(padded[:, :-1], found.ids)

    def forward(self, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        read = torch.as_strided(weights, weights.shape, (weights.shape[1], 1))
        return super().forward(rows, ids, read)


#: Classes by name of the fault.
ROUTED_DEFECTS: dict[str, type[Routed]] = {
    "weights_read_early": WeightsReadEarly,
    "ids_untranslated": IdsUntranslated,
    "weights_of_padded_rows": WeightsOfPaddedRows,
}
