"""Persistent send and receive memory of the exchanges, and how rows find their place in it.

Scope: fixed-size slots of capacity + 1 rows per pair of ranks, whose row 0 is a header, or a ragged exchange after a
count exchange where slots would be large. It proves nothing about staging memory on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from accelerated.standin.mori_ep.buffers import RowLayout, Sections, padded
from accelerated.standin.mori_ep.transport import Transport

#: Largest slot per pair of ranks, in bytes, that is sent at full capacity to save the count exchange.
SLOT_LIMIT = 256 * 1024


@dataclass
class Plan:
    """How the rows of one dispatch travel, and how combine finds their answers.

    Attributes:
        target: ``[n, W + 1]`` int64, row of the answer memory for (token, rank); :attr:`nothing` where none travels.
        nothing: index of the answer row that stays zero.
        leaving, arriving: rows per rank of a ragged exchange, None for slots.
    """

    target: torch.Tensor
    nothing: int
    leaving: list[int] | None = None
    arriving: list[int] | None = None


@dataclass
class Arrival:
    """Rows as they arrived: ``rows [Q, words]`` int64, grouped by source rank.

    Attributes:
        origin: ``[Q]`` int64 source rank; valid: ``[Q]`` bool, or None when every row is.
        total: 0-d or ``[1]`` int64 number of valid rows.
        given: ``[Q, 2]`` bool-like int64: the source passed weights, scales.
        sections: views of ``rows``.
        number: ``[Q]`` int64, 0 to Q - 1.
    """

    rows: torch.Tensor
    origin: torch.Tensor
    valid: torch.Tensor | None
    total: torch.Tensor
    given: torch.Tensor
    sections: Sections
    number: torch.Tensor


class DispatchWire:
    """Exchange of packed rows of one layout."""

    def __init__(
        self,
        layout: RowLayout,
        *,
        world_size: int,
        tokens: int,
        k: int,
        scale_bytes: int,
        rank: int,
        device: torch.device,
    ) -> None:
        self.layout, self._world, self._tokens = layout, world_size, tokens
        self.slotted = (tokens + 1) * layout.size <= SLOT_LIMIT
        words = layout.words
        self.pack = torch.zeros(tokens, words, dtype=torch.int64, device=device)
        self.sections = Sections(self.pack, layout, k, scale_bytes)
        first = rank * world_size * tokens
        self.sections.source.copy_(torch.arange(first, first + tokens, device=device))
        self._view = lambda rows: Sections(rows, layout, k, scale_bytes)
        self._ranks = torch.arange(world_size, device=device)
        if self.slotted:
            rows = world_size * (tokens + 1)
            self._sent = torch.zeros(rows + 1, words, dtype=torch.int64, device=device)
            self._received = torch.zeros(rows, words, dtype=torch.int64, device=device)
            self._nothing = rows
            self._in_sections = self._view(self._received)
            self._row = torch.arange(rows, device=device)
            self._head = self._sent[:-1].view(world_size, tokens + 1, words)[:, 0]
            self._in_head = self._received.view(world_size, tokens + 1, words)[:, 0]
            self._base = torch.arange(world_size + 1, device=device) * (tokens + 1)
            number = torch.arange(tokens + 1, device=device)
            number[0] = tokens + 2  # a header row is never valid
            self._number = number
            self._origin = self._ranks.repeat_interleave(tokens + 1)
        self._given: tuple[bool, bool] | None = None

    def exchange(
        self, packed: torch.Tensor, mask: torch.Tensor, given: tuple[bool, bool], transport: Transport
    ) -> tuple[Arrival, Plan]:
        """Send row t of ``packed [n, words]`` to every rank r with ``mask[t, r]``. Collective."""
        if self.slotted:
            return self._by_slots(packed, mask, given, transport)
        return self._ragged(packed, mask, given, transport)

    def _by_slots(
        self, packed: torch.Tensor, mask: torch.Tensor, given: tuple[bool, bool], transport: Transport
    ) -> tuple[Arrival, Plan]:
        world, n = self._world, packed.size(0)
        if self._given != given:
            self._head[:, 1].fill_(int(given[0]))
            self._head[:, 2].fill_(int(given[1]))
            self._given = given
        place = mask.cumsum(0)
        target = torch.where(mask, place + self._base, self._nothing)
        if n:
            self._head[:, 0].copy_(place[-1, :world])
            rows = packed.expand(world, n, packed.size(1)).reshape(world * n, -1)
            self._sent.index_copy_(0, target[:, :world].t().reshape(-1), rows)
        else:
            self._head[:, 0].zero_()
        transport.slots(self._received, self._sent[:-1])
        counts = self._in_head[:, :1]
        valid = (self._number <= counts).view(-1)
        given_rows = self._in_head[:, None, 1:3].expand(world, self._tokens + 1, 2).reshape(-1, 2)
        arrival = Arrival(self._received, self._origin, valid, counts.sum(), given_rows, self._in_sections, self._row)
        return arrival, Plan(target, self._nothing)

    def _ragged(
        self, packed: torch.Tensor, mask: torch.Tensor, given: tuple[bool, bool], transport: Transport
    ) -> tuple[Arrival, Plan]:
        world = self._world
        by_rank = mask[:, :world].t()
        counts = torch.tensor([[0, int(given[0]), int(given[1])]], device=mask.device).repeat(world, 1)
        counts[:, 0] = by_rank.sum(1)
        heads = torch.empty_like(counts)
        transport.slots(heads, counts)
        leaving: list[int] = counts[:, 0].tolist()
        arriving: list[int] = heads[:, 0].tolist()
        rows = packed.new_empty(sum(arriving), packed.size(1))
        transport.ragged(rows, packed.index_select(0, by_rank.nonzero()[:, 1]), arriving, leaving)
        flat = by_rank.reshape(-1)
        nothing = sum(leaving)
        place = torch.where(flat, flat.cumsum(0) - 1, nothing).view(world, -1).t()
        target = torch.cat([place, place.new_full((place.size(0), 1), nothing)], 1)
        origin = self._ranks.repeat_interleave(heads[:, 0], output_size=len(rows))
        number = torch.arange(len(rows), device=rows.device)
        arrival = Arrival(rows, origin, None, heads[:, 0].sum(), heads[origin, 1:], self._view(rows), number)
        return arrival, Plan(target, nothing, leaving, arriving)


class AnswerWire:
    """Exchange of the expert rows (and their weights) back to the sources, along the way of a :class:`Plan`.

    A row is ``[payload | weights]``. A writer without weights uses a narrower slot where the real library pushes
    rows; here its payload starts after the room of the weights, so that ranks which disagree misread each other.
    """

    def __init__(self, payload: int, world_size: int, tokens: int, k: int, device: torch.device) -> None:
        self.payload, self.room = padded(payload), padded(4 * k)
        self.size = self.payload + self.room
        self._rows = world_size * (tokens + 1)
        self._device = device
        self._slots: tuple[torch.Tensor, torch.Tensor] | None = None

    def memory(self, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (sent ``[Q, words]``, received ``[Q' + 1, words]`` whose row ``plan.nothing`` is zero)."""
        words = self.size // 8
        if plan.arriving is not None:
            sent = torch.empty(sum(plan.arriving), words, dtype=torch.int64, device=self._device)
            received = torch.empty(plan.nothing + 1, words, dtype=torch.int64, device=self._device)
            received[-1].zero_()
            return sent, received
        if self._slots is None:
            sent = torch.full((self._rows, words), -1, dtype=torch.int64, device=self._device)
            received = torch.full((self._rows + 1, words), -1, dtype=torch.int64, device=self._device)
            received[-1].zero_()
            self._slots = sent, received
        return self._slots

    def exchange(self, received: torch.Tensor, sent: torch.Tensor, plan: Plan, transport: Transport) -> None:
        """Fill ``received[:-1]``. Collective."""
        if plan.leaving is None or plan.arriving is None:
            transport.slots(received[:-1], sent)
        else:
            transport.ragged(received[:-1], sent, plan.leaving, plan.arriving)
