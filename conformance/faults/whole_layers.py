"""Whole layers with one defect each, around the genuine layer of two stand-ins.

Scope: what goes into a layer, what comes out, what it is loaded with, what its dispatch delivers and what it counts;
see :mod:`conformance.faults.layer_catalogue`. They prove nothing about defects inside a kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from accelerated.experts import LayerProblem
from accelerated.interface import Received
from reference.expert_weights import ExpertWeights


class Layer:
    """A layer without a defect; the others change one step of it."""

    def __init__(self, genuine: Any, problem: LayerProblem, rank: int) -> None:
        self.genuine, self.problem, self.rank = genuine, problem, rank

    def load(self, weights: ExpertWeights, owned: Sequence[int]) -> None:
        self.genuine.load(weights, owned)

    def forward(self, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        output: Tensor = self.genuine.forward(rows, ids, weights)
        return output

    def record_load(self) -> None:
        self.genuine.record_load()

    def expert_load(self) -> Tensor:
        load: Tensor = self.genuine.expert_load()
        return load

    def close(self) -> None:
        self.genuine.close()


class LocalExpertsOnly(Layer):
    """``local_experts_only``."""

    def forward(self, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        owner = torch.div(ids, self.problem.exchange.experts_per_rank, rounding_mode="floor")
        return super().forward(rows, ids, torch.where(owner == self.rank, weights, 0.0))


class LastSlotLost(Layer):
    """``last_slot_lost``."""

    def forward(self, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        kept = weights.clone()
        kept[:, 1:][:, -1:] = 0
        return super().forward(rows, ids, kept)


class TokensSwapped(Layer):
    """``tokens_swapped``."""

    def forward(self, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        output = super().forward(rows, ids, weights).clone()
        return torch.cat([output[:2].flip(0), output[2:]])


class StaleReplica(Layer):
    """``stale_replica``."""

    _held: ExpertWeights | None = None

    def load(self, weights: ExpertWeights, owned: Sequence[int]) -> None:
        last, held = weights.experts - 1, self._held
        self._held = weights
        if held is not None:
            first, second = weights.w1.clone(), weights.w2.clone()
            first[last], second[last] = held.w1[last], held.w2[last]
            weights = replace(weights, w1=first, w2=second)
        super().load(weights, owned)


class ReplicaBitFlipped(Layer):
    """``replica_bit_flipped``."""

    def load(self, weights: ExpertWeights, owned: Sequence[int]) -> None:
        if self.rank == 0:
            first = weights.w1.clone()
            first.view(torch.uint8)[-1, 0].bitwise_xor_(1)
            weights = replace(weights, w1=first)
        super().load(weights, owned)


class RowBitFlipped(Layer):
    """``row_bit_flipped``."""

    def __init__(self, genuine: Any, problem: LayerProblem, rank: int) -> None:
        super().__init__(genuine, problem, rank)
        genuine._dispatch = _FlippingDispatch(genuine._dispatch)


class _FlippingDispatch:
    """A dispatch and combine whose rows arrive with the last bit of their first element flipped."""

    def __init__(self, genuine: Any) -> None:
        self._genuine = genuine

    def prepare(self, *sent: Tensor) -> Received:
        received: Received = self._genuine.prepare(*sent)
        rows = received.rows.clone()
        rows.view(torch.uint8)[:, 0] ^= 1
        received.rows = rows
        return received

    def finalize(self, expert_rows: Tensor, received: Received) -> Any:
        return self._genuine.finalize(expert_rows, received)

    def close(self) -> None:
        self._genuine.close()


class LoadOfOwnTokens(Layer):
    """``load_of_own_tokens``."""

    _owned: Sequence[int] = ()
    _ids: Tensor = torch.empty(0, dtype=torch.int32)

    def load(self, weights: ExpertWeights, owned: Sequence[int]) -> None:
        self._owned = list(owned)
        super().load(weights, owned)

    def forward(self, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        self._ids = ids.clone()
        return super().forward(rows, ids, weights)

    def expert_load(self) -> Tensor:
        owned = torch.tensor(self._owned, device=self._ids.device)
        return (self._ids.reshape(-1, 1) == owned).sum(0)
