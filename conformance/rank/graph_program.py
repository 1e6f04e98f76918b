"""The program of captured calls: capture on a new operator, write inputs, replay, judge.

Each graph has inputs of its own that stay where they are; a replay is preceded by writing the round's contents there.
What the backend delivers is copied inside the graph, because a combine may free what a dispatch returned for faster
ranks, and the copies are poisoned before each replay, so that a replay that does nothing shows. Contents at the capture
are those of no round: what comes out of them is recognised by its stamp. Everything else, eager rounds included, is as
in :mod:`conformance.rank.programs`.

Every case has an operator of its own, since only the first call of one is cold. Graphs are released, whatever happens,
before the operator is closed, and all of them before the case is answered, so none outlives the process group. Source
maps are left to eager rounds: asking for one synchronises the host. What a pass does not prove: that a process whose
first launch of a kernel is captured works; ranks have run other cases before.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from accelerated.contract import Contract, exchange
from accelerated.graphs import graphs_of
from accelerated.interface import Backend, Graph, Graphs, Operation, RankContext, Received, Session
from conformance.cases import Case, GraphCase, GraphCell, Rows
from conformance.engine.protocol import Mismatch
from conformance.graph_cases import MAX_ROUNDS, first_rounds, misfit, replays_of
from conformance.rank.experts import LocalExperts
from conformance.rank.guard import backend_code
from conformance.rank.guarded_exchange import GuardedExchange
from conformance.rank.inputs import Inputs, numbered_inputs, stamp_of
from conformance.rank.judge import Delivered, Observed
from conformance.rank.phases import SetPhase
from conformance.rank.programs import Program, Step, _prepare

#: Draws of the contents at a capture; rounds have the numbers below.
_CAPTURED_PART = 48


def graph_program(
    context: RankContext, made: Backend, session: Session, cell: GraphCell, built: Operation
) -> GraphProgram:
    """The program of a cell, whose first operator is built already."""
    first = [built]

    def build() -> Operation:
        if not first:
            with backend_code():
                first.append(session.build(cell.problem(), cell.kernel_type))
        return GuardedExchange(first.pop(), cell.problem())

    with backend_code():
        graphs = graphs_of(session, context)
    contract = exchange(made.contract(cell.problem(), cell.kernel_type))
    experts = LocalExperts(cell, context.rank, context.device)
    return GraphProgram(context, build, graphs, contract, made.judged_by, experts)


@dataclass
class _Captured:
    """One round inside a graph: its inputs, and the copies that a replay writes."""

    inputs: Inputs
    kept: dict[str, torch.Tensor | None] = field(default_factory=dict)
    received: Received | None = None
    warmed: Delivered | None = None  # by the round whose handle is replayed
    answers: torch.Tensor | None = None  # what the experts write between dispatch and combine in graphs of their own


@dataclass
class _Graph:
    """The graphs of one number (one, or a dispatch's and a combine's) and the rounds they hold."""

    rounds: list[_Captured]
    graphs: list[Graph] = field(default_factory=list)


class GraphProgram(Program):
    """One cell's operator, built anew for every case, and what is captured on it."""

    def __init__(
        self,
        context: RankContext,
        build: Callable[[], Operation],
        graphs: Graphs,
        contract: Contract,
        judged_by: str,
        experts: LocalExperts,
    ) -> None:
        super().__init__(context, build(), contract, judged_by, experts)
        self._build, self._captures = build, graphs
        self._used = False
        self._graphs: dict[int, _Graph] = {}

    def run(self, case: Case, phase: SetPhase) -> tuple[Mismatch | None, float]:
        """Run and judge a case; the first failed check of this rank and the largest error/bound.

        Raises:
            ValueError: the case is none of captured calls, or asks for what the contract does not promise.
        """
        if not isinstance(case, GraphCase):
            raise ValueError(f"{type(case).__name__} given; this program runs cases of captured calls")
        if reason := misfit(case, self._contract):
            raise ValueError(reason)
        try:
            return self._run_case(case, phase)
        finally:
            self._release()

    def close(self) -> None:
        """Graphs first, then the operator. Called in the same order on every rank."""
        self._release()
        self._operation.close()

    def _run_case(self, case: GraphCase, phase: SetPhase) -> tuple[Mismatch | None, float]:
        phase("inputs", 0)
        self._run += 1
        routings = self._routings(case)
        steps: list[Step] = [(index, False) for index in range(len(case.rounds))]
        rank = self._context.rank
        inputs = [self._inputs(case, step, rank, routing) for step, routing in zip(steps, routings, strict=True)]
        phase("expected", 0)
        expected = [self._expect(case, *one) for one in zip(steps, routings, inputs, strict=True)]
        self._renew(phase)
        self._capture(case, routings, phase)
        seen: list[Observed] = []
        for index, length in replays_of(case):
            if case.rebuilt and index == case.rebuilt:
                self._renew(phase)
                self._capture(case, routings, phase)
            graph = case.rounds[index].graph
            if graph < 0:
                handed = inputs[index].clone()
                seen.append(self._round(case, index, handed, phase, None)[0])
            else:
                seen += self._replay(case, index, self._graphs[graph], inputs[index : index + length], phase)
        phase("judge", 0)
        self._synchronise()
        return self._judge(case, steps, inputs, seen, expected)

    # ------------------------------------------------------------------ operators and captures
    def _renew(self, phase: SetPhase) -> None:
        """Have an operator without a call before it; collective."""
        if self._used:
            phase("drop operator", 0)
            self._release()
            # No rank may free its buffers while another one is still at work.
            dist.all_reduce(torch.zeros(1), group=self._context.group)
            self._operation.close()
            phase("build", 0)
            self._operation = self._build()
        self._used = True

    def _release(self) -> None:
        """Let all graphs go, the last one first, and what they wrote to with them."""
        if not self._graphs:
            return
        self._synchronise()
        graphs, self._graphs = self._graphs, {}
        with backend_code():
            for captured in reversed(graphs.values()):
                for graph in reversed(captured.graphs):
                    graph.release()

    def _capture(self, case: GraphCase, routings: list[Rows], phase: SetPhase) -> None:
        """Capture every graph, warm or cold, in the order of their numbers."""
        position = 0
        for number, first in first_rounds(case).items():
            rounds = []
            for index in range(first, first + case.cell.length):
                rounds.append(_Captured(self._contents(case, index, routings[index], position)))
                position += 1
            graph = self._graphs[number] = _Graph(rounds)
            cached = []
            for index, one in enumerate(rounds, first):
                phase("warm up", index)
                cached.append(self._warm_up(case, index, one) if case.cell.warm else None)
            phase("capture", first)
            if case.cell.halves:
                self._capture_halves(case, first, graph, cached[0])
                continue
            with backend_code(), self._captures.capture() as captured:
                graph.graphs.append(captured)
                for index, (one, before) in enumerate(zip(rounds, cached, strict=True), first):
                    self._dispatch(one, before)
                    assert one.received is not None
                    self._combine(one, self._poisoned_outputs(case, index, one.received, drained=False))

    def _capture_halves(self, case: GraphCase, index: int, graph: _Graph, cached: Received | None) -> None:
        (one,) = graph.rounds
        with backend_code(), self._captures.capture() as forth:
            graph.graphs.append(forth)
            self._dispatch(one, cached)
        assert one.received is not None
        one.answers = torch.empty_like(one.received.rows, memory_format=torch.contiguous_format)
        with backend_code(), self._captures.capture() as back:
            graph.graphs.append(back)
            self._combine(one, one.answers)

    def _contents(self, case: GraphCase, index: int, routing: Rows, position: int) -> Inputs:
        """What stands in a graph's inputs when it is captured: where routing is not frozen, a local one."""
        rank, cell = self._context.rank, case.cell
        stamp = stamp_of(MAX_ROUNDS + position % (16 - MAX_ROUNDS), self._run)
        part = _CAPTURED_PART + position % (64 - _CAPTURED_PART)
        found = numbered_inputs(case, index, rank, routing, self._context.device, part, stamp)
        if "routing" in self._contract.captures and not cell.modes:
            per_rank = cell.experts // cell.world_size
            slots = torch.arange(cell.top_k, device=self._context.device) % per_rank
            found.ids.copy_((rank * per_rank + slots).expand_as(found.ids))
        return found

    def _warm_up(self, case: GraphCase, index: int, one: _Captured) -> Received:
        """A round of its own with what is captured; a handle comes from it where there is one."""
        with self._captures.warm_up():
            received = _prepare(self._operation, one.inputs)
            if received.replay is not None:
                one.warmed = Delivered(received.rows.clone(), received.count.clone())
            self._operation.finalize(self._poisoned_outputs(case, index, received, drained=False), received)
        return received

    def _dispatch(self, one: _Captured, cached: Received | None) -> None:
        if cached is not None and cached.replay is not None:
            received = cached.replay(one.inputs.rows, one.inputs.weights, one.inputs.scales)
        else:
            received = _prepare(self._operation, one.inputs)
        one.received = received
        for name in ("rows", "ids", "weights", "count"):
            one.kept[name] = getattr(received, name).clone()

    def _combine(self, one: _Captured, answers: torch.Tensor) -> None:
        assert one.received is not None
        combined = self._operation.finalize(answers, one.received)
        one.kept["output"] = combined.output.clone()
        one.kept["combined_weights"] = None if combined.weights is None else combined.weights.clone()

    # ------------------------------------------------------------------ replays
    def _replay(
        self, case: GraphCase, first: int, graph: _Graph, inputs: list[Inputs], phase: SetPhase
    ) -> list[Observed]:
        """Write, poison, replay and copy the rounds from ``first`` on; no host sync unless drained."""
        delays = case.rounds[first].delays_ms
        if delays and delays[self._context.rank]:
            time.sleep(delays[self._context.rank] / 1000)
        phase("replay", first)
        for one, given in zip(graph.rounds, inputs, strict=True):
            for name in ("rows", "ids", "weights"):
                getattr(one.inputs, name).copy_(getattr(given, name))
            for tensor in one.kept.values():
                _poison(tensor)
        with backend_code():
            graph.graphs[0].replay()
        if case.cell.halves:
            (one,) = graph.rounds
            assert one.answers is not None
            assert one.received is not None
            one.answers.copy_(self._poisoned_outputs(case, first, one.received, drained=False))
            phase("replay combine", first)
            with backend_code():
                graph.graphs[1].replay()
        if case.cell.mode == "drained":
            self._synchronise()
        return [_observed(one) for one in graph.rounds]

    def _told(self, case: Case, mismatch: Mismatch, replayed: bool) -> Mismatch:
        """A mismatch of a replay, named as one."""
        assert isinstance(case, GraphCase)
        graph = case.rounds[mismatch.round].graph
        if graph >= 0:
            mismatch.check = f"graph.{mismatch.check}"
            mismatch.message = (
                f"{mismatch.message} (replayed by graph {graph}; what was captured is said to be of rounds "
                f"{MAX_ROUNDS} and up)"
            )
        return mismatch


def _poison(tensor: torch.Tensor | None) -> None:
    """Make what a replay does not write recognisable: NaN, and numbers that no count and no id has."""
    if tensor is not None:
        tensor.fill_(torch.nan if tensor.is_floating_point() else -2)


def _observed(one: _Captured) -> Observed:
    kept: dict[str, Any] = {name: None if tensor is None else tensor.clone() for name, tensor in one.kept.items()}
    return Observed(**kept, source_map=None, inputs=one.inputs.clone(), repeated=one.warmed)
