"""Double of ``aiter.fused_moe.fused_topk``: the softmax router that picks its kernel by shape.

Scope: AITER e4048607's signature, choice and buffers, which are padded to four rows for the assembled kernels. A pass
against it proves nothing about AITER.
"""

from __future__ import annotations

import torch

from accelerated.standin.aiter_ops import device
from accelerated.standin.aiter_ops.jit.utils.chip_info import get_gfx
from accelerated.standin.aiter_ops.ops import moe_op


def fused_topk(
    hidden_states: torch.Tensor,
    gating_output: torch.Tensor,
    topk: int,
    renormalize: bool,
    topk_ids: torch.Tensor | None = None,
    topk_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and ids, in this order although the buffers come in the other."""
    rows, experts = gating_output.shape
    assert hidden_states.shape[0] == rows, f"{hidden_states.shape[0]} hidden states for {rows} rows of logits"
    assembled = get_gfx() in ("gfx942", "gfx950") and topk in moe_op.ASSEMBLED.get(experts, ())
    assembled = assembled and gating_output.dtype != torch.float16 and gating_output.is_contiguous()
    shape = (-(-rows // 4) * 4 if assembled else rows, topk)
    weights = device.empty(shape, torch.float32, gating_output.device) if topk_weights is None else topk_weights
    ids = device.empty(shape, torch.int32, gating_output.device) if topk_ids is None else topk_ids
    order = device.empty((rows, topk), torch.int32, gating_output.device)
    entry = moe_op.topk_softmax_asm if assembled else moe_op.topk_softmax
    entry(weights, ids, order, gating_output, renormalize)
    return (weights[:rows], ids[:rows]) if assembled else (weights, ids)
