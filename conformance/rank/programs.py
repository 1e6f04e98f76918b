"""The dispatch-experts-combine program, drained and free-running.

Everything the backend must not wait for is done first: inputs and expected results of every round. *Drained* then
synchronises after each call and reads counts and source maps; *free-running* runs every round without host sync,
without a collective of ours and without ``.item()``, cloning outputs on the same stream, because those would act as
barriers and hide the races users hit. Judging starts after the last round. What a drained pass does not prove: that
back-to-back rounds are safe; that is what free-running is for.
"""

from __future__ import annotations

import time

import torch

from accelerated.contract import Accumulation, Contract, ReceiveLayout
from accelerated.interface import Operation, RankContext, Received
from conformance.cases import Case, Rows, expand
from conformance.engine.protocol import Mismatch
from conformance.rank.experts import LocalExperts, dense_experts
from conformance.rank.guard import synchronise
from conformance.rank.inputs import DTYPES, INTEGER_GRID, Inputs, round_inputs, stamp_of
from conformance.rank.judge import (
    ExpectedResult,
    ExpectedRows,
    Observed,
    judge_combine,
    judge_dispatch,
    judge_inputs,
    judge_weights,
)
from conformance.rank.phases import SetPhase
from conformance.rank.routing import wire_rows
from reference import dispatch_combine, oracle
from reference.bounds import combine_acceptance
from reference.intervals import Interval

Expectation = tuple[ExpectedRows, ExpectedResult]


def _grid(case: Case, index: int) -> float | None:
    """Power of two that everything the experts compute is a multiple of, where the values promise one."""
    return INTEGER_GRID if case.rounds[index].values == "integers" else None


