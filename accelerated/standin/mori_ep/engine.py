"""One dispatch and one combine of the double, split into small methods that a seeded fault can override.

Scope: what arrives where, and the arithmetic of the sums. It proves nothing about kernels, races or overlap.

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
from dataclasses import dataclass

import torch
import torch.distributed as dist

from accelerated.standin.mori_ep.buffers import Buffers, as_words, raw, row_layout
from accelerated.standin.mori_ep.config import EpDispatchCombineConfig
from accelerated.standin.mori_ep.fatal import die, die_if
from accelerated.standin.mori_ep.jit_config import is_gfx125x
from accelerated.standin.mori_ep.routing import Routing, Rules
from accelerated.standin.mori_ep.transport import Transport
from accelerated.standin.mori_ep.wire import AnswerWire, Arrival, DispatchWire, Plan


@dataclass
class Round:
    """What combine needs of the dispatch before it."""

    n: int
    owners: torch.Tensor  # [n, k]
    lookup: torch.Tensor  # [k * n], slot-major
    slots: torch.Tensor  # [Q]
    plan: Plan


@dataclass
class DispatchCall:
    """Arguments of one dispatch, kept alive until they are read."""

    rows: torch.Tensor
    weights: torch.Tensor | None
    scales: torch.Tensor | None
    indices: torch.Tensor
    blocks: int
    rdma_blocks: int
    warps: int


@dataclass
class CombineCall:
    """Arguments of one combine, kept alive until they are read."""

    rows: torch.Tensor
    weights: torch.Tensor | None
    indices: torch.Tensor
    external: bool


class Engine:
    """State and steps of one operator on one rank."""

    _serial = 0

    def _start(
        self,
        config: EpDispatchCombineConfig,
        rules: Rules,
        group: dist.ProcessGroup | None,
        device: torch.device,
    ) -> None:
        self._rules = rules
        self._device = device
        self._transport = Transport(group, config.world_size)
        self._routing = Routing(config, rules, device)
        self._buffers = Buffers(config, device)
        self._tokens = config.max_num_inp_token_per_rank
        self._k = config.num_experts_per_token
        self._scale_bytes = config.scale_dim * config.scale_type_size
        narrow = is_gfx125x() and rules.name == "IntraNode"  # moves scales by vectors and leaves the rest of a row
        self._moved_scale_bytes = self._scale_bytes // 16 * 16 if narrow else self._scale_bytes
        staged = 8 * 32768 // config.world_size * 128
        self._scales_overrun = narrow and self._buffers.capacity * self._scale_bytes > staged
        self._rank = config.rank
        self._node_levels = rules.node_levels and self._routing.nodes > 1
        self._wires: dict[int, DispatchWire] = {}
        self._answer_wires: dict[int, AnswerWire] = {}
        self._round: Round | None = None
        self._warps = 0
        # The order of received rows is arbitrary upstream: a fresh one for every call, the same in every run.
        Engine._serial += 1
        self._random = torch.Generator(device).manual_seed(Engine._serial * 4096 + config.rank)
        stale = (self._routing.nodes, self._tokens)
        self._sent_map = torch.zeros(stale, dtype=torch.int64, device=device)  # V1: slot of (node, token), kept stale

    # ---- dispatch -------------------------------------------------------------------------------------------------

    def _run_dispatch(self, call: DispatchCall) -> None:
        n, hidden = call.rows.shape
        if n > self._tokens:
            die(f"{n} tokens exceed max_num_inp_token_per_rank={self._tokens}; the real library corrupts memory")
        if self._rules.weights_required and call.weights is None:
            die(f"{self._rules.name} reads the weights unconditionally: memory fault at address 0")
        if self._scales_overrun and call.scales is not None:
            die(f"{self._scale_bytes} bytes of scales a row overrun the peer's staging; the real library corrupts them")
        self._warps = call.warps
        ids = raw(call.indices, torch.int32, n, self._k)
        self._routing.refuse_sent(ids)
        owners = self._owners(ids)
        mask = self._destinations(ids, owners)
        mask = self._routing.keep_nodes(mask, call.rdma_blocks, call.blocks)
        wire = self._wire(hidden * call.rows.element_size())
        packed = self._pack_rows(wire, call, ids)
        given = (call.weights is not None, call.scales is not None)
        arrival, plan = wire.exchange(packed, mask, given, self._transport)
        slots = self._place(arrival)
        self._deliver_rows(arrival, slots)
        self._total(arrival.total)
        lookup = self._lookup(ids, owners, plan).t().reshape(-1)
        self._round = Round(n, owners, lookup, slots, plan)

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
        if buffers.capacity < self._routing.nowhere * self._tokens and self._rules.name not in (
            "IntraNode",
            "InterNode",
        ):
            die_if(
                arrival.total > buffers.capacity,
                "device assertion: more rows than max_total_recv_tokens leaves room for",
            )
        self._routing.refuse_received(rows.ids, arrival.valid)
        out = Buffers.view(buffers.out, buffers.capacity + 1, rows.payload.size(1), rows.payload.dtype)
        # IntraNodeLL gives warp 0 the routing, warp 1 the scales and later warps the payload.
        lean = self._rules.scanned_slots is not None and self._warps <= 2
        if not lean:
            out.index_copy_(0, slots, rows.payload)
        buffers.ids.index_copy_(0, slots, rows.ids)
        buffers.source.index_copy_(0, slots, rows.source)
        weight_slots = slots
        if not self._rules.weights_required:  # a source without weights leaves the old ones in place
            weight_slots = torch.where(arrival.given[:, 0] > 0, slots, buffers.capacity)
        buffers.weights.view(torch.int32).index_copy_(0, weight_slots, rows.weights)
        if self._scale_bytes and not (lean and self._warps <= 1):
            scales = Buffers.view(buffers.scales, buffers.capacity + 1, self._scale_bytes, torch.uint8)
            moved = self._moved_scale_bytes
            given = torch.where(arrival.given[:, 1] > 0, slots, buffers.capacity)
            scales[:, :moved].index_copy_(0, given, rows.scales[:, :moved])

    def _total(self, total: torch.Tensor) -> None:
        if self._rules.asynchronous:
            self._buffers.total.copy_(total)
        else:
            self._buffers.total.add_(total)

    def _lookup(self, ids: torch.Tensor, owners: torch.Tensor, plan: Plan) -> torch.Tensor:
        lookup = plan.target.gather(1, owners)
        lookup.masked_fill_(self._routing.stands_elsewhere(owners), plan.nothing)
        if self._rules.node_levels and not self._node_levels:
            # The slot of an id past the experts is never written in V1's map: the stale entry names rank 0's first row.
            first = min(int(plan.leaving is None), plan.nothing)
            lookup.masked_fill_(self._routing.out_of_range(ids), first)
        return lookup

    # ---- combine --------------------------------------------------------------------------------------------------

    def _run_combine(self, call: CombineCall) -> None:
        done = self._round
        if done is None:
            die("combine before any dispatch: the real kernels would wait for ever")
        buffers, hidden, dtype = self._buffers, call.rows.size(1), call.rows.dtype
        if hidden * dtype.itemsize > buffers.row_bytes:
            die(f"rows of {hidden} x {dtype} exceed hidden_dim * max_token_type_size = {buffers.row_bytes} bytes")
        if self._rules.registered_input and not call.external:
            rows = Buffers.view(buffers.registered, buffers.capacity, hidden, dtype)
        else:
            rows = raw(call.rows, dtype, call.rows.size(0), hidden)
        given = call.weights
        weights = None
        if given is not None and given.size(0) and not self._rules.asynchronous:
            weights = raw(given, torch.float32, given.size(0), self._k)
        shifted = weights is None and ((self._rules.pushes and call.external) or self._node_levels)
        answers = self._contributions(rows, weights, shifted)
        gathered = answers.index_select(0, done.lookup)
        wire = self._answer_wire(hidden * dtype.itemsize)
        start = (wire.room if shifted else 0) // dtype.itemsize
        terms = gathered.view(dtype)[:, start : start + hidden].float().view(self._k, done.n, hidden)
        indices = raw(call.indices, torch.int32, done.n, self._k)
        out = Buffers.view(buffers.combined, self._tokens, hidden, dtype)
        if done.n:
            out[: done.n].copy_(self._fold(terms, indices, dtype))
        if weights is not None and done.n:
            start = wire.payload // 4
            terms = gathered.view(torch.float32)[:, start : start + self._k].reshape(self._k, done.n, self._k)
            buffers.combined_weights[: done.n].copy_(self._fold(terms, indices, torch.float32))
        self._finish()

    def _answer_wire(self, payload: int) -> AnswerWire:
        if payload not in self._answer_wires:
            world = self._routing.nowhere
            self._answer_wires[payload] = AnswerWire(payload, world, self._tokens, self._k, self._device)
        return self._answer_wires[payload]

    def _contributions(self, rows: torch.Tensor, weights: torch.Tensor | None, shifted: bool) -> torch.Tensor:
        done = self._current()
        wire = self._answer_wire(rows.size(1) * rows.element_size())
        sent, received = wire.memory(done.plan)
        if rows.size(0):
            words = as_words(rows)
            start = (wire.room if shifted else 0) // words.element_size()
            chosen = words.index_select(0, done.slots.clamp(max=rows.size(0) - 1))
            sent.view(words.dtype)[:, start : start + words.size(1)].copy_(chosen)
        if weights is not None:
            chosen = weights.index_select(0, done.slots.clamp(max=weights.size(0) - 1))
            start = wire.payload // 4
            sent.view(torch.float32)[:, start : start + self._k].copy_(chosen)
        wire.exchange(received, sent, done.plan, self._transport)
        return received

    def _fold(self, terms: torch.Tensor, indices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if not self._node_levels:
            return _in_slot_order(terms)
        done = self._current()
        node = (done.owners // self._routing.config.gpu_per_node).t()
        listed = self._routing.listed_nodes(indices)
        tokens = torch.arange(done.n, device=self._device)
        result = torch.zeros_like(terms[0])
        for i in range(self._routing.nodes):
            here = node == i
            partial = _in_slot_order(terms.masked_fill(~here.unsqueeze(2), 0.0)).to(dtype).float()
            if i != self._routing.node:
                held = self._sent_map[i, : done.n]
                held.copy_(torch.where(here.any(0), tokens, held.clamp(max=max(done.n - 1, 0))))
                partial = partial[held]
            result += partial.masked_fill(~listed[:, i : i + 1], 0.0)
        return result

    def _finish(self) -> None:
        if not self._rules.asynchronous:
            self._buffers.total.zero_()

    def _current(self) -> Round:
        if self._round is None:
            die("combine before any dispatch: the real kernels would wait for ever")
        return self._round


def _in_slot_order(terms: torch.Tensor) -> torch.Tensor:
    """Add ``[k, n, c]`` float32 terms one slot after the other, starting from +0."""
    total = terms[0] + 0.0
    for term in terms[1:]:
        total += term
    return total
