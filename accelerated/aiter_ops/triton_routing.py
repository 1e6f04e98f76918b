"""AITER's Triton routers behind the interface of routers.

Scope: arguments, and ids and weights read back from what the routers return for a grouped GEMM: a histogram, the pair
of every sorted position, and the position of every pair. Sources: ROCm/aiter e4048607,
aiter/ops/triton/moe/moe_routing/routing.py:271. What a call that returns does not prove: anything about its result.
"""

from __future__ import annotations

import torch

from accelerated.aiter_ops import triton_routing_contract as declared
from accelerated.aiter_ops.triton_moe_library import TritonMoe
from accelerated.operators import RowProblem
from accelerated.routers import RouteResult, form_of


class TritonRouter:
    """One router.

    Args:
        moe: the loaded tree's mixture-of-experts part.
        problem: sizes.
        operator: one of :func:`accelerated.aiter_ops.triton_routing_contract.names`.
        arch: gfx architecture.
    """

    def __init__(self, moe: TritonMoe, problem: RowProblem, operator: str, arch: str) -> None:
        self._moe, self._problem, self._operator = moe, problem, operator
        self._contract = declared.contract(problem, operator, arch)

    def route(self, logits: torch.Tensor, bias: torch.Tensor | None) -> RouteResult:
        """Choose experts.

        Raises:
            ValueError: logits do not fit the problem, or a bias is given or missing against the contract.
        """
        count, experts = logits.shape
        if experts != self._problem.hidden or count > self._problem.capacity or not logits.is_contiguous():
            raise ValueError(
                f"logits have shape {tuple(logits.shape)} and strides {logits.stride()}; give at most "
                f"{self._problem.capacity} contiguous rows of {self._problem.hidden}"
            )
        if self._contract.takes_bias != (bias is not None):
            raise ValueError(f"{self._operator} {'needs' if self._contract.takes_bias else 'takes no'} bias")
        form = form_of(self._operator).numerics
        given = declared.arguments(form) | ({} if bias is None else {"bias": bias})
        with torch.no_grad():
            data, gather, scatter = self._moe.routing.routing(logits, form.top_k, **given)
            return read_back(data.expt_hist, gather, scatter, data.gate_scal, form.top_k)

    def close(self) -> None:
        return None


def read_back(
    counts: torch.Tensor, gather: torch.Tensor, scatter: torch.Tensor, weights: torch.Tensor, top_k: int
) -> RouteResult:
    """Ids from histogram and gather, weights through the scatter: if the two are not inverse, they do not match.

    Args:
        counts: rows of every expert, int32 ``[E]``.
        gather: pair of every sorted position, ``[M k]``.
        scatter: sorted position of every pair, ``[M k]``.
        weights: of every sorted position.
        top_k: k.
    """
    pairs = gather.numel()
    position = torch.arange(pairs, device=gather.device)
    # Beyond the histogram's end a position has expert E, which is none.
    expert = torch.searchsorted(counts.long().cumsum(0), position, right=True, out_int32=True)
    inside = gather.long().clamp(0, max(pairs - 1, 0))
    # Where a row repeats an id the histogram is short, and the gather's end was never written: nothing is read there.
    known = position < counts.sum()
    ids = expert.new_full((pairs + 1,), -1).scatter_(0, torch.where(known, inside, pairs), expert)[:pairs]
    chosen = weights[scatter.long().clamp(0, max(pairs - 1, 0))]
    return RouteResult(chosen.float().view(-1, top_k), ids.view(-1, top_k))
