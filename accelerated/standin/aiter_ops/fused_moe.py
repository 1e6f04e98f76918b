"""Double of ``aiter.fused_moe``: the experts of one rank, and the sort of tokens by expert.

Scope: AITER e4048607's signatures, its choice of kernels without a tuned row, their numerics and their traps: rows from
the device's row count on are uninitialised, additions are atomic in an order that changes, a mask of anything but 0 and
1 gives wrong experts, and the mark ``is_shuffled`` decides how FP4 weights are read. Not doubled: int4, int8, scales
per tensor, MXFP8 weights, Situv2, experts without an up half, fused shared experts, gfx1250. A pass against it proves
nothing about AITER's kernels.
"""

from __future__ import annotations

from typing import Any

import torch

from accelerated.standin.aiter_ops import device, experts_kernels, experts_plan, experts_rows, routing_softmax, sorting
from accelerated.standin.aiter_ops.experts_weights import Weights
from accelerated.standin.aiter_ops.ops.enum import ActivationType, QuantType
from accelerated.standin.aiter_ops.ops.flydsl.moe_common import GateMode
from accelerated.standin.aiter_ops.utility import dtypes

BLOCK_SIZE_M = 32


def get_padded_M(M: int) -> int:
    """Number of rows that the choice of kernels sees (fused_moe.py:1340)."""
    return experts_plan.padded_rows(M)


fused_topk = routing_softmax.fused_topk