class Program:
    """One cell's operator, contract and experts, ready to run cases."""

    def __init__(
        self, context: RankContext, operation: Operation, contract: Contract, judged_by: str, experts: LocalExperts
    ) -> None:
        self._context = context
        self._operation = operation
        self._contract = contract
        self._judged_by = judged_by
        self._experts = experts
        self._run = -1

    def run(self, case: Case, phase: SetPhase) -> tuple[Mismatch | None, float]:
        """Run and judge a case; the first failed check of this rank and the largest error/bound."""
        phase("inputs", 0)
        self._run += 1  # every rank counts the same runs
        context = self._context
        # What the other ranks route is needed where their rows are built again here.
        every_row = self._contract.receive_layout is ReceiveLayout.EVERY_ROW
        only = None if every_row or self._by_oracle(case) else context.rank
        routings = [wire_rows(case.cell, expand(case.cell, r.routing, only)) for r in case.rounds]
        inputs = [round_inputs(case, i, context.rank, r, context.device, self._run) for i, r in enumerate(routings)]
        handed = [one.clone() for one in inputs]
        phase("expected", 0)
        expected = [self._expect(case, i, routing, inputs[i]) for i, routing in enumerate(routings)]
        seen = [self._round(case, i, one, phase) for i, one in enumerate(handed)]
        phase("judge", 0)
        return self._judge(case, inputs, seen, expected)

    # ------------------------------------------------------------------ expected results
    def _by_oracle(self, case: Case) -> bool:
        return self._judged_by == "oracle" or case.cell.check == "placement"

    def _expect(self, case: Case, index: int, routing: Rows, inputs: Inputs) -> Expectation:
        if self._by_oracle(case):
            return self._expected_rows(case, index, routing), self._result_of_oracle(case, index, routing, inputs)
        cell, contract = case.cell, self._contract
        sent = dispatch_combine.dispatch(
            inputs.rows,
            inputs.ids,
            inputs.weights,
            experts_per_rank=cell.experts // cell.world_size,
            group=self._context.group,
        )
        nodes = cell.nodes if contract.node_levels else 1
        outputs = self._experts(sent.rows, sent.ids, sent.weights)
        back = dispatch_combine.combine(
            outputs, sent, sent.weights, fold=contract.fold, nodes=nodes, group=self._context.group
        )
        acceptance = combine_acceptance(
            back.terms,
            back.destinations,
            outputs.dtype,
            nodes=nodes,
            element_accumulation=contract.accumulation is Accumulation.ELEMENT,
            grid=_grid(case, index),
        )
        assert back.weights is not None
        result = ExpectedResult(acceptance, back.weights, outputs.dtype)
        if contract.receive_layout is ReceiveLayout.EVERY_ROW:
            return self._expected_rows(case, index, routing), result
        keys = torch.stack([sent.source_rank, sent.source_token], dim=1).cpu()
        return ExpectedRows(keys, sent.rows, sent.ids, sent.weights), result

    def _expected_rows(self, case: Case, index: int, routing: Rows) -> ExpectedRows:
        """Rows this rank must receive, each built again from its source's draws."""
        cell, device = case.cell, self._context.device
        if self._contract.receive_layout is ReceiveLayout.EVERY_ROW:
            keys = [(source, token) for source, rows in enumerate(routing) for token in range(len(rows))]
        else:
            per_rank = cell.experts // cell.world_size
            keys = oracle.received_set(routing, self._context.rank, per_rank, cell.world_size)
        tokens: dict[int, list[int]] = {}
        for source, token in keys:
            tokens.setdefault(source, []).append(token)
        # The keys ascend by source, and so do these.
        parts = [round_inputs(case, index, s, routing, device, self._run).pick(t) for s, t in tokens.items()]
        parts = parts or [round_inputs(case, index, 0, routing, device).pick([])]
        columns = [torch.cat([getattr(part, name) for part in parts]) for name in ("rows", "ids", "weights")]
        return ExpectedRows(torch.tensor(keys, dtype=torch.int64).reshape(-1, 2), columns[0], columns[1], columns[2])

    def _result_of_oracle(self, case: Case, index: int, routing: Rows, inputs: Inputs) -> ExpectedResult:
        cell, device = case.cell, self._context.device
        # Under round-robin placement position p of the rank-major list of owned experts is physical id p.
        names = torch.arange(cell.experts)
        if cell.placement == "round_robin":
            names = torch.cat([torch.arange(r, cell.experts, cell.world_size) for r in range(cell.world_size)])
        answer = oracle.layer_output(
            inputs.rows,
            routing[self._context.rank],
            inputs.weights,
            lambda ids, x: dense_experts(names[ids], x),
            experts_per_rank=cell.experts // cell.world_size,
            world_size=cell.world_size,
            dtype=DTYPES[cell.dtype],
            nodes=cell.nodes if self._contract.node_levels else 1,
            grid=_grid(case, index),
            every_addition_rounds=self._contract.accumulation is Accumulation.ELEMENT,
        )
        acceptance = Interval(answer.value.to(device), answer.lower.to(device), answer.upper.to(device))
        return ExpectedResult(acceptance, answer.weights.float().to(device), DTYPES[cell.dtype])

    # ------------------------------------------------------------------ the backend
    def _round(self, case: Case, index: int, inputs: Inputs, phase: SetPhase) -> Observed:
        delays = case.rounds[index].delays_ms
        if delays and delays[self._context.rank]:
            time.sleep(delays[self._context.rank] / 1000)
        drained = case.cell.mode == "drained"
        phase("prepare", index)
        received = self._operation.prepare(inputs.rows, inputs.ids, inputs.weights)
        source_map = None
        promised = drained and self._contract.source_map
        if drained:
            self._synchronise()
            if received.source_map is not None:
                phase("source map", index)
                source_map = received.source_map()
        phase("experts", index)
        kept = (received.rows.clone(), received.ids.clone(), received.weights.clone(), received.count.clone())
        outputs = self._poisoned_outputs(received, drained)
        phase("finalize", index)
        combined = self._operation.finalize(outputs, received)
        if drained:
            self._synchronise()
        weights = None if combined.weights is None else combined.weights.clone()
        return Observed(*kept, source_map, combined.output.clone(), weights, inputs, source_map_promised=promised)

    def _poisoned_outputs(self, received: Received, drained: bool) -> torch.Tensor:
        """Expert rows for the valid prefix, NaN beyond it, in a buffer as long as the received one."""
        rows, ids, weights = received.rows, received.ids, received.weights
        if drained:
            count = min(max(int(received.count.item()), 0), rows.shape[0])
            outputs = torch.full_like(rows, torch.nan)
            outputs[:count] = self._experts(rows[:count], ids[:count], weights[:count])
            return outputs
        valid = torch.arange(rows.shape[0], device=rows.device) < received.count
        return torch.where(valid.unsqueeze(1), self._experts(rows, ids, weights), torch.nan)

    def _synchronise(self) -> None:
        synchronise(self._context.device)

    # ------------------------------------------------------------------ judging
    def _judge(
        self, case: Case, inputs: list[Inputs], seen: list[Observed], expected: list[Expectation]
    ) -> tuple[Mismatch | None, float]:
        worst = 0.0
        for index, (one, (rows, result)) in enumerate(zip(seen, expected, strict=True)):
            mismatch = judge_dispatch(index, one, rows, self._contract, stamp_of(index, self._run))
            if mismatch is None and case.rounds[index].values == "bits":
                # They hold NaN and infinities: what is summed of them means nothing, but the weights do.
                mismatch = judge_weights(index, one, result, self._contract)
            elif mismatch is None:
                mismatch, ratio = judge_combine(index, one, result, self._contract)
                worst = max(worst, ratio)
            mismatch = mismatch or judge_inputs(index, one.inputs, inputs[index])
            if mismatch is not None:
                return mismatch, worst
        return None, worst
