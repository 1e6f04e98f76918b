"""One dispatch of the double, split into small methods that a seeded fault can override. Combine: :mod:`.combining`.

Scope: what arrives where. It proves nothing about kernels, races or overlap.

Hooks, in the order in which they run (override in a subclass of the operator):
    ``_owners(ids)``: rank of every slot, W for a dropped one.
    ``_destinations(ids, owners)``: ``[n, W + 1]`` bool, token goes to rank; the last column is False.
    ``_pack_rows(wire, call, ids)``: bytes to send, ``[n, words]`` int64.
    ``_place(arrival)``: output row of every arrived row, ``[Q]`` int64, R for none.
    ``_deliver_rows(arrival, slots)``: writes received rows into the outputs.
    ``_total(total)``: updates the counter of received rows.
    ``_lookup(ids, owners, plan)``: ``[n, k]`` int64, answer row of every slot, ``plan.nothing`` for none.
    ``_contributions(rows, weights, shifted)``: sends the expert rows back; returns answers ``[Q' + 1, words]``.
    ``_fold(terms, indices, dtype)``: sum of ``[k, n, c]`` float32 terms.
    ``_finish()``: state after a combine.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from accelerated.standin.mori_ep.buffers import Buffers, as_words, raw, row_layout
from accelerated.standin.mori_ep.combining import Combining
from accelerated.standin.mori_ep.fatal import die, die_if
from accelerated.standin.mori_ep.state import CombineCall, DispatchCall, Round
from accelerated.standin.mori_ep.wire import Arrival, DispatchWire, Plan

__all__ = ["CombineCall", "DispatchCall", "Engine", "Round"]


class Engine(Combining):
    """State and steps of one operator on one rank."""

    def _run_dispatch(self, call: DispatchCall) -> None:
        call = self._within_capacity(call)
        n, hidden = call.rows.shape
        if self._weights_required and call.weights is None:
            die(f"{self._rules.name} reads the weights unconditionally: memory fault at address 0")
        if self._scales_overrun and call.scales is not None:
            die(f"{self._scale_bytes} bytes of scales a row overrun the peer's staging; the real library corrupts them")
        self._warps, self._combines = call.warps, 0
        self._counter = self._buffers.total if call.handle is None else call.handle.total_recv_token_num
        wire = self._wire(hidden * call.rows.element_size())
        ids = raw(call.indices, torch.int32, n, self._k)
        if call.replay:
            self._replay(call, wire, ids)
            return
        self._routing.refuse_sent(ids)
        owners = self._owners(ids)
        mask = self._destinations(ids, owners)
        mask = self._routing.keep_nodes(mask, call.rdma_blocks, call.blocks, self._narrow_waves)
        packed = self._pack_rows(wire, call, ids)
        given = (call.weights is not None, call.scales is not None)
        arrival, plan = wire.exchange(packed, mask, given, self._transport)
        slots = self._place(arrival)
        if call.handle is not None:
            self._claim_twice(arrival, slots)
        self._deliver_rows(arrival, slots)
        self._total(arrival.total)
        lookup = self._lookup(ids, owners, plan).t().reshape(-1)
        done = Round(n, owners, lookup, slots, plan)
        if call.handle is None:
            self._round = done
        else:
            self._fill(call, done, ids)

    def _within_capacity(self, call: DispatchCall) -> DispatchCall:
        """Keep the first M tokens; what the others overwrite is decided in combine."""
        n, columns = call.rows.shape
        self._excess = None
        if n <= self._tokens:
            return call
        self._excess = raw(call.rows, call.rows.dtype, n, columns)[self._tokens :].clone()
        kept = slice(0, self._tokens)
        weights, scales = call.weights, call.scales
        return replace(
            call,
            rows=call.rows[kept],
            weights=None if weights is None else weights[kept],
            scales=None if scales is None else scales[kept],
            indices=call.indices[kept],
        )

    @property
    def _weights_required(self) -> bool:
        return self._rules.weights_required and self._on("weights-required")

    def _wire(self, payload: int) -> DispatchWire:
        if payload > self._buffers.row_bytes:
            die(f"rows of {payload} bytes exceed hidden_dim * max_token_type_size = {self._buffers.row_bytes} bytes")
        if payload not in self._wires:
            layout = row_layout(payload, self._k, self._scale_bytes)
            self._wires[payload] = DispatchWire(
                layout,
                world_size=self._routing.nowhere,
                tokens=self._tokens,
                k=self._k,
                scale_bytes=self._scale_bytes,
                rank=self._rank,
                device=self._device,
            )
        return self._wires[payload]

    def _owners(self, ids: torch.Tensor) -> torch.Tensor:
        return self._routing.owners(ids)

    def _destinations(self, ids: torch.Tensor, owners: torch.Tensor) -> torch.Tensor:
        del ids
        return self._routing.destinations(owners)

    def _pack_rows(self, wire: DispatchWire, call: DispatchCall, ids: torch.Tensor) -> torch.Tensor:
        n, sections = ids.size(0), wire.sections
        dtype = torch.uint8 if call.rows.dtype.itemsize == 1 else call.rows.dtype  # float8 and float4 move as bytes
        rows = raw(call.rows, dtype, n, call.rows.size(1))
        sections.payload[:n].copy_(as_words(rows))
        sections.ids[:n].copy_(ids)
        if call.weights is not None:
            sections.weights[:n].copy_(raw(call.weights, torch.float32, n, self._k).view(torch.int32))
        if call.scales is not None and self._scale_bytes:
            sections.scales[:n].copy_(raw(call.scales, torch.uint8, n, self._scale_bytes))
        return wire.pack[:n]

    def _place(self, arrival: Arrival) -> torch.Tensor:
        key = torch.rand(arrival.number.size(0), generator=self._random, device=self._device)
        if self._rules.asynchronous:
            key = key + arrival.origin
        if arrival.valid is not None:
            key = torch.where(arrival.valid, key, math.inf)
        limit = arrival.total.clamp(max=self._buffers.capacity)
        slots = torch.where(arrival.number < limit, arrival.number, self._buffers.capacity)
        return torch.empty_like(slots).scatter_(0, key.argsort(), slots)

    def _deliver_rows(self, arrival: Arrival, slots: torch.Tensor) -> None:
        buffers, rows = self._buffers, arrival.sections
        self._routing.refuse_received(rows.ids, arrival.valid)
        out = Buffers.view(buffers.out, buffers.capacity + 1, rows.payload.size(1), rows.payload.dtype)
        if buffers.capacity < self._routing.nowhere * self._tokens:
            slots = self._capped(arrival, slots)
        # IntraNodeLL gives warp 0 the routing, warp 1 the scales and later warps the payload.
        lean = self._rules.scanned_slots is not None and self._warps <= 2 and self._on("low-latency-needs-three-warps")
        if not lean:
            out.index_copy_(0, slots, rows.payload)
        buffers.ids.index_copy_(0, slots, rows.ids)
        buffers.source.index_copy_(0, slots, rows.source)
        # A source without weights leaves the old ones in place.
        weight_slots = torch.where(arrival.given[:, 0] > 0, slots, buffers.capacity)
        buffers.weights.view(torch.int32).index_copy_(0, weight_slots, rows.weights)
        if self._scale_bytes and not (lean and self._warps <= 1):
            scales = Buffers.view(buffers.scales, buffers.capacity + 1, self._scale_bytes, torch.uint8)
            moved = self._moved_scale_bytes
            given = torch.where(arrival.given[:, 1] > 0, slots, buffers.capacity)
            scales[:, :moved].index_copy_(0, given, rows.scales[:, :moved])

    def _capped(self, arrival: Arrival, slots: torch.Tensor) -> torch.Tensor:
        """Act on more rows than a capped R holds; returns the slots that are left."""
        name, buffers = self._rules.name, self._buffers
        if name == "InterNode" and self._on("internode-cap-aliases"):
            share = buffers.capacity // self._routing.nowhere
            valid = torch.ones_like(slots, dtype=torch.bool) if arrival.valid is None else arrival.valid
            same = torch.nn.functional.one_hot(arrival.origin, self._routing.nowhere) * valid.unsqueeze(1)
            past = (same.cumsum(0) * same).sum(1) > share
            return torch.where(past, buffers.capacity, slots)
        if name == "IntraNode" and self._on("intranode-receive-overflow"):
            self._overflow(arrival, slots)
        else:
            message = "device assertion: more rows than max_total_recv_tokens leaves room for"
            die_if(arrival.total > buffers.capacity, message)
        return slots

    def _overflow(self, arrival: Arrival, slots: torch.Tensor) -> None:
        """Rows past R land in what follows: the outputs of combine."""
        buffers, rows = self._buffers, arrival.sections
        past = slots == buffers.capacity
        if arrival.valid is not None:
            past = past & arrival.valid
        lost = rows.payload[past].contiguous().view(torch.uint8).flatten()[: buffers.combined.numel()]
        buffers.combined[: lost.numel()].copy_(lost)
        weights = rows.weights[past][: buffers.combined_weights.size(0)].view(torch.float32)
        buffers.combined_weights[: len(weights)].copy_(weights)

    def _total(self, total: torch.Tensor) -> None:
        if self._rules.asynchronous or not self._on("dispatch-accumulates"):
            self._counter.copy_(total)
        else:
            self._counter.add_(total)

    def _lookup(self, ids: torch.Tensor, owners: torch.Tensor, plan: Plan) -> torch.Tensor:
        lookup = plan.target.gather(1, owners)
        lookup.masked_fill_(self._routing.stands_elsewhere(owners), plan.nothing)
        if self._rules.node_levels and not self._node_levels and self._on("ids-past-experts"):
            # The slot of an id past the experts is never written in V1's map: the stale entry names rank 0's first row.
            first = min(int(plan.leaving is None), plan.nothing)
            lookup.masked_fill_(self._routing.out_of_range(ids), first)
        return lookup

    # ---- routing handles ------------------------------------------------------------------------------------------

    def _fill(self, call: DispatchCall, done: Round, ids: torch.Tensor) -> None:
        """Ask every destination for the slot it chose, and record the layout in the handle."""
        assert call.handle is not None
        wire = self._answer_wire(8)
        sent, received = wire.memory(done.plan)
        sent[:, 0] = done.slots
        wire.exchange(received, sent, done.plan, self._transport)
        stride = self._routing.nowhere * self._tokens
        lookup = done.lookup.view(self._k, done.n).t()
        slot = received[:, 0][lookup]
        null = self._routing.nowhere * stride
        self._handles.fill(call.handle, torch.where(lookup == done.plan.nothing, null, done.owners * stride + slot))
        source = self._buffers.source[: call.handle.disp_tok_id_to_src_tok_id_local.numel()]
        call.handle.disp_tok_id_to_src_tok_id_local[: source.numel()].copy_(source)
        self._handle_dispatches += 1

    def _replay(self, call: DispatchCall, wire: DispatchWire, ids: torch.Tensor) -> None:
        """Move a new payload along the layout of a handle; the counter and the maps stay as they are."""
        assert call.handle is not None
        if self._rules.name == "IntraNode" and self._on("intranode-replay-moves-nothing"):
            self._transport.meet()
            return
        destination = self._handles.destinations(call.handle, self._routing.listed_nodes(ids))
        layout = self._handles.layout(call.handle, destination, wire.slotted)
        packed = self._pack_rows(wire, call, ids)
        given = (call.weights is not None, call.scales is not None)
        arrival, _ = wire.exchange(packed, layout.mask, given, self._transport)
        self._deliver_rows(arrival, layout.slots)

    def _claim_twice(self, arrival: Arrival, slots: torch.Tensor) -> None:
        """Two handle dispatches without a barrier between them: a slot is claimed twice."""
        if self._rules.name != "IntraNode" or not self._handle_dispatches or not self._on("handle-dispatches-race"):
            return
        valid = (slots < self._buffers.capacity).nonzero().flatten()
        if len(valid) > 1:
            slots[valid[-1]] = slots[valid[0]]
