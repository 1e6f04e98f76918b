"""The program of the experts alone: one process plays every expert-parallel rank in turn.

Every round goes through each shard's operator with that shard's weights and mask. Buffers may be longer than their
valid rows; what lies beyond is poison. Each output is judged by itself; what a relation's further calls must give is in
:mod:`conformance.rank.relations` and :mod:`conformance.rank.parts`. What a pass does not prove: anything about the
exchange of rows between ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from accelerated.experts import ExpertContract, ExpertOperation
from accelerated.interface import RankContext
from accelerated.operators import QuantContract, QuantResult
from conformance.cases import LayerCase, LayerCell, LayerRound, expand
from conformance.engine.protocol import Mismatch
from conformance.rank.byte_views import byte_view
from conformance.rank.expert_weights import weights_of
from conformance.rank.guard import synchronise
from conformance.rank.inputs import Inputs
from conformance.rank.judge_experts import judge_layout, judge_output, judge_same_bits
from conformance.rank.judge_rows import first_rows, judge_quantised, read_quantised
from conformance.rank.layer_inputs import layer_inputs, poisoned
from conformance.rank.oracle_experts import expected_by_oracle
from conformance.rank.parts import one_slot_each, slot_calls, slots_together
from conformance.rank.phases import SetPhase
from conformance.rank.relations import other_order, second_call
from reference import experts
from reference.expert_weights import ExpertWeights
from reference.intervals import Interval
from reference.placement import owned_experts
from reference.scales import expand as expand_scales


@dataclass
class _Call:
    """One call of one shard's operator, and what came back."""

    given: Inputs
    handed: Inputs
    valid: int
    count: torch.Tensor | None
    codes: torch.Tensor | None
    scales: torch.Tensor | None
    output: torch.Tensor
    kept: torch.Tensor
    values: torch.Tensor | None = None  # what the codes stand for


