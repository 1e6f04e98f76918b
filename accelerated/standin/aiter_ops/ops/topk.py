"""Double of the routing entries of ``aiter.ops.topk``.

Scope: AITER e4048607's signatures, checks and choice of kernels; results go into the caller's buffers. Not doubled:
shared experts in ``moe_fused_gate``, the entries for rows of lengths. A pass against it proves nothing about AITER.
"""

from __future__ import annotations

import torch

from accelerated.standin.aiter_ops import gating_kernels, routing_kernels
from accelerated.standin.aiter_ops.jit.utils.chip_info import get_cu_num
from accelerated.standin.aiter_ops.routing_buffers import as_logits, check, fill
from accelerated.standin.aiter_ops.routing_lanes import wave_size

_SCORES = ("sqrtsoftplus", "sigmoid", "softmax")
#: Rows per compute unit up to which the grouped kernel is taken.
_ROWS_PER_CU = 212


def topk_gating(
    topk_weights: torch.Tensor,
    topk_indices: torch.Tensor,
    gating_output: torch.Tensor,
    correction_bias: torch.Tensor | None = None,
    need_renorm: bool = True,
    routed_scaling_factor: float = 1.0,
    score_func: str = "sqrtsoftplus",
) -> None:
    """Scores by name, a bias for the choice alone; rows of logits must follow one another."""
    assert score_func in _SCORES, f"no score is called {score_func!r}; there are {', '.join(_SCORES)}"
    if correction_bias is not None:
        half = gating_output.dtype is torch.float16
        allowed = (torch.float32,) if half else (torch.float32, torch.bfloat16)
        assert correction_bias.dtype in allowed, f"{gating_output.dtype} logits go with no {correction_bias.dtype} bias"
    check(topk_weights, topk_indices, gating_output)
    top_k = topk_indices.shape[1]
    if top_k > min(wave_size(), gating_output.shape[1]):
        raise RuntimeError(f"{top_k} of {gating_output.shape[1]} experts cannot be chosen by {wave_size()} lanes")
    fill(
        topk_weights,
        topk_indices,
        gating_kernels.gating(
            gating_output, correction_bias, top_k, need_renorm, _float32(routed_scaling_factor), score_func
        ),
    )


topk_softplus = topk_gating


def grouped_topk(
    gating_output: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    num_expert_group: int,
    topk_group: int,
    need_renorm: bool,
    is_softmax: bool = True,
    routed_scaling_factor: float = 1.0,
) -> None:
    """Groups are ranked by their largest score."""
    _check_groups(gating_output, num_expert_group, topk_group)
    check(topk_weights, topk_ids, gating_output)
    sizes = (num_expert_group, topk_group, topk_ids.shape[1])
    scale = _float32(routed_scaling_factor)
    fill(
        topk_weights,
        topk_ids,
        routing_kernels.grouped(gating_output, None, *sizes, need_renorm, is_softmax, scale),
    )


def biased_grouped_topk_hip(
    gating_output: torch.Tensor,
    correction_bias: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    num_expert_group: int,
    topk_grp: int,
    need_renorm: bool,
    routed_scaling_factor: float = 1.0,
) -> None:
    """Groups are ranked by their two largest choices; the bias is read as the logits' element type."""
    _check_groups(gating_output, num_expert_group, topk_grp)
    check(topk_weights, topk_ids, gating_output)
    bias, scale = as_logits(correction_bias, gating_output), _float32(routed_scaling_factor)
    sizes = (num_expert_group, topk_grp, topk_ids.shape[1])
    if (gating_output.shape[1], *sizes) == (256, 8, 4, 8) and wave_size() == 64:
        fill(topk_weights, topk_ids, routing_kernels.sorted_groups(gating_output, bias, need_renorm, scale))
    else:
        result = routing_kernels.grouped(gating_output, bias, *sizes, need_renorm, False, scale)
        fill(topk_weights, topk_ids, result)


def moe_fused_gate(
    input: torch.Tensor,
    bias: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    num_expert_group: int,
    topk_group: int,
    topk: int,
    n_share_experts_fusion: int,
    routed_scaling_factor: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights that add up to one, whatever the factor is."""
    del routed_scaling_factor
    if n_share_experts_fusion:
        raise NotImplementedError("the double of moe_fused_gate has no shared experts")
    if input.shape[1] // num_expert_group > 32:
        raise RuntimeError("moe_fused_gate holds at most 32 experts per group")
    check(topk_weights, topk_ids, input)
    result = routing_kernels.fused_gate(input, as_logits(bias, input), num_expert_group, topk_group, topk)
    fill(topk_weights, topk_ids, result)
    return topk_weights, topk_ids


def biased_grouped_topk(
    gating_output: torch.Tensor,
    correction_bias: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    num_expert_group: int,
    topk_group: int,
    need_renorm: bool,
    routed_scaling_factor: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The grouped kernel, or for many rows of small groups ``moe_fused_gate``."""
    rows, experts = gating_output.shape
    groups = (num_expert_group, topk_group)
    if rows <= get_cu_num() * _ROWS_PER_CU or experts // num_expert_group > 32:
        biased_grouped_topk_hip(
            gating_output, correction_bias, topk_weights, topk_ids, *groups, need_renorm, routed_scaling_factor
        )
        return None
    assert need_renorm, "moe_fused_gate always renormalises"
    return moe_fused_gate(
        gating_output,
        correction_bias,
        topk_weights,
        topk_ids,
        *groups,
        topk_ids.shape[1],
        n_share_experts_fusion=0,
        routed_scaling_factor=routed_scaling_factor,
    )


def _check_groups(logits: torch.Tensor, groups: int, kept: int) -> None:
    if logits.stride(1) != 1:
        raise RuntimeError("a row of logits must be contiguous")
    if not 1 <= kept <= groups:
        raise RuntimeError(f"{kept} of {groups} groups are to be kept")
    if groups not in (1, 2, 4, 8):
        raise RuntimeError(f"no kernel has {groups} groups")


def _float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))
