"""``replicated``: every rank has every row, experts are masked, and an all-reduce ends the layer.

Scope: tensor parallelism with expert parallelism and no all-to-all (vLLM 0.33.0 with ``--enable-expert-parallel`` and
one data-parallel rank): a layer's input is the same on every rank of the group, each rank runs the experts it holds on
all of it, and the partial sums are all-reduced. Here tokens start on one rank each, as with the other backends, so that
an all-gather makes the input the same first. What a pass does not prove: that a framework's own all-reduce (a custom
kernel, quick reduce) sums alike; torch.distributed's runs here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from accelerated.allgather import AllGatherBackend, AllGatherOperation

if TYPE_CHECKING:
    import torch

    from accelerated.interface import RankContext
    from reference.problem import Problem

#: The only kernel type.
ALL_REDUCE = "all-reduce"


class ReplicatedOperation(AllGatherOperation):
    """All-gather, then an all-reduce of which each rank takes its own tokens; one collective per call."""

    def __init__(self, context: RankContext, problem: Problem) -> None:
        super().__init__(context, problem)
        self._rank = context.rank

    def _reduced(self, spread: torch.Tensor) -> torch.Tensor:
        import torch.distributed as dist

        dist.all_reduce(spread, group=self._group)
        return spread[self._rank * self._capacity :]


class ReplicatedBackend(AllGatherBackend):
    """Every row everywhere, and every sum; claims and declares what the all-gather does."""

    name = "replicated"
    kernel_types = (ALL_REDUCE,)
    operation = ReplicatedOperation