def get_inter_dim(w1_shape: tuple[int, ...], w2_shape: tuple[int, ...]) -> tuple[int, int, int]:
    """E, H and I of the weights' shapes, of which packed ones are narrower than they seem."""
    experts, hidden, inner = w2_shape
    return experts, hidden, inner * (hidden // w1_shape[-1])


def fused_moe(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weight: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_mask: torch.Tensor | None = None,
    activation: Any = ActivationType.Silu,
    quant_type: Any = QuantType.No,
    doweight_stage1: bool = False,
    w1_scale: torch.Tensor | None = None,
    w2_scale: torch.Tensor | None = None,
    a1_scale: torch.Tensor | None = None,
    a2_scale: torch.Tensor | None = None,
    block_size_M: int | None = None,
    num_local_tokens: torch.Tensor | None = None,
    moe_sorting_dispatch_policy: int = 0,
    dtype: torch.dtype | None = None,
    hidden_pad: int = 0,
    intermediate_pad: int = 0,
    bias1: torch.Tensor | None = None,
    bias2: torch.Tensor | None = None,
    splitk: int = 0,
    swiglu_limit: float | None = None,
    beta: float | None = None,
    linear_beta: float | None = None,
    gate_mode: str | None = GateMode.SEPARATED.value,
    shared_w1: torch.Tensor | None = None,
    shared_w2: torch.Tensor | None = None,
    shared_w1_scale: torch.Tensor | None = None,
    shared_w2_scale: torch.Tensor | None = None,
    shared_expert_id: int = -1,
    stage2_scatter: object = None,
) -> torch.Tensor:
    """Weighted sum over the local experts of each row, fresh ``[M, H]`` (fused_moe.py:458).

    Args:
        hidden_states: ``[M, H]`` bfloat16 or float16, or codes with ``a1_scale``.
        w1: ``[E, 2 I, H]`` in the kernels' layout, gate before up; FP4 two elements per byte.
        w2: ``[E, H, I]``, likewise.
        topk_weight: ``[M, k]`` float32.
        topk_ids: ``[M, k]`` int32 ids; local ones without ``expert_mask``, else global.
        expert_mask: int32 0 or 1 per global id, of as many ones as there are local experts.
        quant_type: No, per_Token, per_128x128 (taken for per_1x128) or per_1x32.
        doweight_stage1: the routing weight multiplies ``W1 x``, before the activation.
        num_local_tokens: int32 on the device; its first element is the number of rows that count.
        dtype: of the result; that of ``hidden_states`` if None.
        bias1, bias2: float32, of the per_1x32 kernels that have them; ignored by the others.
        swiglu_limit: of the FlyDSL kernels; ignored by the others.

    Raises:
        AssertionError: weights whose shapes do not fit, a result that is neither bfloat16 nor float16, codes without
            scales.
        TypeError: a bias that is not float32, where it is not ignored.
        ValueError: scales for rows that are yet to be quantised.
        RuntimeError: no kernel for these types.
        NotImplementedError: AITER has a kernel, the double has none.
    """
    del block_size_M, moe_sorting_dispatch_policy, splitk, beta, linear_beta
    shared = (shared_w1, shared_w2, shared_w1_scale, shared_w2_scale)
    if any(tensor is not None for tensor in shared) or shared_expert_id != -1 or stage2_scatter is not None:
        raise NotImplementedError("the double fuses neither shared experts nor the combine")
    _ = activation.value, quant_type.value  # members of the enumerations only
    rows, k = topk_ids.shape
    experts, hidden, inner = get_inter_dim(tuple(w1.shape), tuple(w2.shape))
    assert w1.shape[1] in (inner, 2 * inner), f"w1 {list(w1.shape)} has neither I nor 2 I rows, I = {inner}"
    if w1.shape[1] == inner:
        raise NotImplementedError("the double has experts with gate and up only")
    dtype = dtype or hidden_states.dtype
    assert dtype in (dtypes.fp16, dtypes.bf16), f"the result is bfloat16 or float16, not {dtype}; give dtype"
    if quant_type == QuantType.per_128x128:
        quant_type = QuantType.per_1x128
    marks = (bool(getattr(w1, "is_shuffled", False)), bool(getattr(w2, "is_shuffled", False)))
    call = experts_plan.Call(
        rows,
        k,
        hidden,
        inner,
        experts,
        experts if expert_mask is None else expert_mask.numel(),
        expert_mask is not None,
        dtype,
        w1.dtype,
        activation,
        quant_type,
        doweight_stage1,
        GateMode(gate_mode),
        marks,
    )
    wanted = experts_plan.row_type(call, hidden_states.dtype, a1_scale is not None)
    plan = experts_plan.choose(call, wanted, swiglu_limit)
    if topk_weight.dtype != torch.float32:
        raise RuntimeError(f"the sort wants float32 routing weights, not {topk_weight.dtype}")
    if topk_ids.dtype != torch.int32:
        # The sort has a kernel for int32 only and says nothing: neither routes nor zeros are written.
        return device.empty((rows, hidden), dtype, hidden_states.device)
    weights = Weights(
        w1,
        w2,
        w1_scale,
        w2_scale,
        _bias(bias1, plan.biased),
        _bias(bias2, plan.biased),
        quant_type,
        plan,
        not doweight_stage1,
        experts_plan.skipped(plan, (hidden_pad, intermediate_pad), (bias1 is not None, bias2 is not None)),
    )
    valid = experts_kernels.valid_rows(num_local_tokens, rows)
    seen = valid if isinstance(valid, int) else rows
    if rows and not seen:
        return device.empty((rows, hidden), dtype, hidden_states.device)
    scale = a1_scale[:seen] if a1_scale is not None and a1_scale.dim() else a1_scale
    entering = experts_rows.entering(hidden_states[:seen], quant_type, wanted, scale, plan, dtype)
    found = experts_kernels.routes(
        topk_ids[:seen],
        topk_weight[:seen],
        expert_mask,
        call.experts,
        experts,
    )
    if plan.drops_zeros:
        found.counts &= found.weights != 0
    if plan.absent:
        found.counts.zero_()
        found.garbage.zero_()
    stage = experts_rows.between(weights, activation, quant_type, plan, dtype, doweight_stage1)
    parts = experts_kernels.terms(entering, found, weights, stage, dtype)
    total = experts_kernels.reduced_sum(parts) if plan.reduce else experts_kernels.atomic_sum(parts)
    return experts_kernels.leave_rest(total, rows, valid)


def moe_sorting(
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    num_experts: int,
    model_dim: int,
    moebuf_dtype: torch.dtype,
    block_size: int = BLOCK_SIZE_M,
    expert_mask: torch.Tensor | None = None,
    num_local_tokens: torch.Tensor | None = None,
    dispatch_policy: int = 0,
    return_local_topk_ids: bool = False,
    accumulate: bool = True,
    flat: bool = False,
    output_aux: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Tokens by local expert in blocks of ``block_size`` (fused_moe.py:341).

    Of ``P = M k + num_experts block_size - k`` places the first ``num_valid_ids[0]`` are written: each has
    ``token | slot << 24`` with its weight, tokens ascending within an expert, or ``n | k << 24`` with weight 0 as
    padding, where n is the number of rows that count. Everything behind is uninitialised.

    Returns:
        ``sorted_ids [P]`` int32, ``sorted_weights [P]`` float32, ``sorted_expert_ids`` int32 local ids per block,
        ``num_valid_ids [2]`` int32 (places written, n), ``moe_buf [M, model_dim]`` of zeros in the first n rows (or
        ``[0, 0]`` with neither ``accumulate`` nor a mask), and on request local ids ``[M, k]``, -1 where remote.

    Raises:
        RuntimeError: weights are not float32.
        NotImplementedError: ``output_aux``.
    """
    del dispatch_policy
    if flat:
        buffer = device.empty((topk_ids.shape[0], model_dim), moebuf_dtype, topk_ids.device)
        ids = topk_ids.to(torch.int32).contiguous()
        return ids, topk_weights.to(torch.float32).contiguous(), ids, ids, buffer
    if output_aux:
        raise NotImplementedError("the double has no sort for the ports of tuned FP4 kernels")
    return sorting.sort(
        topk_ids,
        topk_weights,
        num_experts,
        model_dim,
        moebuf_dtype,
        int(block_size),
        expert_mask,
        num_local_tokens,
        local_ids=return_local_topk_ids,
        buffer=accumulate,
    )


def _bias(bias: torch.Tensor | None, used: bool) -> torch.Tensor | None:
    """A bias of the kernels that have one."""
    if bias is None or not used:
        return None
    if bias.dtype != torch.float32:
        raise TypeError(f"biases are float32, this one is {bias.dtype}")
    return bias
