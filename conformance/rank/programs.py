"""The dispatch-experts-combine program, drained and free-running.

Everything the backend must not wait for is done first: inputs and expected results of every round. *Drained* then
synchronises after each call and reads counts and source maps; *free-running* runs every round without host sync,
without a collective of ours and without ``.item()``, cloning outputs on the same stream, because those would act as
barriers and hide the races users hit. Judging starts after the last round. In the mode ``handle`` every round is
followed by its replay, with rows, weights and scales of its own. What a drained pass does not prove: that back-to-back
rounds are safe; that is what free-running is for.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from accelerated.contract import Accumulation, Contract, ReceiveLayout
from accelerated.interface import Combined, Operation, RankContext, Received
from conformance.cases import MAX_REPLAYED, Case, Rows, expand
from conformance.engine.protocol import Mismatch
from conformance.rank.elements import elements
from conformance.rank.experts import LocalExperts, dense_experts
from conformance.rank.guard import synchronise
from conformance.rank.inputs import DTYPES, INTEGER_GRID, Inputs, round_inputs, stamp_of
from conformance.rank.judge import (
    Delivered,
    ExpectedResult,
    ExpectedRows,
    Observed,
    judge_combine,
    judge_dispatch,
    judge_inputs,
    judge_kernel,
    judge_weights,
)
from conformance.rank.phases import SetPhase
from conformance.rank.routing import wire_rows
from reference import dispatch_combine, oracle
from reference.bounds import combine_acceptance
from reference.combine_numerics import CombineCodec
from reference.intervals import Interval

Expectation = tuple[ExpectedRows, ExpectedResult]
#: (round, whether it is the replay); in a sequence (round, number of the step).
Step = tuple[int, int]


@dataclass
class Sent:
    """One dispatch: what came back, which is the backend's, and what it held then, cloned on its stream."""

    received: Received
    rows: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    count: torch.Tensor
    scales: torch.Tensor | None
    expert_count: torch.Tensor | None
    source_map: torch.Tensor | None
    repeats: Sent | None = None  # the dispatch that this one replays


