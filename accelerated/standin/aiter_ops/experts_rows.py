"""Rows on their way through AITER's MoE kernels: quantised or given, activated, rounded and quantised again.

Scope: aiter/fused_moe.py:1107-1165, 3080-3160, 3270-3340 of AITER e4048607; the quantisers are the double's own. All
results are dequantised float32. The fused assembly kernels are binaries: their requantisation in float32 is taken to be
that of the separate kernels. A pass proves nothing about AITER's kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from accelerated.standin.aiter_ops import device, kernels, mx
from accelerated.standin.aiter_ops.experts_plan import Plan
from accelerated.standin.aiter_ops.experts_weights import Weights, as_floats, fp4_values
from accelerated.standin.aiter_ops.ops import quant
from accelerated.standin.aiter_ops.ops.enum import ActivationType, QuantType
from accelerated.standin.aiter_ops.utility import dtypes

#: Slope of the sigmoid in Swiglu.
_ALPHA = 1.702


def entering(
    rows: torch.Tensor, kind: Any, wanted: torch.dtype, scale: torch.Tensor | None, plan: Plan, dtype: torch.dtype
) -> torch.Tensor:
    """Float32 ``[n, H]`` of the caller's rows, quantised here or before.

    Raises:
        AssertionError: codes without scales.
        ValueError: scales for rows that are yet to be quantised per token.
    """
    if kind == QuantType.per_1x32:
        if plan.rows is None:
            return rows.to(dtype).float()
        if rows.dtype == dtypes.fp4x2 and wanted == dtypes.fp4x2 and scale is not None:
            return decoded(rows, _given(scale, rows.shape[0], rows.shape[1] * 2 // 32, one_byte=True))
        return _mx(rows, wanted)
    if rows.dtype != wanted or plan.tkw1:
        if kind == QuantType.No:
            raise RuntimeError(f"no kernel: rows of {rows.dtype} and weights of {wanted}")
        scale = None if plan.tkw1 else scale
        return decoded(*quant.get_hip_quant(kind)(rows, scale=scale, quant_dtype=wanted))
    if kind == QuantType.No:
        return rows.float()
    assert scale is not None, "rows that are codes already come with a1_scale"
    groups = 1 if kind == QuantType.per_Token else -(-rows.shape[1] // 128)
    return decoded(rows, _given(scale, rows.shape[0], groups, one_byte=False))


def between(
    weights: Weights, activation: Any, kind: Any, plan: Plan, dtype: torch.dtype, early: bool
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """What happens between the GEMMs of some experts: ``[G, C, 2 I]`` to ``[G, C, I]``."""

    def stage(product: torch.Tensor, weight: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        if early:
            product = product * weight[:, :, None]
        if weights.bias1 is not None:
            product = product + weights.bias1[chosen][:, None]
        gate, up = product.chunk(2, -1)
        inner = _activated(gate, up, plan.activation or activation, plan.limit)
        if not plan.clears:
            # FlyDSL launches no tile there and its buffer is fresh (aiter/ops/flydsl/moe_kernels.py, torch.empty).
            inner[..., weights.inner - weights.skipped[1] :] = torch.nan
        shape = inner.shape
        inner = inner.reshape(-1, shape[-1])
        if plan.tile:
            return _requantised(inner, plan.rows, 128 if kind == QuantType.per_1x128 else plan.tile).view(shape)
        inner = inner.to(dtype)
        if plan.rows is None:
            return inner.float().view(shape)
        if kind == QuantType.per_1x32:
            return _mx(inner, plan.rows).view(shape)
        return decoded(*quant.get_hip_quant(kind)(inner, quant_dtype=plan.rows)).view(shape)

    return stage


def decoded(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Float32 ``[n, N]`` of codes and their float32 or E8M0 scales ``[n, G]``."""
    values = fp4_values(codes.view(torch.uint8)) if codes.dtype == dtypes.fp4x2 else codes.float()
    if scales.dtype != torch.float32:
        scales = mx.scale_values(scales.view(torch.uint8))
    count, width = values.shape
    groups = scales.shape[1]
    return (values.view(count, groups, width // groups) * scales[:, :, None]).view(count, width)


def _activated(gate: torch.Tensor, up: torch.Tensor, activation: Any, limit: float | None) -> torch.Tensor:
    """In float32. A clamp takes NaN for its limit, as the instruction does."""
    if limit is not None:
        bound = torch.tensor(limit, device=gate.device)
        gate, up = torch.fmin(gate, bound), torch.fmax(torch.fmin(up, bound), -bound)
    if activation == ActivationType.Swiglu:
        return gate * torch.sigmoid(_ALPHA * gate) * (up + 1.0)
    if activation == ActivationType.Gelu:
        return torch.nn.functional.gelu(gate) * up
    return torch.nn.functional.silu(gate) * up


def _requantised(rows: torch.Tensor, to: torch.dtype | None, group: int) -> torch.Tensor:
    """FP8 codes of float32 rows and back, without a rounding in between."""
    assert to is not None
    blocks = device.flush(rows).view(rows.shape[0], -1, group)
    amax = kernels.largest_magnitudes(blocks)
    if group == 128:
        amax = amax.clamp(min=kernels.FLOOR)
    scale = device.flush(amax * mx.reciprocal(device.largest(to), rows.device))
    codes = device.fp8_codes(device.flush(blocks * device.flush(1.0 / scale)), to).view(to)
    return (codes.float() * scale).view(rows.shape)


def _mx(rows: torch.Tensor, to: torch.dtype) -> torch.Tensor:
    """MXFP4 or MXFP8 and back."""
    return decoded(*quant.per_1x32_mx_quant_hip(rows, quant_dtype=to, scale_type=dtypes.fp8_e8m0))


def _given(scale: torch.Tensor, rows: int, groups: int, *, one_byte: bool) -> torch.Tensor:
    """The caller's scales ``[rows, groups]`` as the kernel reads their bytes."""
    if not one_byte:
        return as_floats(scale, rows * groups).view(rows, groups)
    raw = scale.contiguous().view(torch.uint8).view(-1)
    if raw.numel() < rows * groups:
        raw = torch.cat((raw, device.empty((rows * groups - raw.numel(),), torch.uint8, raw.device)))
    return raw[: rows * groups].view(rows, groups)
