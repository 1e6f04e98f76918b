"""Experts and sorts with one defect each, around the genuine operations of a stand-in.

Scope: what goes into an operation, what comes out, and what it is loaded with; whole layers are in
:mod:`conformance.faults.whole_layers`; see :mod:`conformance.faults.layer_catalogue`. They prove nothing about defects
inside a kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from accelerated.experts import ExpertProblem
from accelerated.sorting import SortResult
from conformance.faults.whole_layers import (
    LastSlotLost,
    Layer,
    LoadOfOwnTokens,
    LocalExpertsOnly,
    ReplicaBitFlipped,
    RowBitFlipped,
    StaleReplica,
    TokensSwapped,
)
from reference.expert_weights import ExpertWeights
from reference.sorting import TOKEN_BITS

Given = tuple[Tensor, Tensor, Tensor, Tensor | None]
_TILE = 32
_LONG = 32


class Experts:
    """An experts operation without a defect; the others change one step of it."""

    def __init__(self, genuine: Any, problem: ExpertProblem) -> None:
        self.genuine, self.problem = genuine, problem
        self.owned: list[int] = []
        self.local = torch.zeros(0, dtype=torch.bool)

    def load(self, weights: ExpertWeights, owned: Sequence[int]) -> None:
        self.owned = list(owned)
        self.local = torch.zeros(self.problem.experts + self.problem.shared + 1, dtype=torch.bool)
        self.local[self.owned] = True
        self.genuine.load(self.weights(weights), owned)

    def quantise(self, rows: Tensor) -> Any:
        return self.genuine.quantise(rows)

    def experts(
        self,
        rows: Tensor,
        ids: Tensor,
        weights: Tensor,
        *,
        scales: Tensor | None = None,
        num_rows: Tensor | None = None,
    ) -> Tensor:
        given = self.given(rows, ids, weights, num_rows)
        output = self.genuine.experts(*given[:3], scales=scales, num_rows=given[3])
        return self.taken(output, rows, num_rows)

    def close(self) -> None:
        self.genuine.close()

    def weights(self, weights: ExpertWeights) -> ExpertWeights:
        """What is loaded."""
        return weights

    def given(self, rows: Tensor, ids: Tensor, weights: Tensor, num_rows: Tensor | None) -> Given:
        """What the genuine operation is given."""
        return rows, ids, weights, num_rows

    def taken(self, output: Tensor, rows: Tensor, num_rows: Tensor | None) -> Tensor:
        """What comes back."""
        del rows, num_rows
        return output

    def is_local(self, ids: Tensor) -> Tensor:
        """Which of ``ids`` are this shard's."""
        known = (ids >= 0) & (ids < len(self.local))
        return known & self.local[ids.clamp(0, len(self.local) - 1).long()]


class MaskAsMap(Experts):
    """``mask_as_map``."""

    def given(self, rows: Tensor, ids: Tensor, weights: Tensor, num_rows: Tensor | None) -> Given:
        second = self.owned[min(1, len(self.owned) - 1)]
        return rows, torch.where(self.is_local(ids), second, ids).to(ids.dtype), weights, num_rows


class MapAsMask(Experts):
    """``map_as_mask``."""

    def given(self, rows: Tensor, ids: Tensor, weights: Tensor, num_rows: Tensor | None) -> Given:
        local = self.is_local(ids)
        place = (local.long().cumsum(1) - 1).clamp(0, len(self.owned) - 1)
        return rows, torch.where(local, torch.tensor(self.owned)[place], ids).to(ids.dtype), weights, num_rows


class HistogramAsCount(Experts):
    """``histogram_as_count``."""

    def given(self, rows: Tensor, ids: Tensor, weights: Tensor, num_rows: Tensor | None) -> Given:
        if num_rows is not None:
            first = (ids[: int(num_rows)] == self.owned[0]).any(1).sum()
            num_rows = first.to(num_rows.dtype).reshape(1)
        return rows, ids, weights, num_rows


class LongBufferZeros(Experts):
    """``long_buffer_zeros``."""

    def taken(self, output: Tensor, rows: Tensor, num_rows: Tensor | None) -> Tensor:
        if num_rows is not None and 0 < int(num_rows) * _LONG <= rows.shape[0]:
            output[: int(num_rows)] = 0
        return output


