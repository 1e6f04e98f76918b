"""One combine of the double, split into small methods that a seeded fault can override (listed in :mod:`.engine`).

Scope: which rows are summed, in which arithmetic, and what the defects of combine leave behind. It proves nothing
about kernels, races or overlap.
"""

from __future__ import annotations

import torch

from accelerated.standin.mori_ep.buffers import Buffers, as_words, raw
from accelerated.standin.mori_ep.codecs import Codec, to_fp8
from accelerated.standin.mori_ep.damage import fan_out, node_terms, overrun, stale_row, take
from accelerated.standin.mori_ep.fatal import die, hang
from accelerated.standin.mori_ep.handles import chunk_positions
from accelerated.standin.mori_ep.jit_config import is_gfx125x
from accelerated.standin.mori_ep.state import CombineCall, Round, State
from accelerated.standin.mori_ep.wire import SLOT_LIMIT, AnswerWire


class Combining(State):
    """Steps of combine of one operator on one rank."""

    _codec: Codec | None = None  # of the answers under way
    _partial_codec: Codec | None = None  # of the node sums under way

    def _run_combine(self, call: CombineCall) -> None:
        self._maybe_hang()
        done = self._active = self._recall(call)
        self._call, self._codec = call, call.codec
        self._epoch += 1
        buffers, hidden, dtype = self._buffers, call.rows.size(1), call.rows.dtype
        if hidden * dtype.itemsize > buffers.row_bytes:
            die(f"rows of {hidden} x {dtype} exceed hidden_dim * max_token_type_size = {buffers.row_bytes} bytes")
        rows = self._expert_rows(call)
        given = call.weights
        weights = None
        if given is not None and given.size(0) and not self._weights_dropped:
            weights = raw(given, torch.float32, given.size(0), self._k)
        pushes = self._rules.pushes and call.external
        shifted = weights is None and (pushes or self._node_levels) and self._on("weights-disagree")
        answers = self._contributions(rows, weights, shifted)
        self._disturb(call, done, answers)
        gathered = answers.index_select(0, done.lookup)
        payload = self._payload(hidden, dtype)
        wire = self._answer_wire(payload)
        start = wire.room if shifted else 0
        indices = raw(call.indices, torch.int32, call.n, self._k)[: done.n]
        out = Buffers.view(buffers.combined, self._tokens, hidden, dtype)
        if done.n and not call.unwritten:
            block = gathered.view(torch.uint8)[:, start : start + payload].contiguous()
            out[: done.n].copy_(self._sum(block, hidden, indices, dtype))
        if weights is not None and done.n:
            start = wire.payload // 4
            terms = gathered.view(torch.float32)[:, start : start + self._k].reshape(self._k, done.n, self._k)
            self._partial_codec = None
            buffers.combined_weights[: done.n].copy_(self._fold(terms, indices, torch.float32))
        if self._excess is not None and call.handle is None:  # n > M: their staging slots are other tokens'
            lost = self._excess[: self._tokens, :hidden]
            out[: len(lost)].copy_(lost)
        if self._fans_out and call.handle is not None and call.codec is None:
            fan_out(call.handle.inter_node_disp_dest_tok_id_map, call.blocks, self._epoch)
        self._finish()

    @property
    def _fans_out(self) -> bool:
        """Whether the barrier of combine writes into the map of nodes, which is the caller's with a handle only."""
        return self._rules.name == "IntraNode" and is_gfx125x() and self._on("gfx125x-barrier-overrun")

    @property
    def _weights_dropped(self) -> bool:
        return self._rules.asynchronous and self._on("async-weights-unwritten")

    def _maybe_hang(self) -> None:
        name = self._rules.name
        if name == "InterNode" and self._on("internode-combine-hangs"):
            hang("block 0 reset the grid barrier of combine while other warps polled it")
        if name == "IntraNode" and self._combines and self._on("combine-twice-hangs"):
            hang("a second combine passed the barrier flag that this rank waits for")
        self._combines += 1

    # ---- the layout -----------------------------------------------------------------------------------------------

    def _recall(self, call: CombineCall) -> Round:
        """The layout that combine follows: the last dispatch's, or a handle's; for as many tokens as were frozen."""
        if call.handle is None:
            if self._round is None:
                die("combine before any dispatch: the real kernels would wait for ever")
            return self._resized(self._round, min(call.n, self._tokens))
        ids = raw(call.indices, torch.int32, call.n, self._k)
        destination = self._handles.destinations(call.handle, self._routing.listed_nodes(ids))
        wire = self._answer_wire(self._payload(call.rows.size(1), call.rows.dtype, call.codec))
        slotted = (self._tokens + 1) * wire.size <= SLOT_LIMIT
        layout = self._handles.layout(call.handle, destination, slotted)
        lookup = layout.plan.target.gather(1, layout.owners).t().reshape(-1)
        return Round(call.n, layout.owners, lookup, layout.slots, layout.plan)

    def _resized(self, done: Round, n: int) -> Round:
        if n == done.n:
            return done
        both = min(n, done.n)
        lookup = done.lookup.new_full((self._k, n), done.plan.nothing)
        lookup[:, :both] = done.lookup.view(self._k, done.n)[:, :both]
        owners = done.owners.new_full((n, self._k), self._routing.nowhere)
        owners[:both] = done.owners[:both]
        return Round(n, owners, lookup.reshape(-1), done.slots, done.plan)

    # ---- the rows -------------------------------------------------------------------------------------------------

    def _expert_rows(self, call: CombineCall) -> torch.Tensor:
        buffers, hidden, dtype = self._buffers, call.rows.size(1), call.rows.dtype
        registered = call.rows.untyped_storage().data_ptr() == buffers.registered.untyped_storage().data_ptr()
        zero_copy = self._rules.registered_input and not call.external
        if zero_copy and (registered or self._on("zero-copy-ignores-input")):
            return Buffers.view(buffers.registered, buffers.capacity, hidden, dtype)
        rows = raw(call.rows, dtype, call.rows.size(0), hidden)
        if registered and not zero_copy and self._rules.pushes and self._on("push-from-registered"):
            rows = rows.clone()  # peers stage their rows in the memory that this rank still reads
            rows[1::2] = rows[: rows.size(0) // 2 * 2 : 2]
        return rows

    def _payload(self, hidden: int, dtype: torch.dtype, codec: Codec | None = None) -> int:
        codec = codec or self._codec
        if codec is None:
            return hidden * dtype.itemsize
        count = codec.code_bytes(hidden)
        return -(-count // 4) * 4 + 4 * codec.scale_dim if codec.blockwise else count

    def _answer_wire(self, payload: int) -> AnswerWire:
        if payload not in self._answer_wires:
            world = self._routing.nowhere
            self._answer_wires[payload] = AnswerWire(payload, world, self._tokens, self._k, self._device)
        return self._answer_wires[payload]

    def _contributions(self, rows: torch.Tensor, weights: torch.Tensor | None, shifted: bool) -> torch.Tensor:
        done = self._current()
        wire = self._answer_wire(self._payload(rows.size(1), rows.dtype))
        sent, received = wire.memory(done.plan)
        if rows.size(0):
            chosen = rows.index_select(0, done.slots.clamp(max=rows.size(0) - 1))
            words = as_words(chosen if self._codec is None else self._codec.encode(chosen))
            start = (wire.room if shifted else 0) // words.element_size()
            sent.view(words.dtype)[:, start : start + words.size(1)].copy_(words)
        if weights is not None:
            start = wire.payload // 4
            sent.view(torch.float32)[:, start : start + self._k].copy_(take(weights, done.slots))
        wire.exchange(received, sent, done.plan, self._transport)
        return received

    def _disturb(self, call: CombineCall, done: Round, answers: torch.Tensor) -> None:
        """What a missing fence and staging that is too small do to the answers and to the memory beside them."""
        pushes = self._rules.pushes and call.external
        if pushes and call.blocks > 1 and self._on("push-fence"):
            before, self._answers_before = self._answers_before, answers.clone()
            stale_row(answers, before, done, self._rank)
        capped = pushes and self._on("capped-push-overruns-staging")
        blockwise = call.codec is not None and call.codec.name == "fp8_blockwise"
        small = blockwise and self._rules.name in ("IntraNodeLL", "AsyncLL") and self._on("blockwise-staging-overrun")
        if capped or small:
            config, hidden = self._routing.config, call.rows.size(1)
            weighted = call.weights is not None and call.weights.size(0) > 0 and not self._rules.asynchronous
            overrun(self._buffers, answers, done, config, self._rules.name, call.codec, hidden, call.rows, weighted)

    # ---- the sum --------------------------------------------------------------------------------------------------

    def _sum(self, block: torch.Tensor, hidden: int, indices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Sum the answers ``block [k * n, bytes]`` of every token: ``[n, hidden]`` float32."""
        shape = (self._k, self._current().n, hidden)
        codec = self._codec
        self._partial_codec = codec if self._rules.node_levels else None
        if codec is None:
            return self._fold(block.view(dtype).float().view(shape), indices, dtype)
        values, scales = codec.decode(block, hidden, self._call.width if self._call is not None else None)
        if scales is None:
            return self._fold(values.view(shape), indices, dtype)
        return self._fold_scaled(values.view(shape), scales.view(shape))

    def _fold_scaled(self, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Add ``[k, n, c]`` float32 codes times their scales, slot after slot."""
        assert self._codec is not None
        assert self._call is not None
        return self._codec.fold(values, scales, self._call.fused)

    def _fold(self, terms: torch.Tensor, indices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if not self._node_levels and self._partial_codec is None:
            return _in_slot_order(terms)
        done, routing = self._current(), self._routing
        node = (done.owners // routing.config.gpu_per_node).t()
        listed = routing.listed_nodes(indices)
        partials = []
        for i in range(routing.nodes):
            here = node == i
            partial = self._rounded(_in_slot_order(terms.masked_fill(~here.unsqueeze(2), 0.0)), dtype)
            partials.append(partial if i == routing.node else partial[self._held(i, here.any(0))])
        if self._on("more-nodes-than-slots") and routing.nodes > self._k:
            partials = node_terms(partials, self._k)
        result = torch.zeros_like(terms[0])
        for i, partial in enumerate(partials):
            result += partial.masked_fill(~listed[:, i : i + 1], 0.0)
        return result

    def _rounded(self, partial: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A node's sum as it travels."""
        if self._partial_codec is not None:
            return to_fp8(partial, self._partial_codec.flavour).float()
        return partial.to(dtype).float()

    def _held(self, node: int, sent: torch.Tensor) -> torch.Tensor:
        """Which node sum each token finds at another node: its own, or that of a place it never claimed."""
        done, call = self._current(), self._call
        tokens = torch.arange(done.n, device=self._device)
        fresh = call is not None and call.handle is not None
        held = torch.zeros_like(tokens) if fresh else self._sent_map[node, : done.n]
        held.copy_(torch.where(sent, tokens, held.clamp(max=max(done.n - 1, 0))))
        if self._on("ragged-chunks") and self._tokens > 64 and self._tokens % 64:
            # The last chunk, a partial one, claims the first place: full ones are pushed past the node's M rows.
            position = chunk_positions(sent, reverse=True)
            held = torch.where(sent & (position >= self._tokens), (position - self._tokens).clamp(max=done.n - 1), held)
        return held

    def _finish(self) -> None:
        self._handle_dispatches = 0
        handled = self._call is not None and self._call.handle is not None
        if not self._rules.asynchronous and not handled and self._on("combine-clears-total"):
            self._buffers.total.zero_()

    def _current(self) -> Round:
        done = self._active or self._round
        if done is None:
            die("combine before any dispatch: the real kernels would wait for ever")
        return done


def _in_slot_order(terms: torch.Tensor) -> torch.Tensor:
    """Add ``[k, n, c]`` float32 terms one slot after the other, starting from +0."""
    total = terms[0] + 0.0
    for term in terms[1:]:
        total += term
    return total
