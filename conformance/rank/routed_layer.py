"""The program of a layer with its router: route, quantise, dispatch, experts, combine.

A round hands logits to the router, its ids and weights to the layer; nothing between the two waits for the device, and
logical ids become physical ones by a table that was made before. Ids and weights are copied as they came back. After
the last round the router is judged like any router; then the layer, given exactly the ids and weights that it was
handed, by the dense oracle: that needs no other rank, so that one whose router failed keeps nobody waiting. A router's
malformed result is not dispatched, but the drawn routing in its place. What a pass does not prove: that the router
chooses well on other logits than these, which :mod:`conformance.rank.routed_inputs` describes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from accelerated.experts import LayerContract, LayerOperation
from accelerated.interface import RankContext
from accelerated.routers import RouteContract, RouteOperation, RouteResult
from conformance.cases import LayerCase, LayerCell, Rows
from conformance.engine.protocol import Mismatch
from conformance.rank.guard import backend_code
from conformance.rank.guarded_routers import GuardedRouter
from conformance.rank.inputs import Inputs
from conformance.rank.judge import same_bits
from conformance.rank.judge_routes import judge_route, judge_route_by_oracle, layout
from conformance.rank.judge_rows import Answered
from conformance.rank.layer_program import LayerProgram
from conformance.rank.routed_inputs import bias_of, logits_of
from reference.intervals import Interval


@dataclass(frozen=True)
class Router:
    """A cell's router: its operation, guarded, what it declares, and what judges it."""

    operation: RouteOperation
    contract: RouteContract
    judged_by: str


@dataclass
class _Round:
    """One round of the router.

    Attributes:
        logits: ``[n, L]`` as handed.
        pristine: the same, kept.
        physical: ``[n, L]`` physical id of every logical expert, for each token.
        bias: ``[L]`` as handed; None where it takes none.
        result: what the router returned, or None where it was not called.
        chosen: copies of it, made before anything else.
        given: ids and weights as the layer got them.
        kept: copies of these, made before.
        malformed: why the drawn routing was dispatched instead.
    """

    logits: torch.Tensor
    pristine: torch.Tensor
    physical: torch.Tensor
    bias: torch.Tensor | None = None
    result: RouteResult | None = None
    chosen: RouteResult | None = None
    given: tuple[torch.Tensor, torch.Tensor] | None = None
    kept: tuple[torch.Tensor, torch.Tensor] | None = None
    malformed: Mismatch | None = None


def built_router(session: Any, made: Any, cell: LayerCell) -> Router | None:
    """The router of a cell, or None where it has none.

    Args:
        session: an open session of ``made``.
        made: a composed backend.
        cell: of a layer.

    Raises:
        BackendError: the experts' half refuses the router.
    """
    if not cell.router:
        return None
    problem = cell.route_problem()
    with backend_code():
        contract = made.route_contract(problem, cell.router)
        operation = GuardedRouter(session.build(problem, cell.router))
    return Router(operation, contract, made.experts.judged_by)


def program_of(
    context: RankContext,
    operation: LayerOperation,
    contract: LayerContract,
    judged_by: str,
    cell: LayerCell,
    router: Router | None,
) -> LayerProgram:
    """The program of a layer's cell."""
    if router is None:
        return LayerProgram(context, operation, contract, judged_by, cell)
    return RoutedLayerProgram(context, operation, contract, judged_by, cell, router)