class TailLeaks(Experts):
    """``tail_leaks``."""

    def taken(self, output: Tensor, rows: Tensor, num_rows: Tensor | None) -> Tensor:
        if num_rows is not None and int(num_rows) < rows.shape[0]:
            output[: int(num_rows)] += (rows[int(num_rows) :].float() * 0).sum(0).to(output.dtype)
        return output


class GateUpSwapped(Experts):
    """``gate_up_swapped``."""

    def weights(self, weights: ExpertWeights) -> ExpertWeights:
        def swapped(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else torch.cat(tensor.chunk(2, 1)[::-1], 1)

        first = swapped(weights.w1)
        assert first is not None
        return replace(weights, w1=first, w1_scales=swapped(weights.w1_scales), bias1=swapped(weights.bias1))


class WeightsIgnored(Experts):
    """``weights_ignored``."""

    def given(self, rows: Tensor, ids: Tensor, weights: Tensor, num_rows: Tensor | None) -> Given:
        return rows, ids, torch.ones_like(weights), num_rows


class NegativeWeightsLost(Experts):
    """``negative_weights_lost``."""

    def given(self, rows: Tensor, ids: Tensor, weights: Tensor, num_rows: Tensor | None) -> Given:
        return rows, ids, weights.clamp(min=0), num_rows


class DuplicateOnce(Experts):
    """``duplicate_once``."""

    def given(self, rows: Tensor, ids: Tensor, weights: Tensor, num_rows: Tensor | None) -> Given:
        earlier = (ids[:, :, None] == ids[:, None, :]).tril(-1).any(2)
        return rows, ids, torch.where(earlier, 0.0, weights), num_rows


class MaskedComputed(Experts):
    """``masked_computed``."""

    def given(self, rows: Tensor, ids: Tensor, weights: Tensor, num_rows: Tensor | None) -> Given:
        return rows, torch.where(ids < 0, self.owned[0], ids).to(ids.dtype), weights, num_rows


class RowsBehindATile(Experts):
    """``rows_behind_a_tile``."""

    def taken(self, output: Tensor, rows: Tensor, num_rows: Tensor | None) -> Tensor:
        output[_TILE:] = 0
        return output


class ScaleOfNextRow(Experts):
    """``scale_of_next_row``."""

    def weights(self, weights: ExpertWeights) -> ExpertWeights:
        assert weights.w2_scales is not None
        return replace(weights, w2_scales=weights.w2_scales.roll(-1, 1))


class SecondQuantisation(Experts):
    """``second_quantisation``."""

    def given(self, rows: Tensor, ids: Tensor, weights: Tensor, num_rows: Tensor | None) -> Given:
        if rows.dtype == torch.bfloat16 and rows.numel():
            scale = rows.float().abs().nan_to_num(0, 0, 0).amax(1, keepdim=True).clamp(min=1e-6) / 100
            rows = ((rows.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(rows.dtype)
        return rows, ids, weights, num_rows


class BiasByGlobalId(Experts):
    """``bias_by_global_id``."""

    def load(self, weights: ExpertWeights, owned: Sequence[int]) -> None:
        # The adapter's tensors hold local experts only: what lies at a global id is another one's.
        if weights.bias1 is not None and weights.bias2 is not None:
            place = torch.tensor([g % weights.experts for g in owned]).roll(int(min(owned) > 0))
            weights = replace(weights, bias1=weights.bias1[place], bias2=weights.bias2[place])
        super().load(weights, owned)


class CachedByRows(Experts):
    """``cached_by_rows``."""

    _held: tuple[Tensor, Tensor] | None = None

    def experts(
        self,
        rows: Tensor,
        ids: Tensor,
        weights: Tensor,
        *,
        scales: Tensor | None = None,
        num_rows: Tensor | None = None,
    ) -> Tensor:
        if self._held is not None and torch.equal(self._held[0], rows):
            return self._held[1].clone()
        output = super().experts(rows, ids, weights, scales=scales, num_rows=num_rows)
        self._held = rows.clone(), output.clone()
        return output


class Unsteady(Experts):
    """``unsteady``."""

    _before: Tensor | None = None

    def experts(
        self,
        rows: Tensor,
        ids: Tensor,
        weights: Tensor,
        *,
        scales: Tensor | None = None,
        num_rows: Tensor | None = None,
    ) -> Tensor:
        output = super().experts(rows, ids, weights, scales=scales, num_rows=num_rows)
        if self._before is not None and torch.equal(self._before, rows) and output.numel():
            # A negative zero for a positive one, or the other way round: no interval tells them apart.
            output = torch.where(output == 0, -output, output)
        self._before = rows.clone()
        return output


class Sort:
    """A sort without a defect; the others change one step of it."""

    def __init__(self, genuine: Any, problem: ExpertProblem) -> None:
        self.genuine, self.problem = genuine, problem
        self.owned: list[int] = []

    def place(self, owned: Sequence[int]) -> None:
        self.owned = list(owned)
        self.genuine.place(owned)

    def sort(self, ids: Tensor, weights: Tensor, *, num_rows: Tensor | None = None) -> SortResult:
        found: SortResult = self.genuine.sort(ids, weights, num_rows=num_rows)
        return self.taken(found, ids.shape[1])

    def taken(self, found: SortResult, top_k: int) -> SortResult:
        """What comes back."""
        del top_k
        return found

    def close(self) -> None:
        self.genuine.close()


class PaddingNamesRowZero(Sort):
    """``padding_names_row_zero``."""

    def taken(self, found: SortResult, top_k: int) -> SortResult:
        return replace(found, entries=torch.where(found.entries >> TOKEN_BITS == top_k, 0, found.entries))


class SortInInt64(Sort):
    """``sort_in_int64``."""

    def taken(self, found: SortResult, top_k: int) -> SortResult:
        return replace(found, entries=found.entries.long())


class SortWeightsBySlot(Sort):
    """``sort_weights_by_slot``."""

    def sort(self, ids: Tensor, weights: Tensor, *, num_rows: Tensor | None = None) -> SortResult:
        wrong = torch.cat([weights[:, :1], weights[:, :1], weights[:, 2:]], 1)[:, : ids.shape[1]]
        return super().sort(ids, wrong, num_rows=num_rows)


class SortIgnoresCount(Sort):
    """``sort_ignores_count``."""

    def sort(self, ids: Tensor, weights: Tensor, *, num_rows: Tensor | None = None) -> SortResult:
        return super().sort(ids, weights)


class SortNamesGlobalExperts(Sort):
    """``sort_names_global_experts``."""

    def taken(self, found: SortResult, top_k: int) -> SortResult:
        return replace(found, experts=found.experts + self.owned[0])


class BufferNotCleared(Sort):
    """``buffer_not_cleared``."""

    def taken(self, found: SortResult, top_k: int) -> SortResult:
        if found.output is not None:
            found.output[:1] = 1.0
        return found


#: Classes by name of the fault.
DEFECTS: dict[str, type[Experts] | type[Sort] | type[Layer]] = {
    "mask_as_map": MaskAsMap,
    "map_as_mask": MapAsMask,
    "histogram_as_count": HistogramAsCount,
    "long_buffer_zeros": LongBufferZeros,
    "tail_leaks": TailLeaks,
    "gate_up_swapped": GateUpSwapped,
    "weights_ignored": WeightsIgnored,
    "negative_weights_lost": NegativeWeightsLost,
    "duplicate_once": DuplicateOnce,
    "masked_computed": MaskedComputed,
    "rows_behind_a_tile": RowsBehindATile,
    "scale_of_next_row": ScaleOfNextRow,
    "second_quantisation": SecondQuantisation,
    "bias_by_global_id": BiasByGlobalId,
    "cached_by_rows": CachedByRows,
    "unsteady": Unsteady,
    "padding_names_row_zero": PaddingNamesRowZero,
    "sort_in_int64": SortInInt64,
    "sort_weights_by_slot": SortWeightsBySlot,
    "sort_ignores_count": SortIgnoresCount,
    "sort_names_global_experts": SortNamesGlobalExperts,
    "buffer_not_cleared": BufferNotCleared,
    "local_experts_only": LocalExpertsOnly,
    "last_slot_lost": LastSlotLost,
    "tokens_swapped": TokensSwapped,
    "stale_replica": StaleReplica,
    "replica_bit_flipped": ReplicaBitFlipped,
    "row_bit_flipped": RowBitFlipped,
    "load_of_own_tokens": LoadOfOwnTokens,
}