class ExpertProgram:
    """One cell's operators, one per shard, ready to run cases."""

    def __init__(
        self,
        context: RankContext,
        operations: list[ExpertOperation],
        contract: ExpertContract,
        judged_by: str,
        cell: LayerCell,
        whole: Callable[[], tuple[ExpertOperation, ExpertContract]] | None = None,
    ) -> None:
        """``whole`` builds the operator of one rank that holds every expert, the first time; None: there is none."""
        self._context, self._operations, self._contract = context, operations, contract
        self._judged_by, self._cell, self._whole = judged_by, cell, whole
        self._dtype = getattr(torch, cell.dtype)
        names = range(cell.experts + cell.shared)
        self._everything = self._weights(names)
        self._shard_of = torch.zeros(cell.experts, dtype=torch.int64, device=context.device)
        self._local: list[ExpertWeights] = []
        self._slots: list[torch.Tensor] = []
        for shard, operation in enumerate(operations):
            owned = self._owned(shard)
            local = self._everything.pick(owned)
            operation.load(local, owned)
            slots = torch.full((len(names),), -1, dtype=torch.int64, device=context.device)
            slots[owned] = torch.arange(len(owned), device=context.device)
            self._shard_of[owned[: len(owned) - cell.shared]] = shard
            self._local.append(local)
            self._slots.append(slots)

    def run(self, case: LayerCase, phase: SetPhase) -> tuple[Mismatch | None, float]:
        """Run and judge a case; the first failed check and the largest error/bound."""
        worst = 0.0
        for index, a_round in enumerate(case.rounds):
            phase("inputs", index)
            routing = expand(case.cell, a_round.routing)
            inputs = layer_inputs(case, index, 0, routing, self._context.device)
            if a_round.relation == "shards added":
                inputs.weights = one_slot_each(inputs.ids, inputs.weights, self._shard_of)
            calls: list[_Call] = []
            for shard in range(len(self._operations)):
                phase("experts", index)
                calls.append(self._call(shard, a_round, inputs))
            phase("judge", index)
            for shard, call in enumerate(calls):
                mismatch, ratio = self._judge(shard, index, a_round, call)
                worst = max(worst, ratio)
                if mismatch is not None:
                    return mismatch, worst
            if a_round.relation == "shards added":
                mismatch, ratio = self._together(index, inputs, calls)
                worst = max(worst, ratio)
                if mismatch is not None:
                    return mismatch, worst
        return None, worst

    # ------------------------------------------------------------------ inputs
    def _weights(self, names: range) -> ExpertWeights:
        cell = self._cell
        return weights_of(
            names,
            hidden=cell.hidden,
            intermediate=cell.intermediate,
            codec=self._contract.weight_codec,
            dtype=self._dtype,
            biased=self._contract.biased,
            device=self._context.device,
        )

    def _owned(self, shard: int) -> list[int]:
        """Global ids of a shard: its part of the routed experts, and every shared one."""
        routed = owned_experts(self._cell.experts, self._cell.shards, shard, self._cell.placement)
        return [*routed, *range(self._cell.experts, self._cell.experts + self._cell.shared)]

    def _shared_everywhere(self, inputs: Inputs, weight: float) -> Inputs:
        """With shared experts: their columns, as one rank has them."""
        cell, tokens = self._cell, inputs.rows.shape[0]
        names = torch.arange(cell.experts, cell.experts + cell.shared, device=inputs.ids.device).to(inputs.ids.dtype)
        weights = torch.full((tokens, cell.shared), weight, device=inputs.weights.device)
        return Inputs(
            inputs.rows.clone(),
            torch.cat([inputs.ids, names.expand(tokens, -1)], 1),
            torch.cat([inputs.weights, weights], 1),
        )

    def _shards_inputs(self, shard: int, inputs: Inputs, weight: float) -> Inputs:
        """Shared experts' columns are real on the shard that a token's number names and masked elsewhere."""
        given, cell = self._shared_everywhere(inputs, weight), self._cell
        number = torch.arange(len(given.ids), device=given.ids.device).unsqueeze(1)
        given.ids[:, cell.top_k :][(number % cell.shards != shard).expand(-1, cell.shared)] = -1
        return given

    # ------------------------------------------------------------------ the backend
    def _call(self, shard: int, a_round: LayerRound, inputs: Inputs) -> _Call:
        # Where every shard is to have one slot of a token, shared experts have none.
        mine = self._shards_inputs(shard, inputs, 0.0 if a_round.relation == "shards added" else 1.0)
        valid = mine.rows.shape[0]
        counted = self._contract.takes_num_rows and (a_round.tail > 0 or a_round.counted)
        given = poisoned(mine, a_round.tail if counted else 0, self._cell.experts)
        return self._on(shard, given, valid, counted=counted, quantised=a_round.quantised)

    def _on(self, shard: int, given: Inputs, valid: int, *, counted: bool, quantised: bool) -> _Call:
        operation, device = self._operations[shard], self._context.device
        count = torch.full((1,), valid, dtype=torch.int32, device=device) if counted else None
        handed, codes, scales = given.clone(), None, None
        if quantised and self._contract.wire is not None:
            codes, scales = operation.quantise(handed.rows)
        output = operation.experts(
            handed.rows if codes is None else codes, handed.ids, handed.weights, scales=scales, num_rows=count
        )
        synchronise(device)
        return _Call(given, handed, valid, count, codes, scales, output, output.clone())

    # ------------------------------------------------------------------ judging
    def _judge(self, shard: int, index: int, a_round: LayerRound, call: _Call) -> tuple[Mismatch | None, float]:
        where = f"shard {shard} of {self._cell.shards}: " if self._cell.shards > 1 else ""
        shape = (call.given.rows.shape[0], self._cell.hidden)
        mismatch = judge_layout("experts.layout", index, call.output, shape, self._dtype) or self._quantised(
            index, call
        )
        if mismatch is not None:
            return mismatch, 0.0
        accepted = self._accepted(shard, call)
        ids = call.given.ids[: call.valid]
        mismatch, ratio = judge_output(
            "experts.output", index, call.output[: call.valid], accepted, ids, where=where, rank=shard
        )
        mismatch = mismatch or self._side_effects(index, call)
        if mismatch is None and a_round.relation:
            mismatch, again = self._related(shard, index, a_round, call, accepted)
            ratio = max(ratio, again)
        return mismatch, ratio

    def _quantised(self, index: int, call: _Call) -> Mismatch | None:
        """Judge the codes and scales that the operation made of the rows; what they stand for goes on."""
        wire = self._contract.wire
        if call.codes is None or wire is None:
            return None
        if call.scales is None:
            return Mismatch("quantise.layout", index, "codes came back without scales")
        result = QuantResult(call.codes.view(torch.uint8), _plain(call.scales))
        shape = call.given.rows.shape
        read = read_quantised(index, result, wire, *shape)
        if isinstance(read, Mismatch):
            return read
        rows = call.given.rows[: call.valid]
        mismatch, _ = judge_quantised(index, rows, first_rows(read, wire, call.valid), QuantContract(wire), 1.0)
        call.values = (read.values * expand_scales(read.scales, wire, *shape))[: call.valid]
        return mismatch

    def _accepted(self, shard: int, call: _Call) -> Interval:
        """Every legal output of the valid rows."""
        valid, given = call.valid, call.given
        rows = given.rows[:valid].double() if call.values is None else call.values
        numerics = self._contract.numerics(given.rows.shape[0])
        judge = expected_by_oracle if self._judged_by == "oracle" else experts.accepted
        return judge(
            Interval.exact(rows),
            given.ids[:valid],
            given.weights[:valid],
            self._local[shard],
            self._slots[shard],
            numerics,
            self._dtype,
            quantised=call.codes is not None,
        )

    def _side_effects(self, index: int, call: _Call) -> Mismatch | None:
        for name in ("rows", "ids", "weights"):
            handed, given = getattr(call.handed, name), getattr(call.given, name)
            if not torch.equal(byte_view(handed), byte_view(given)):
                return Mismatch("inputs.modified", index, f"the backend changed its input {name}")
        if not torch.equal(byte_view(call.output[: call.valid]), byte_view(call.kept[: call.valid])):
            return Mismatch("outputs.overwritten", index, "a later call changed an output that came back")
        return None

    def _related(
        self, shard: int, index: int, a_round: LayerRound, call: _Call, accepted: Interval
    ) -> tuple[Mismatch | None, float]:
        """The other calls of a relation, against the first."""
        if a_round.relation == "shards added":
            return None, 0.0  # of all shards together
        if a_round.relation == "slots apart":
            return self._apart(shard, index, call)
        return self._second(shard, index, a_round, call, accepted)

    def _second(
        self, shard: int, index: int, a_round: LayerRound, call: _Call, accepted: Interval
    ) -> tuple[Mismatch | None, float]:
        """The second call of a relation, against the first."""
        contract, relation, cell = self._contract, a_round.relation, self._cell
        second = second_call(
            relation, call.given, call.valid, contract, a_round.seed, experts=cell.experts, room=cell.rows
        )
        operation = self._operations[shard]
        given = Inputs(second.rows, second.ids, second.weights)
        if relation == "expert order":
            given = self._reordered(shard, given, a_round.seed)
        again = self._on(shard, given, call.valid, counted=call.count is not None, quantised=call.codes is not None)
        if relation == "expert order":
            operation.load(self._local[shard], self._owned(shard))
        mismatch = self._well_made(index, again)
        if mismatch is not None:
            return mismatch, 0.0
        if contract.numerics(given.rows.shape[0]) != contract.numerics(call.given.rows.shape[0]):
            # The longer buffer takes another path, with roundings of its own.
            accepted = self._accepted(shard, again)
        got = second.back(again.output[: call.valid])
        ids = call.given.ids[: call.valid]
        mismatch, ratio = judge_output("experts.relation", index, got, accepted, ids, where=f"{relation}: ", rank=shard)
        if mismatch is None and second.same_bits:
            first = call.kept[: call.valid]
            if relation == "scaled weights":
                got, first = got + 0.0, first + 0.0  # a zero has the sign of its weights
            mismatch = judge_same_bits("experts.bits", index, got.to(first.dtype), first, relation)
        return mismatch, ratio

    def _apart(self, shard: int, index: int, call: _Call) -> tuple[Mismatch | None, float]:
        """A call for each slot, each judged by itself, and their sum against the whole where bits are promised."""
        worst, outputs = 0.0, []
        ids = call.given.ids[: call.valid]
        for slot, given in enumerate(slot_calls(call.given)):
            again = self._on(shard, given, call.valid, counted=call.count is not None, quantised=call.codes is not None)
            mismatch = self._well_made(index, again)
            if mismatch is not None:
                return mismatch, worst
            got, text = again.output[: call.valid], f"slot {slot} alone: "
            accepted = self._accepted(shard, again)
            mismatch, ratio = judge_output("experts.relation", index, got, accepted, ids, where=text, rank=shard)
            worst = max(worst, ratio)
            if mismatch is not None:
                return mismatch, worst
            outputs.append(got.clone())
        numerics = self._contract.numerics(call.given.rows.shape[0])
        if not self._contract.terms_keep_bits or numerics.inner_parts > 1:
            return None, worst
        whole = slots_together(outputs, call.given.weights[: call.valid], numerics, self._dtype)
        mismatch, ratio = judge_output(
            "experts.parts", index, call.kept[: call.valid], whole, ids, where="its slots added up: ", rank=shard
        )
        return mismatch, max(worst, ratio)

    def _together(self, index: int, inputs: Inputs, calls: list[_Call]) -> tuple[Mismatch | None, float]:
        """The operator of one rank that holds every expert: judged by itself, and against the shards' outputs."""
        if self._whole is None:
            return None, 0.0
        operation, contract = self._whole()
        given = self._shared_everywhere(inputs, 0.0)
        names = list(range(self._cell.experts + self._cell.shared))
        slots = torch.arange(len(names), device=given.ids.device)
        operation.load(self._everything, names)
        output = operation.experts(given.rows.clone(), given.ids.clone(), given.weights.clone())
        synchronise(self._context.device)
        mismatch = judge_layout("experts.layout", index, output, (len(given.rows), self._cell.hidden), self._dtype)
        if mismatch is not None:
            return mismatch, 0.0
        numerics = contract.numerics(len(given.rows))
        judge = expected_by_oracle if self._judged_by == "oracle" else experts.accepted
        rows = Interval.exact(given.rows.double())
        accepted = judge(rows, given.ids, given.weights, self._everything, slots, numerics, self._dtype)
        where = "one rank with every expert: "
        mismatch, worst = judge_output("experts.shards", index, output, accepted, given.ids, where=where)
        same = all(self._contract.numerics(len(call.given.rows)) == numerics for call in calls)
        kept = contract.bits_at_any_shards and contract.terms_keep_bits and numerics.inner_parts == 1 and same
        if mismatch is not None or not kept:
            return mismatch, worst
        added = slots_together([call.kept[: call.valid] for call in calls], given.weights, numerics, self._dtype)
        where = "the shards added up against one rank with every expert: "
        mismatch, ratio = judge_output("experts.shards", index, output, added, given.ids, where=where)
        return mismatch, max(worst, ratio)

    def _well_made(self, index: int, call: _Call) -> Mismatch | None:
        """Layout, codes and side effects of a further call."""
        shape = (call.given.rows.shape[0], self._cell.hidden)
        mismatch = judge_layout("experts.layout", index, call.output, shape, self._dtype)
        return mismatch or self._quantised(index, call) or self._side_effects(index, call)

    def _reordered(self, shard: int, given: Inputs, seed: int) -> Inputs:
        """Load the shard's routed experts in another order and rename the ids accordingly."""
        owned = self._owned(shard)
        routed = len(owned) - self._cell.shared
        order = other_order(routed, seed).tolist()
        picked = [*order, *range(routed, len(owned))]
        self._operations[shard].load(self._local[shard].pick(picked), owned)
        rename = torch.arange(self._cell.experts + self._cell.shared + 1, device=given.ids.device)
        for new, old in enumerate(order):
            rename[owned[old]] = owned[new]
        rename[-1] = -1  # a masked slot stays one
        return Inputs(given.rows, rename[given.ids.long()].to(given.ids.dtype), given.weights)


def _plain(scales: torch.Tensor) -> torch.Tensor:
    """Scales as float32, or E8M0 as bytes."""
    return scales if scales.dtype == torch.float32 else scales.view(torch.uint8)
