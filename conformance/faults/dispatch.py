"""Operators that lose, repeat or misdirect rows on their way out.

Scope: subclasses of the double's operator with one defect each, overriding its documented hooks. They synchronise the
host where that is convenient, which the double need not avoid on the CPU; they prove nothing about timing.
"""

from __future__ import annotations

from random import Random

import torch

from accelerated.standin.mori_ep.buffers import Buffers
from accelerated.standin.mori_ep.ops import EpDispatchCombineOp
from accelerated.standin.mori_ep.wire import Arrival

#: Probability with which a call of :class:`RareLoss` loses a row.
RARE = 0.03


class DroppedRow(EpDispatchCombineOp):
    """The last token that leaves its rank does not reach its last other rank."""

    def _destinations(self, ids: torch.Tensor, owners: torch.Tensor) -> torch.Tensor:
        mask = super()._destinations(ids, owners)
        away = mask.clone()
        away[:, self._rank] = False
        crossing = away.any(1).nonzero().flatten()
        if len(crossing):
            token = crossing[-1]
            mask[token, away[token].nonzero().flatten()[-1]] = False
        return mask


class DuplicatedRow(EpDispatchCombineOp):
    """A rank that owns two experts of a token receives its row twice: deduplication misses the first such row."""

    _extra = 0

    def _deliver_rows(self, arrival: Arrival, slots: torch.Tensor) -> None:
        super()._deliver_rows(arrival, slots)
        buffers, ids, total = self._buffers, arrival.sections.ids, int(arrival.total)
        mine = torch.div(ids, self.config.num_experts_per_rank, rounding_mode="floor") == self._rank
        twice = (_valid(arrival) & (mine.sum(1) > 1)).nonzero().flatten()
        self._extra = int(len(twice) > 0 and total < buffers.capacity)
        if self._extra:
            slot = slots[twice[0]]
            for memory in (_payload(self, arrival), buffers.ids, buffers.weights, buffers.source):
                memory[total] = memory[slot]

    def _total(self, total: torch.Tensor) -> None:
        super()._total(total + self._extra)


class WrongExpertOffset(EpDispatchCombineOp):
    """The last expert of every rank is looked for on the next rank."""

    def _owners(self, ids: torch.Tensor) -> torch.Tensor:
        owners = super()._owners(ids)
        last = ids % self.config.num_experts_per_rank == self.config.num_experts_per_rank - 1
        return torch.where(last & (ids >= 0) & (owners < self.config.world_size - 1), owners + 1, owners)


class StaleRound(EpDispatchCombineOp):
    """The first row from another rank is read before it arrived, unless the host synchronised since the round before.

    What is read in its place is the first row of that round.
    """

    _drained = True
    _before: torch.Tensor | None = None

    def get_dispatch_src_token_pos(self) -> torch.Tensor:
        """As the genuine one, which synchronises."""
        self._drained = True
        return super().get_dispatch_src_token_pos()

    def _deliver_rows(self, arrival: Arrival, slots: torch.Tensor) -> None:
        super()._deliver_rows(arrival, slots)
        out = _payload(self, arrival)
        first = out[0].clone() if int(arrival.total) else None
        crossing = (_valid(arrival) & (arrival.origin != self._rank)).nonzero().flatten()
        if self._before is not None and not self._drained and len(crossing):
            out[slots[crossing[0]]] = self._before
        self._before, self._drained = first, False


class LastMetadataLost(EpDispatchCombineOp):
    """The last of two or more received rows comes without its expert ids and weights."""

    def _deliver_rows(self, arrival: Arrival, slots: torch.Tensor) -> None:
        super()._deliver_rows(arrival, slots)
        total = int(arrival.total)
        if total > 1:
            self._buffers.ids[total - 1] = -1
            self._buffers.weights[total - 1] = 0.0


class MaskedAsRankZero(EpDispatchCombineOp):
    """A masked slot counts as an expert of rank 0: -1 divided by the experts per rank, truncated."""

    def _owners(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.where(ids < 0, 0, super()._owners(ids))


class CapacityOffByOne(EpDispatchCombineOp):
    """A rank that sends as many tokens as the operator holds loses the last one."""

    def _destinations(self, ids: torch.Tensor, owners: torch.Tensor) -> torch.Tensor:
        mask = super()._destinations(ids, owners)
        if mask.size(0) == self._tokens:
            mask[-1] = False
        return mask


_chances: dict[int, Random] = {}


class RareLoss(EpDispatchCombineOp):
    """In 3 % of the calls the last token of a rank reaches nobody, whatever the data are."""

    def _destinations(self, ids: torch.Tensor, owners: torch.Tensor) -> torch.Tensor:
        mask = super()._destinations(ids, owners)
        # One sequence per process, not per operator: a rebuilt operator must not repeat it.
        chance = _chances.setdefault(self._rank, Random(self._rank))
        sent = mask.any(1).nonzero().flatten()
        if chance.random() < RARE and len(sent):
            mask[sent[-1]] = False
        return mask


def _valid(arrival: Arrival) -> torch.Tensor:
    """``[Q]`` bool."""
    return torch.ones_like(arrival.number, dtype=torch.bool) if arrival.valid is None else arrival.valid


def _payload(op: EpDispatchCombineOp, arrival: Arrival) -> torch.Tensor:
    """The received rows as words, ``[R + 1, words]``."""
    payload = arrival.sections.payload
    return Buffers.view(op._buffers.out, op._buffers.capacity + 1, payload.size(1), payload.dtype)
