"""Operators whose sums come back wrong.

Scope: subclasses of the double's operator with one defect each in combine; their dispatch is right. They prove nothing
about the order of additions on a device.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from accelerated.standin.mori_ep.ops import EpDispatchCombineOp
from accelerated.standin.mori_ep.wire import Plan


class SwappedRows(EpDispatchCombineOp):
    """The answers to the first two tokens that went to the same other rank come back in each other's place."""

    def _lookup(self, ids: torch.Tensor, owners: torch.Tensor, plan: Plan) -> torch.Tensor:
        target = plan.target.clone()
        for rank in range(self.config.world_size):
            sent = (target[:, rank] != plan.nothing).nonzero().flatten()[:2]
            if rank != self._rank and len(sent) == 2:
                target[sent, rank] = target[sent.flip(0), rank]
        return super()._lookup(ids, owners, replace(plan, target=target))


class WeightTwice(EpDispatchCombineOp):
    """Combine multiplies every expert row by its routing weights, which the experts applied already."""

    def _contributions(self, rows: torch.Tensor, weights: torch.Tensor | None, shifted: bool) -> torch.Tensor:
        ids, own = self._buffers.ids[: rows.size(0)], self._buffers.weights[: rows.size(0)]
        mine = torch.div(ids, self.config.num_experts_per_rank, rounding_mode="floor") == self._rank
        scale = torch.where(mine, own, 0.0).sum(1, keepdim=True)
        return super()._contributions((rows.float() * scale).to(rows.dtype), weights, shifted)


class NodePartialLost(EpDispatchCombineOp):
    """Of a token with partial sums from several nodes, the last node's is lost."""

    def _fold(self, terms: torch.Tensor, indices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if self._node_levels:
            nodes = self._routing.nodes
            node = (self._current().owners // self.config.gpu_per_node).t()  # the owner of nothing is on no node
            last = torch.where(node < nodes, node, -1).amax(0)
            lost = (node == last) & (node.amin(0) < last)
            terms = terms.masked_fill(lost.unsqueeze(2), 0.0)
        return super()._fold(terms, indices, dtype)
