"""Double of the routing entries of ``aiter.ops.moe_op``.

Scope: AITER e4048607's signatures; results go into the caller's buffers. Not doubled: shared experts' columns in
``topk_softmax``. What the assembled kernels compute is not known from their source, which is none: the double rounds as
``topk_softmax`` does. A pass against it proves nothing about AITER's kernels.
"""

from __future__ import annotations

import torch

from accelerated.standin.aiter_ops import routing_kernels
from accelerated.standin.aiter_ops.routing_buffers import check, fill

Tensor = torch.Tensor

#: k of the assembled kernels by number of experts.
ASSEMBLED = {128: (4, 6, 8), 256: (6, 8), 384: (8,), 640: (8,)}


def topk_softmax(
    topk_weights: Tensor,
    topk_indices: Tensor,
    token_expert_indices: Tensor,
    gating_output: Tensor,
    need_renorm: bool,
    num_shared_experts: int = 0,
    shared_expert_scoring_func: str = "",
) -> None:
    """One kernel for a power of two up to 512 experts, another for all others; also fills the rows' order."""
    del shared_expert_scoring_func
    if num_shared_experts:
        raise NotImplementedError("the double of topk_softmax has no shared experts")
    check(topk_weights, topk_indices, gating_output)
    rows, top_k, experts = len(gating_output), topk_indices.shape[-1], gating_output.shape[-1]
    warp = experts <= 512 and experts & (experts - 1) == 0
    kernel = routing_kernels.warp_softmax if warp else routing_kernels.block_softmax
    fill(topk_weights, topk_indices, kernel(gating_output, top_k, need_renorm))
    order = torch.arange(rows * top_k, dtype=torch.int32, device=gating_output.device).view(top_k, rows).T
    token_expert_indices[:rows, :top_k].copy_(order)


def topk_softmax_asm(
    topk_weights: Tensor,
    topk_indices: Tensor,
    token_expert_indices: Tensor,
    gating_output: Tensor,
    need_renorm: bool,
) -> None:
    """The assembled kernels: float32 and bfloat16 logits of a few sizes, contiguous."""
    del token_expert_indices
    if gating_output.dtype == torch.float16:
        raise RuntimeError("no assembled kernel reads float16 logits")
    check(topk_weights, topk_indices, gating_output)
    top_k, experts = topk_weights.shape[-1], gating_output.shape[-1]
    if top_k not in ASSEMBLED.get(experts, ()):
        raise RuntimeError(f"there is no assembled kernel for {experts} experts and topk {top_k}")
    fill(topk_weights, topk_indices, routing_kernels.ranked_softmax(gating_output, top_k, need_renorm))


def topk_sigmoid(topk_weights: Tensor, topk_indices: Tensor, gating_output: Tensor) -> None:
    """Scores of the tile kernel; for float32 logits and beyond 192 experts it writes nothing, without an error."""
    check(topk_weights, topk_indices, gating_output)
    if gating_output.dtype == torch.float32 or gating_output.shape[1] > 192:
        return
    fill(topk_weights, topk_indices, routing_kernels.tile_sigmoid(gating_output, topk_weights.shape[1]))
