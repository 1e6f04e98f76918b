"""The specification itself as a backend: it is driven like any other and judged by the oracle, not by itself.

What a pass does not prove: anything about an accelerated library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from accelerated import reference_experts, reference_routers, reference_rows
from accelerated.contract import Contract, MaskedSlots, ReceiveLayout, RowOrder, Standing, Support
from accelerated.experts import ExpertContract, ExpertProblem
from accelerated.operators import Family, NormContract, QuantContract, RowProblem

if TYPE_CHECKING:
    import torch

    from accelerated.interface import Combined, Finding, RankContext, Received
    from accelerated.routers import RouteContract
    from reference.dispatch_combine import Route
    from reference.problem import Problem

#: Rounding structures the specification offers: one level, or one per node and one over nodes.
ONE_LEVEL, NODE_LEVELS = "one-level", "node-levels"


class ReferenceBackend:
    """``reference``: :mod:`reference.dispatch_combine` behind the backend interface."""

    name = "reference"
    standin = False
    judged_by = "oracle"
    kernel_types: Sequence[str] = (ONE_LEVEL, NODE_LEVELS)

    operators: Mapping[str, Sequence[str]] = {
        **reference_rows.OPERATORS,
        Family.EXPERTS.value: reference_experts.OPERATORS,
    }
    compiled_operators = ("rms_norm_add", "split")

    def support(self, problem: Problem | RowProblem | ExpertProblem, kernel_type: str) -> Support:
        if isinstance(problem, ExpertProblem):
            return reference_experts.support(problem, kernel_type)
        if isinstance(problem, RowProblem):
            return reference_rows.support(problem, kernel_type)
        if kernel_type == ONE_LEVEL and problem.nodes > 1:
            return Support(Standing.REFUSED, "one rounding level has no nodes; use node-levels")
        if problem.codec:
            return Support(Standing.REFUSED, f"{problem.codec}: the oracle, which judges this backend, has no codecs")
        if capped := [mode for mode in problem.modes if mode.startswith("capped")]:
            return Support(Standing.REFUSED, f"{capped[0]}: received rows have the memory they need; there is no cap")
        return Support(Standing.CLAIMED)

    def contract(
        self, problem: Problem | RowProblem | ExpertProblem, kernel_type: str
    ) -> Contract | QuantContract | NormContract | RouteContract | ExpertContract:
        if isinstance(problem, ExpertProblem):
            return reference_experts.contract(problem, kernel_type)
        if isinstance(problem, RowProblem):
            return reference_rows.contract(problem, kernel_type)
        return Contract(
            receive_layout=ReceiveLayout.DENSE_ROWS,
            row_order=RowOrder.SOURCE,
            masked_slots=MaskedSlots.DROPPED,
            node_levels=kernel_type == NODE_LEVELS and problem.nodes > 1,
            combines_weights="weightless" not in problem.modes,
            exact_rows=True,
            narrow_rows=True,
            fresh_outputs=True,
            handles_kept=True,
            captures=frozenset({"contents"} if "handle" in problem.modes else ()),
            capture_refusal="dispatch reads the row counts on the host; capture the replay of a routing handle",
        )

    def preflight(self, device: str) -> list[Finding]:
        return []

    def open(self, context: RankContext) -> ReferenceSession:
        return ReferenceSession(context)


class ReferenceSession:
    """Nothing to initialise beyond the process group."""

    def __init__(self, context: RankContext) -> None:
        self._context = context

    def build(
        self, problem: Problem | RowProblem | ExpertProblem, kernel_type: str
    ) -> (
        ReferenceOperation
        | reference_rows.ReferenceQuantiser
        | reference_rows.ReferenceNorm
        | reference_routers.ReferenceRouter
        | reference_experts.ReferenceExperts
    ):
        if isinstance(problem, ExpertProblem):
            return reference_experts.ReferenceExperts(problem, kernel_type)
        if isinstance(problem, RowProblem):
            return reference_rows.build(self._context, problem, kernel_type)
        return ReferenceOperation(self._context, problem, problem.nodes if kernel_type == NODE_LEVELS else 1)

    def close(self) -> None:
        return None


class ReferenceOperation:
    """prepare = dispatch, finalize = combine; 3 collectives per round."""

    def __init__(self, context: RankContext, problem: Problem, nodes: int) -> None:
        self._group, self._rank = context.group, context.rank
        self._problem = problem
        self._experts_per_rank = problem.experts_per_rank
        self._nodes = nodes

    def prepare(
        self, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor | None = None
    ) -> Received:
        return self._dispatch(rows, ids, weights, scales, None)

    def _dispatch(
        self,
        rows: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        scales: torch.Tensor | None,
        route: Route | None,
    ) -> Received:
        """A dispatch, along the route of one before if it is given."""
        import torch

        from accelerated import wires
        from accelerated.interface import Received
        from reference.dispatch_combine import dispatch

        wires.check(self._problem, rows, scales, narrow=True)
        modes = self._problem.modes
        weights = torch.zeros_like(weights) if "weightless" in modes else weights
        per_rank = self._experts_per_rank
        sent = dispatch(rows, ids, weights, scales, experts_per_rank=per_rank, group=self._group, route=route)
        buffer, hidden = None, wires.elements(self._problem, rows)
        if "zero-copy" in modes:
            dtype = getattr(torch, self._problem.dtype)
            buffer = torch.empty(sent.rows.shape[0], hidden, dtype=dtype, device=rows.device)

        def replay(again: torch.Tensor, weights_: torch.Tensor | None, scales_: torch.Tensor | None) -> Received:
            given = torch.zeros_like(weights) if weights_ is None else weights_
            return self._dispatch(again, ids, given, scales_, sent)

        return Received(
            rows=sent.rows,
            ids=sent.ids,
            weights=sent.weights,
            count=torch.full((1,), sent.rows.shape[0], dtype=torch.int32, device=rows.device),
            source_map=lambda: torch.stack([sent.source_rank, sent.source_token], dim=1),
            state=sent,
            scales=sent.scales,
            expert_count=self._counted(sent.ids) if "expert count" in modes else None,
            buffer=buffer,
            replay=replay if "handle" in modes else None,
        )

    def _counted(self, ids: torch.Tensor) -> torch.Tensor:
        """Received slots of each local expert, ``[experts per rank]`` int32."""
        import torch

        local = ids.long() - self._rank * self._experts_per_rank
        local = local[(local >= 0) & (local < self._experts_per_rank)]
        return torch.bincount(local, minlength=self._experts_per_rank).to(torch.int32)

    def finalize(self, expert_rows: torch.Tensor, received: Received) -> Combined:
        from accelerated.interface import Combined
        from reference.dispatch_combine import Dispatched, combine

        sent = received.state
        assert isinstance(sent, Dispatched)
        weights = None if "weightless" in self._problem.modes else received.weights
        result = combine(expert_rows, sent, weights, nodes=self._nodes, group=self._group)
        return Combined(result.output, result.weights)

    def close(self) -> None:
        return None