@dataclass
class Returned:
    """One combine: what came back, which is the backend's, and the experts' rows that it was given."""

    combined: Combined
    expert_rows: torch.Tensor


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
        #: Kernels of combine that the backend named in the last case, each once.
        self.kernels: tuple[str, ...] = ()

    def run(self, case: Case, phase: SetPhase) -> tuple[Mismatch | None, float]:
        """Run and judge a case; the first failed check of this rank and the largest error/bound."""
        phase("inputs", 0)
        self._run += 1  # every rank counts the same runs
        context = self._context
        routings = self._routings(case)
        replays = (False, True) if "handle" in case.cell.modes else (False,)
        steps: list[Step] = [(index, replayed) for index in range(len(case.rounds)) for replayed in replays]
        inputs = [self._inputs(case, step, context.rank, routings[step[0]]) for step in steps]
        handed = [one.clone() for one in inputs]
        phase("expected", 0)
        expected = [self._expect(case, step, routings[step[0]], one) for step, one in zip(steps, inputs, strict=True)]
        seen: list[Observed] = []
        sent: Sent | None = None
        for (index, replayed), one in zip(steps, handed, strict=True):
            found, sent = self._round(case, index, one, phase, sent if replayed else None)
            seen.append(found)
        self.kernels = tuple(sorted({str(one.kernel) for one in seen if one.kernel}))
        phase("judge", 0)
        return self._judge(case, steps, inputs, seen, expected)

    def _routings(self, case: Case) -> list[Rows]:
        """Routing of each round, as dispatched."""
        # What the other ranks route is needed where their rows are built again here.
        every_row = self._contract.receive_layout is ReceiveLayout.EVERY_ROW
        only = None if every_row or self._by_oracle(case) else self._context.rank
        return [wire_rows(case.cell, expand(case.cell, r.routing, only)) for r in case.rounds]

    def _inputs(self, case: Case, step: Step, source: int, routing: Rows) -> Inputs:
        index, replayed = step
        return round_inputs(case, index, source, routing, self._context.device, self._run, replayed=bool(replayed))

    # ------------------------------------------------------------------ expected results
    def _by_oracle(self, case: Case) -> bool:
        return self._judged_by == "oracle" or case.cell.check == "placement"

    def _expect(self, case: Case, step: Step, routing: Rows, inputs: Inputs) -> Expectation:
        if self._by_oracle(case):
            return self._expected_rows(case, step, routing), self._result_of_oracle(case, step[0], routing, inputs)
        cell, contract = case.cell, self._contract
        sent = dispatch_combine.dispatch(
            inputs.rows,
            inputs.ids,
            inputs.weights,
            inputs.scales,
            experts_per_rank=cell.experts // cell.world_size,
            group=self._context.group,
        )
        nodes = cell.nodes if contract.node_levels else 1
        outputs = self._answers(case, step[0], sent.rows, sent.ids, sent.weights)
        back = dispatch_combine.combine(
            outputs, sent, sent.weights, fold=contract.fold, nodes=nodes, group=self._context.group
        )
        grid = _grid(case, step[0])

        def accepted(codec: CombineCodec | None) -> Interval:
            return combine_acceptance(
                back.terms,
                back.destinations,
                outputs.dtype,
                nodes=nodes if codec is None or codec.rounds_partials else 1,
                element_accumulation=contract.accumulation is Accumulation.ELEMENT,
                grid=grid,
                codec=codec,
            )

        assert back.weights is not None
        result = ExpectedResult(accepted(contract.codec), back.weights, outputs.dtype)
        if contract.codec is not None:
            result.otherwise, result.swapped = lambda: accepted(None), f"{contract.codec.name} did not run"
        elif contract.ignored_codec is not None:
            ignored = contract.ignored_codec
            result.otherwise = lambda: accepted(ignored)
            result.swapped = f"{ignored.name} ran where the contract says that it is ignored"
        if contract.receive_layout is ReceiveLayout.EVERY_ROW:
            return self._expected_rows(case, step, routing), result
        keys = torch.stack([sent.source_rank, sent.source_token], dim=1).cpu()
        rows = Inputs(sent.rows, sent.ids, sent.weights, sent.scales)
        return self._received(case, step[0], keys, rows), result

    def _received(self, case: Case, index: int, keys: torch.Tensor, rows: Inputs) -> ExpectedRows:
        """What a rank is to see of the rows it receives."""
        cell = case.cell
        weights = None if "weightless" in cell.modes else rows.weights
        count = None
        if "expert count" in cell.modes:
            per_rank = cell.experts // cell.world_size
            local = rows.ids.long() - self._context.rank * per_rank
            local = local[(local >= 0) & (local < per_rank)]
            count = torch.bincount(local, minlength=per_rank).to(torch.int32)
        room = None if self._contract.exact_rows else cell.world_size * case.room(index)
        return ExpectedRows(keys, rows.rows, rows.ids, weights, rows.scales, count, room)

    def _answers(
        self, case: Case, index: int, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """What this rank's experts make of rows as they were received."""
        kind = case.rounds[index].values
        x = elements(rows, case.cell, kind, DTYPES[case.cell.dtype])
        return self._experts(x, ids, _applied(case, weights), scaling=kind == "edges")

    def _expected_rows(self, case: Case, step: Step, routing: Rows) -> ExpectedRows:
        """Rows this rank must receive, each built again from its source's draws."""
        cell = case.cell
        if self._contract.receive_layout is ReceiveLayout.EVERY_ROW:
            keys = [(source, token) for source, rows in enumerate(routing) for token in range(len(rows))]
        else:
            per_rank = cell.experts // cell.world_size
            keys = oracle.received_set(routing, self._context.rank, per_rank, cell.world_size)
        tokens: dict[int, list[int]] = {}
        for source, token in keys:
            tokens.setdefault(source, []).append(token)
        # The keys ascend by source, and so do these.
        parts = [self._inputs(case, step, s, routing).pick(t) for s, t in tokens.items()]
        parts = parts or [self._inputs(case, step, 0, routing).pick([])]
        names = ("rows", "ids", "weights", *(() if parts[0].scales is None else ("scales",)))
        columns = Inputs(*(torch.cat([getattr(part, name) for part in parts]) for name in names))
        return self._received(case, step[0], torch.tensor(keys, dtype=torch.int64).reshape(-1, 2), columns)

    def _result_of_oracle(self, case: Case, index: int, routing: Rows, inputs: Inputs) -> ExpectedResult:
        cell, device, kind = case.cell, self._context.device, case.rounds[index].values
        # Under round-robin placement position p of the rank-major list of owned experts is physical id p.
        names = torch.arange(cell.experts)
        if cell.placement == "round_robin":
            names = torch.cat([torch.arange(r, cell.experts, cell.world_size) for r in range(cell.world_size)])
        answer = oracle.layer_output(
            elements(inputs.rows, cell, kind, DTYPES[cell.dtype]),
            routing[self._context.rank],
            _applied(case, inputs.weights),
            lambda ids, x: dense_experts(names[ids], x, scaling=kind == "edges"),
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
    def _round(
        self, case: Case, index: int, inputs: Inputs, phase: SetPhase, cached: Sent | None
    ) -> tuple[Observed, Sent]:
        """One dispatch and combine; a replay of ``cached`` if it is given."""
        delays = case.rounds[index].delays_ms
        if delays and delays[self._context.rank] and cached is None:
            time.sleep(delays[self._context.rank] / 1000)
        sent = self._send(case, index, inputs, phase, cached, self._operation)
        found, _ = self._return(case, index, sent, inputs, phase, self._operation)
        return found, sent

    def _send(
        self,
        case: Case,
        index: int,
        inputs: Inputs,
        phase: SetPhase,
        cached: Sent | None,
        operation: Operation,
    ) -> Sent:
        """Dispatch a round, or replay it along ``cached``."""
        drained = case.cell.mode == "drained"
        if cached is None:
            phase("prepare", index)
            received = _prepare(operation, inputs)
        else:
            phase("replay", index)
            assert cached.received.replay is not None
            received = cached.received.replay(inputs.rows, inputs.weights, inputs.scales)
        source_map = None
        if drained:
            self._synchronise()
            if received.source_map is not None:
                phase("source map", index)
                source_map = received.source_map()
        phase("experts", index)
        return Sent(
            received,
            received.rows.clone(),
            received.ids.clone(),
            received.weights.clone(),
            received.count.clone(),
            None if received.scales is None else received.scales.clone(),
            None if received.expert_count is None else received.expert_count.clone(),
            source_map,
            cached,
        )

    def _return(
        self, case: Case, index: int, sent: Sent, inputs: Inputs, phase: SetPhase, operation: Operation
    ) -> tuple[Observed, Returned]:
        """Run the experts on what was received, and combine."""
        drained = case.cell.mode == "drained"
        outputs = self._poisoned_outputs(case, index, sent.received, drained)
        phase("finalize", index)
        combined = operation.finalize(outputs, sent.received)
        if drained:
            self._synchronise()
        found = Observed(
            sent.rows,
            sent.ids,
            sent.weights,
            sent.count,
            sent.source_map,
            combined.output.clone(),
            None if combined.weights is None else combined.weights.clone(),
            inputs,
            source_map_promised=drained and self._contract.source_map,
            scales=sent.scales,
            expert_count=sent.expert_count,
            repeated=None if sent.repeats is None else Delivered(sent.repeats.rows, sent.repeats.count),
            kernel=combined.kernel,
        )
        return found, Returned(combined, outputs)

    def _poisoned_outputs(self, case: Case, index: int, received: Received, drained: bool) -> torch.Tensor:
        """Expert rows for the valid prefix and NaN beyond it, in the backend's buffer or in one as long."""
        rows, ids, weights = received.rows, received.ids, received.weights
        if drained:
            count = min(max(int(received.count.item()), 0), rows.shape[0])
            valid = self._answers(case, index, rows[:count], ids[:count], weights[:count])
            outputs = valid.new_empty(rows.shape[0], valid.shape[1]) if received.buffer is None else received.buffer
            outputs[count:] = torch.nan
            outputs[:count] = valid
            return outputs
        is_valid = torch.arange(rows.shape[0], device=rows.device) < received.count
        answers = torch.where(is_valid.unsqueeze(1), self._answers(case, index, rows, ids, weights), torch.nan)
        if received.buffer is None:
            return answers
        received.buffer[: answers.shape[0]] = answers
        return received.buffer

    def _synchronise(self) -> None:
        synchronise(self._context.device)

    # ------------------------------------------------------------------ judging
    def _judge(
        self,
        case: Case,
        steps: list[Step],
        inputs: list[Inputs],
        seen: list[Observed],
        expected: list[Expectation],
    ) -> tuple[Mismatch | None, float]:
        worst = 0.0
        for (index, replayed), pristine, one, (rows, result) in zip(steps, inputs, seen, expected, strict=True):
            stamp = stamp_of(index, self._run, replayed=bool(replayed))
            mismatch = judge_dispatch(index, one, rows, self._contract, stamp)
            if mismatch is None:
                mismatch, ratio = self._judge_result(case, index, one, result)
                worst = max(worst, ratio)
            mismatch = mismatch or judge_kernel(index, one, self._contract)
            mismatch = mismatch or judge_inputs(index, one.inputs, pristine)
            if mismatch is not None:
                return self._told(case, mismatch, bool(replayed)), worst
        return None, worst

    def _told(self, case: Case, mismatch: Mismatch, replayed: bool) -> Mismatch:
        """A mismatch as it is reported."""
        del case
        return _of_replay(mismatch) if replayed else mismatch

    def _judge_result(
        self, case: Case, index: int, seen: Observed, result: ExpectedResult
    ) -> tuple[Mismatch | None, float]:
        """Judge what combine returned for a round."""
        if not case.cell.wire and case.rounds[index].values == "bits":
            # They hold NaN and infinities: what is summed of them means nothing, but the weights do.
            return judge_weights(index, seen, result, self._contract), 0.0
        return judge_combine(index, seen, result, self._contract)


def _prepare(operation: Operation, inputs: Inputs) -> Received:
    given = (inputs.rows, inputs.ids, inputs.weights)
    if inputs.scales is None:
        return operation.prepare(*given)
    return operation.prepare(*given, inputs.scales)


def _applied(case: Case, weights: torch.Tensor) -> torch.Tensor:
    """The weights that the experts apply: where none are dispatched there are none to apply."""
    return torch.ones_like(weights) if "weightless" in case.cell.modes else weights


def _of_replay(mismatch: Mismatch) -> Mismatch:
    """A mismatch named as the replay's."""
    cached = (mismatch.round - MAX_REPLAYED) % 256
    mismatch.check = f"replay.{mismatch.check}"
    mismatch.message = f"{mismatch.message} (rows of the dispatch that is replayed are said to be of round {cached})"
    return mismatch
