"""``replicated``: every rank has every row, experts are masked, and an all-reduce ends the layer.

Scope: tensor parallelism with expert parallelism and no all-to-all (vLLM 0.33.0 with ``--enable-expert-parallel`` and
one data-parallel rank): a layer's input is the same on every rank of the group, each rank runs the experts it holds on
all of it, and the partial sums are all-reduced. Here tokens start on one rank each, as with the other backends, so that
an all-gather makes the input the same first. What a pass does not prove: that a framework's own all-reduce (a custom
kernel, quick reduce) sums alike; torch.distributed's runs here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from accelerated.allgather import AllGatherOperation, plain_calls
from accelerated.contract import Accumulation, Contract, MaskedSlots, ReceiveLayout, RowOrder, Standing, Support

if TYPE_CHECKING:
    import torch

    from accelerated.interface import Finding, RankContext
    from reference.problem import Problem

#: The only kernel type.
ALL_REDUCE = "all-reduce"


class ReplicatedBackend:
    """Every row everywhere, and every sum; needs nothing but torch.distributed."""

    name = "replicated"
    standin = False
    judged_by = "reference"
    kernel_types: Sequence[str] = (ALL_REDUCE,)

    def support(self, problem: Problem, kernel_type: str) -> Support:
        """Claimed for every plain problem: no size enters the arithmetic."""
        if kernel_type != ALL_REDUCE:
            return Support(Standing.REFUSED, f"unknown kernel type {kernel_type!r}; choose {ALL_REDUCE}")
        return plain_calls(problem)

    def contract(self, problem: Problem, kernel_type: str) -> Contract:
        """Rows ascend by (source rank, token); the sum over ranks rounds to the element type after every addition."""
        return Contract(
            receive_layout=ReceiveLayout.EVERY_ROW,
            row_order=RowOrder.SOURCE,
            masked_slots=MaskedSlots.DROPPED,
            accumulation=Accumulation.ELEMENT,
            combines_weights=False,
            source_map=True,
        )

    def preflight(self, device: str) -> list[Finding]:
        """Nothing can be missing beyond torch."""
        return []

    def open(self, context: RankContext) -> ReplicatedSession:
        """The process group is all there is."""
        return ReplicatedSession(context)


class ReplicatedSession:
    """Builds operations over the default process group."""

    def __init__(self, context: RankContext) -> None:
        self._context = context

    def build(self, problem: Problem, kernel_type: str) -> ReplicatedOperation:
        """Allocate the buffers of one operation.

        Raises:
            ValueError: unknown kernel type, or the problem is for another number of ranks.
        """
        if kernel_type != ALL_REDUCE:
            raise ValueError(f"unknown kernel type {kernel_type!r}; choose {ALL_REDUCE}")
        if problem.world_size != self._context.world_size:
            raise ValueError(f"the problem is for {problem.world_size} ranks, the group has {self._context.world_size}")
        return ReplicatedOperation(self._context, problem)

    def close(self) -> None:
        """The process group belongs to the rank process."""


class ReplicatedOperation(AllGatherOperation):
    """All-gather, then an all-reduce of which each rank takes its own tokens; one collective per call."""

    def __init__(self, context: RankContext, problem: Problem) -> None:
        super().__init__(context, problem)
        self._rank = context.rank

    def _reduced(self, spread: torch.Tensor) -> torch.Tensor:
        import torch.distributed as dist

        dist.all_reduce(spread, group=self._group)
        return spread[self._rank * self._capacity :]
