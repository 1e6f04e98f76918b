"""The program of a whole layer: quantise, dispatch, experts, combine, on W ranks, drained and free-running.

Inputs and expected results of every round are made first; *free-running* then runs every round without host sync and
without a collective of ours. Only the layer's output is judged: every element of every token, against the acceptance
that the specification derives from both halves' contracts. Rounds whose experts lie otherwise than in ascending order,
and the specification's own, are judged by the dense oracle, which knows of logical experts only; layers with a router
are :mod:`conformance.rank.routed_layer`. What a pass does not prove: that a row took the way it should have, if every
way gives the same output.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from accelerated.contract import Accumulation
from accelerated.experts import LayerContract, LayerOperation
from accelerated.interface import RankContext
from conformance.cases import LayerCase, LayerCell, Rows, expand
from conformance.engine.protocol import Mismatch
from conformance.rank.expert_weights import weights_of
from conformance.rank.guard import backend_code, synchronise
from conformance.rank.inputs import Inputs
from conformance.rank.judge import judge_inputs
from conformance.rank.judge_experts import judge_layout, judge_output
from conformance.rank.layer_inputs import layer_inputs
from conformance.rank.oracle_experts import interval_of
from conformance.rank.phases import SetPhase
from reference import eplb, placement
from reference.eplb_tensors import physical_ids
from reference.expert_gemm import Dense
from reference.expert_oracle import Matrices, decoded, layer_expected
from reference.expert_weights import ExpertWeights
from reference.intervals import Interval
from reference.layer import layer


class LayerProgram:
    """One cell's operator, contract and weights, ready to run cases."""

    def __init__(
        self, context: RankContext, operation: LayerOperation, contract: LayerContract, judged_by: str, cell: LayerCell
    ) -> None:
        self._context, self._operation, self._contract, self._cell = context, operation, contract, cell
        self._oracle = judged_by == "oracle" or bool(cell.redundant) or cell.placement != "linear"
        self._dtype = getattr(torch, cell.dtype)
        self._loaded: tuple[int, ...] = ()
        self._held: dict[tuple[int, ...], Dense] = {}
        self._decoded: dict[int, Matrices] = {}

    def run(self, case: LayerCase, phase: SetPhase) -> tuple[Mismatch | None, float]:
        """Run and judge a case; the first failed check of this rank and the largest error/bound."""
        context, rank = self._context, self._context.rank
        phase("inputs", 0)
        routings = [expand(case.cell, r.routing, rank) for r in case.rounds]
        placed = tables_of(case)
        inputs = [layer_inputs(case, i, rank, r, context.device) for i, r in enumerate(routings)]
        handed = [self._wired(one, p) for one, p in zip(inputs, placed, strict=True)]
        pristine = [one.clone() for one in handed]
        phase("expected", 0)
        expected = self._before(case, inputs, handed, routings, placed)
        seen = [self._round(case, i, one, placed[i], phase) for i, one in enumerate(handed)]
        synchronise(context.device)
        phase("judge", 0)
        return self._judge(seen, handed, pristine, expected, routings)

    def again(self, case: LayerCase, index: int, placed: tuple[int, ...], phase: SetPhase) -> torch.Tensor:
        """Output of round ``index`` once more, with the experts placed otherwise. Collective."""
        routing = expand(case.cell, case.rounds[index].routing, self._context.rank)
        inputs = layer_inputs(case, index, self._context.rank, routing, self._context.device)
        output = self._round(case, index, self._wired(inputs, placed), placed, phase)
        synchronise(self._context.device)
        return output

    # ------------------------------------------------------------------ placement
    def _owned(self) -> tuple[int, ...]:
        """Ids of this rank's experts, as the exchange knows them."""
        cell = self._cell
        strategy = "linear" if cell.translated else cell.placement
        return placement.owned_experts(cell.experts, cell.world_size, self._context.rank, strategy)

    def _wired(self, inputs: Inputs, placed: tuple[int, ...]) -> Inputs:
        """Inputs with ids as they are dispatched."""
        cell = self._cell
        if cell.redundant:
            ids = physical_ids(inputs.ids, eplb.logical_maps(placed, cell.logical)).to(inputs.ids.dtype)
        else:
            position = torch.full((cell.experts + 1,), -1, dtype=inputs.ids.dtype)
            position[torch.tensor(placed)] = torch.arange(cell.experts, dtype=inputs.ids.dtype)
            ids = position.to(inputs.ids.device)[inputs.ids.long()]
        return Inputs(inputs.rows.clone(), ids, inputs.weights.clone())

    def _local(self, placed: tuple[int, ...]) -> Dense:
        """Weights of this rank under a placement."""
        names = tuple(placed[p] for p in self._owned())
        if names not in self._held:
            if len(self._held) > 4:
                self._held.clear()
            self._held[names] = Dense(self._weights(names))
        return self._held[names]

    def _weights(self, names: tuple[int, ...]) -> ExpertWeights:
        cell = self._cell
        return weights_of(
            names,
            hidden=cell.hidden,
            intermediate=cell.intermediate,
            codec=self._contract.experts.weight_codec,
            dtype=self._dtype,
            biased=self._contract.experts.biased,
            device=self._context.device,
        )

    # ------------------------------------------------------------------ expected results
    def _before(
        self,
        case: LayerCase,
        inputs: list[Inputs],
        handed: list[Inputs],
        routings: list[Rows],
        placed: Sequence[tuple[int, ...]],
    ) -> list[Interval]:
        """What has to be there before the first round: every round's acceptance."""
        given = zip(inputs, handed, routings, placed, strict=True)
        return [self._expect(one, wired, routing[self._context.rank], p) for one, wired, routing, p in given]

    def _expect(
        self, inputs: Inputs, wired: Inputs, rows: tuple[tuple[int, ...], ...], placed: tuple[int, ...]
    ) -> Interval:
        # Where experts were moved, the judge is to know of logical ones only.
        if self._oracle or placed != tuple(range(self._cell.experts)):
            return self._of_oracle(inputs, wired, rows)
        cell, contract = self._cell, self._contract
        experts = contract.experts
        slot_of = torch.full((cell.experts,), -1, dtype=torch.int64, device=inputs.rows.device)
        owned = torch.tensor(self._owned(), device=inputs.rows.device)
        slot_of[owned] = torch.arange(len(owned), device=inputs.rows.device)
        return layer(
            wired.rows,
            wired.ids,
            wired.weights,
            self._local(placed),
            slot_of,
            numerics=contract.numerics(1),
            wire=experts.wire if contract.wire else None,
            experts_per_rank=cell.experts // cell.world_size,
            accumulation_element=contract.exchange.accumulation is Accumulation.ELEMENT,
            nodes=cell.nodes if contract.exchange.node_levels else 1,
            group=self._context.group,
        ).acceptance

    def _of_oracle(self, inputs: Inputs, wired: Inputs, rows: tuple[tuple[int, ...], ...]) -> Interval:
        """By logical experts; which rank computes a slot is all that the placement decides."""
        cell, contract = self._cell, self._contract
        ranks = self._ranks_of(wired.ids).tolist()
        # One number says which expert and which rank.
        named = [
            [expert * cell.world_size + rank if expert >= 0 else -1 for expert, rank in zip(row, on, strict=True)]
            for row, on in zip(rows, ranks, strict=True)
        ]
        answer = layer_expected(
            inputs.rows,
            named,
            inputs.weights,
            lambda name: self._matrices(name // cell.world_size),
            contract.numerics(1),
            owner=lambda name: name % cell.world_size,
            world_size=cell.world_size,
            dtype=self._dtype,
            wire=contract.experts.wire if contract.wire else None,
            nodes=cell.nodes if contract.exchange.node_levels else 1,
            every_addition_rounds=contract.exchange.accumulation is Accumulation.ELEMENT,
        )
        return interval_of(answer, inputs.rows.device)

    def _ranks_of(self, ids: torch.Tensor) -> torch.Tensor:
        """Rank that holds each id as dispatched; 0 for masked slots."""
        cell = self._cell
        if not cell.translated and cell.placement == "round_robin":
            return ids.long().clamp(min=0) % cell.world_size
        return torch.div(ids.long().clamp(min=0), cell.experts // cell.world_size, rounding_mode="floor")

    def _matrices(self, expert: int) -> Matrices:
        if expert not in self._decoded:
            self._decoded[expert] = decoded(self._weights((expert,)))(0)
        return self._decoded[expert]

    # ------------------------------------------------------------------ the backend
    def _round(
        self, case: LayerCase, index: int, inputs: Inputs, placed: tuple[int, ...], phase: SetPhase
    ) -> torch.Tensor:
        """A copy of the output, made before the next round."""
        rank = self._context.rank
        if placed != self._loaded:
            # Weights move between rounds, in the same order on every rank.
            phase("load", index)
            local = self._local(placed).local
            with backend_code():
                self._operation.load(local, self._owned())
            self._loaded = placed
        delays = case.rounds[index].delays_ms
        if delays and delays[rank]:
            time.sleep(delays[rank] / 1000)
        phase("forward", index)
        output = self._forward(index, inputs)
        if case.cell.mode == "drained":
            synchronise(self._context.device)
        return output.clone()

    def _forward(self, index: int, inputs: Inputs) -> torch.Tensor:
        """The layer's output in round ``index``."""
        return self._operation.forward(inputs.rows, inputs.ids, inputs.weights)

    # ------------------------------------------------------------------ judging
    def _judge(
        self,
        seen: list[torch.Tensor],
        handed: list[Inputs],
        pristine: list[Inputs],
        expected: list[Interval],
        routings: list[Rows],
    ) -> tuple[Mismatch | None, float]:
        worst, rank = 0.0, self._context.rank
        for index, output in enumerate(seen):
            shape = (pristine[index].rows.shape[0], self._cell.hidden)
            mismatch = judge_layout("layer.layout", index, output, shape, self._dtype)
            if mismatch is None:
                names = torch.tensor(routings[index][rank], dtype=torch.int64).reshape(shape[0], self._cell.top_k)
                mismatch, ratio = judge_output("layer.output", index, output, expected[index], names, rank=rank)
                worst = max(worst, ratio)
            mismatch = mismatch or judge_inputs(index, handed[index], pristine[index])
            if mismatch is not None:
                return mismatch, worst
        return None, worst


def tables_of(case: LayerCase) -> list[tuple[int, ...]]:
    """Logical expert of every physical one, for each round."""
    current, found = eplb.initial_map(case.cell.logical, case.cell.redundant), []
    for a_round in case.rounds:
        current = a_round.physical or current
        found.append(current)
    return found
