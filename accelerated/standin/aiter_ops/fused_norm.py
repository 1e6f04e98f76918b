"""What follows the sum over ranks in AITER's fused kernels: residual, RMSNorm and the three quantising epilogues.

Scope: csrc/include/custom_all_reduce.cuh of AITER e4048607, kernel by kernel, in float32 torch arithmetic. The real
reciprocal root may be one unit off. It proves nothing about AMD hardware.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from accelerated.standin.aiter_ops import device, mx
from accelerated.standin.aiter_ops.jit.utils.chip_info import get_gfx_runtime

#: Columns per scale of the MXFP4 epilogue.
MX_GROUP = 32
_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def reduced(total: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A sum as it lies in the rows' type between the two steps, float32."""
    return device.store(total, dtype, get_gfx_runtime()).float()


def add_unrounded(total: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm input, residual out) of the one-stage and split kernels: the float32 sum is normalised."""
    value = device.flush(total + residual.float())
    return value, device.store(value, residual.dtype, get_gfx_runtime())


def add_stored(total: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of one-stage MXFP4: residual out is normalised."""
    stored = add_unrounded(total, residual)[1]
    return stored.float(), stored


def add_native(total: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of the two-stage and split quantising kernels: ``vec += res`` in the rows' type, to nearest."""
    stored = device.flush(total + residual.float()).to(residual.dtype)
    return stored.float(), stored


def norm(
    value: torch.Tensor, weight: torch.Tensor, epsilon: float, *, gemma: bool = False, weight_first: bool = False
) -> torch.Tensor:
    """Float32 ``value [M, N]`` normalised, unrounded. The local kernel of the split path multiplies by w first."""
    scale = weight.float() + 1.0 if gemma else weight.float()
    root = torch.rsqrt(device.mean_square(value) + epsilon)
    return device.flush(value * scale * root if weight_first else value * root * scale)


def stored(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An output in the rows' type."""
    return device.store(value, dtype, get_gfx_runtime())


def quantise_fp8(value: torch.Tensor, group: int, payload: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes ``[M, N]`` in ``payload``, float32 scales ``[M, N / group]``); a group of zeros has scale 1."""
    rows, columns = value.shape
    grouped = value.view(rows, columns // group, group)
    amax = grouped.abs().amax(2, keepdim=True)
    scale = torch.where(amax == 0, 1.0, device.flush(amax / device.largest(payload)))
    codes = device.fp8_codes(device.flush(grouped / scale), payload)
    return codes.view(rows, columns).view(payload), scale.squeeze(2)


def quantise_fp4(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(bytes ``[M, N / 2]`` with the even column low, E8M0 bytes ``[M, N / 32]``): Even scales, ties away from zero.

    The sign is that of ``x < 0``: minus zero becomes zero.
    """
    rows, columns = value.shape
    grouped = value.view(rows, columns // MX_GROUP, MX_GROUP)
    scales = mx.scale_bytes(grouped.abs().amax(2, keepdim=True), mx.FP4, mx.EVEN)
    scaled = grouped * torch.exp2(127.0 - scales.float())
    middles = torch.tensor([(a + b) / 2 for a, b in pairwise(_FP4_VALUES)], device=value.device)
    codes = torch.bucketize(scaled.abs().contiguous(), middles, right=True) | (scaled < 0).long() << 3
    packed = codes[..., 0::2] | codes[..., 1::2] << 4
    return packed.to(torch.uint8).view(rows, columns // 2), scales.squeeze(2)


def triton_mxfp4(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``aiter.ops.triton.quant.dynamic_mxfp4_quant``: ties to even, scales ``[M, ceil(N / 32)]`` in columns.

    Raises:
        AssertionError: N is no multiple of 4 (quant.py:170).
    """
    count, columns = rows.shape
    assert columns // 2 % 2 == 0
    groups = -(-columns // MX_GROUP)
    value = torch.nn.functional.pad(rows.float(), (0, groups * MX_GROUP - columns)).view(count, groups, MX_GROUP)
    found = mx.scale_bytes(value.abs().amax(2, keepdim=True), mx.FP4, mx.EVEN)
    codes = device.fp4_bytes(value * torch.exp2(127.0 - found.float()))
    scales = device.empty((groups, count), torch.uint8, rows.device).t()
    scales.copy_(found.squeeze(2))
    return codes.view(count, -1)[:, : columns // 2].contiguous(), scales