class RoutedLayerProgram(LayerProgram):
    """One cell's layer, router, contracts and weights, ready to run cases."""

    def __init__(
        self,
        context: RankContext,
        operation: LayerOperation,
        contract: LayerContract,
        judged_by: str,
        cell: LayerCell,
        router: Router,
    ) -> None:
        super().__init__(context, operation, contract, judged_by, cell)
        self._router = router
        self._bias = bias_of(cell, router.contract, context.device)
        self._rounds: list[_Round] = []
        self._drawn: list[Inputs] = []

    def _before(
        self,
        case: LayerCase,
        inputs: list[Inputs],
        handed: list[Inputs],
        routings: list[Rows],
        placed: Sequence[tuple[int, ...]],
    ) -> list[Interval]:
        """Logits and tables; what is expected follows from what the router will have chosen."""
        device, rank = self._context.device, self._context.rank
        self._drawn, self._rounds = inputs, []
        for index, (one, where) in enumerate(zip(inputs, placed, strict=True)):
            logits = logits_of(case, index, rank, routings[index], device)
            every = torch.arange(self._cell.logical, dtype=torch.int32, device=device).expand(len(logits), -1)
            table = self._wired(Inputs(one.rows, every, one.weights), where).ids
            self._rounds.append(_Round(logits, logits.clone(), table))
        return []

    # ------------------------------------------------------------------ the backend
    def _forward(self, index: int, inputs: Inputs) -> torch.Tensor:
        ids, weights = self._routed(index, inputs)
        self._rounds[index].given = ids, weights
        self._rounds[index].kept = ids.clone(), weights.clone(memory_format=torch.contiguous_format)
        return self._operation.forward(inputs.rows, ids, weights)

    def _routed(self, index: int, drawn: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids as they are dispatched, and weights as they came back: no copy hides how they lie in memory."""
        one, contract = self._rounds[index], self._router.contract
        count = len(one.logits)
        if count == 0 and not contract.takes_empty:
            return drawn.ids, drawn.weights
        one.bias = None if self._bias is None else self._bias.clone()
        result = self._router.operation.route(one.logits, one.bias)
        one.malformed = layout(index, one.logits, result, contract.numerics(count))
        if one.malformed is not None:
            return drawn.ids, drawn.weights
        one.chosen = RouteResult(result.weights.clone(memory_format=torch.contiguous_format), result.ids.clone())
        one.result = result
        # An id that names no expert would be written out of bounds; the judge sees it in the copy.
        named = result.ids.long().clamp(0, self._cell.logical - 1)
        return one.physical.gather(1, named), result.weights

    # ------------------------------------------------------------------ judging
    def _judge(
        self,
        seen: list[torch.Tensor],
        handed: list[Inputs],
        pristine: list[Inputs],
        expected: list[Interval],
        routings: list[Rows],
    ) -> tuple[Mismatch | None, float]:
        worst = 0.0
        for index, one in enumerate(self._rounds):
            mismatch, ratio = self._judge_router(index, one)
            worst = max(worst, ratio)
            if mismatch is not None:
                mismatch.source_rank = self._context.rank
                return mismatch, worst
        given, kept, chosen = [], [], []
        for index, one in enumerate(self._rounds):
            assert one.given is not None
            assert one.kept is not None
            given.append(Inputs(handed[index].rows, *one.given))
            kept.append(Inputs(pristine[index].rows, *one.kept))
            ids = self._drawn[index].ids if one.chosen is None else one.chosen.ids
            chosen.append(tuple(map(tuple, ids.tolist())))
        accepted = [
            self._of_oracle(Inputs(k.rows, k.ids, k.weights), k, rows) for k, rows in zip(kept, chosen, strict=True)
        ]
        mine = [self._with_mine(routing, rows) for routing, rows in zip(routings, chosen, strict=True)]
        mismatch, ratio = super()._judge(seen, given, kept, accepted, mine)
        return mismatch or self._overwritten(), max(worst, ratio)

    def _overwritten(self) -> Mismatch | None:
        """Results of the router that a later call changed; last, since it may explain nothing."""
        for index, one in enumerate(self._rounds):
            for name in ("ids", "weights") if one.result is not None else ():
                if not same_bits(getattr(one.result, name).contiguous(), getattr(one.chosen, name)):
                    return Mismatch("outputs.overwritten", index, f"a later call changed the router's {name}")
        return None

    def _with_mine(self, routing: Rows, rows: tuple[tuple[int, ...], ...]) -> Rows:
        """Routing with the rows of this rank as its router chose them."""
        return tuple(rows if rank == self._context.rank else other for rank, other in enumerate(routing))

    def _judge_router(self, index: int, one: _Round) -> tuple[Mismatch | None, float]:
        if one.malformed is not None:
            return one.malformed, 0.0
        if not same_bits(one.logits, one.pristine):
            return Mismatch("inputs.modified", index, "the backend changed its input logits"), 0.0
        if one.chosen is None:
            return None, 0.0
        if self._bias is not None and (one.bias is None or not same_bits(one.bias[None], self._bias[None])):
            return Mismatch("inputs.modified", index, "the backend changed its input bias"), 0.0
        bias = torch.empty(0) if self._bias is None else self._bias
        answered = Answered(one.pristine.unsqueeze(0), None, bias, 0.0, 1.0, -1, one.chosen)
        judge = judge_route_by_oracle if self._router.judged_by == "oracle" else judge_route
        return judge(index, answered, self._router.contract)
