"""Double of ``aiter.ops.quant``: torch references, wrappers and raw entries of FP8 and MX quantisers.

Scope: AITER e4048607's signatures; the numerics of the device code are in the double's kernels. Buffers are allocated
as upstream allocates them, without clearing. Payloads of int8 are not doubled. A pass against it proves nothing about
AITER's kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from accelerated.standin.aiter_ops import device, kernels, mx
from accelerated.standin.aiter_ops.ops.enum import QuantType
from accelerated.standin.aiter_ops.utility import dtypes

Pair = tuple[torch.Tensor, torch.Tensor]


def get_dtype_max(dtype: torch.dtype) -> float:
    """Largest value of ``dtype``."""
    return torch.finfo(dtype).max if dtype.is_floating_point else torch.iinfo(dtype).max


def pertoken_quant(
    x: torch.Tensor,
    scale: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
    scale_dtype: torch.dtype = dtypes.fp32,
    quant_dtype: torch.dtype = dtypes.i8,
    dtypeMax: float | None = None,
) -> Pair:
    """Torch reference: an all-zero row has scale 1. On a GPU torch multiplies by the rounded 1 / dtypeMax."""
    x = x.to(torch.float32)
    if x_scale is not None:
        x = x * x_scale
    if scale is None:
        amax = x.abs().max(dim=-1, keepdim=True).values
        scale = amax * mx.reciprocal(dtypeMax or get_dtype_max(quant_dtype), x.device)
        scale = torch.where(scale == 0, 1.0, scale)
    return _cast(x / scale, quant_dtype), scale.to(scale_dtype)


def per_tensor_quant(
    x: torch.Tensor,
    scale: torch.Tensor | None = None,
    scale_dtype: torch.dtype = dtypes.fp32,
    quant_dtype: torch.dtype = dtypes.i8,
    dtypeMax: float | None = None,
) -> Pair:
    """Torch reference without a guard: an all-zero tensor has scale 0 and codes NaN."""
    x = x.to(torch.float32)
    if scale is None:
        scale = x.abs().max() * mx.reciprocal(dtypeMax or get_dtype_max(quant_dtype), x.device)
    return _cast(x / scale, quant_dtype), scale.view(1).to(scale_dtype)


def per_1x32_f4_quant(
    x: torch.Tensor,
    scale: torch.Tensor | None = None,
    quant_dtype: torch.dtype = dtypes.fp4x2,
    shuffle: bool = False,
    pack_dim: int = -1,
    round_mode: int = mx.ROUND_UP,
) -> Pair:
    """Torch reference of MXFP4; ``pack_dim=0`` packs the first dimension."""
    assert quant_dtype == dtypes.fp4x2
    if pack_dim == 0:
        assert x.dim() == 2, f"x has {x.dim()} dimensions; packing along the first takes two"
        x = x.T.contiguous()
    shape = x.shape
    blocks = x.view(-1, shape[-1]).view(-1, 32).float()
    scales = mx.scale_bytes(blocks.abs().amax(1), mx.FP4, round_mode)
    codes = device.fp4_bytes(blocks / mx.scale_values(scales)[:, None]).view(*shape[:-1], -1)
    scales = scales.view(codes.numel() * 2 // shape[-1], -1)
    if shuffle:
        scales = mx.swizzle(scales)
    if pack_dim == 0:
        codes, scales = codes.T.contiguous(), scales.T.contiguous()
    return codes.view(dtypes.fp4x2), scales.view(dtypes.fp8_e8m0)


def per_block_quant_wrapper(block_shape: tuple[int, int] = (1, 128)) -> Callable[[Callable[..., Pair]], Any]:
    """Give a per-token quantiser blocks of one row."""

    def decorator(per_token_quant_func: Callable[..., Pair]) -> Callable[..., Pair]:
        def wrapper(x: torch.Tensor, scale: torch.Tensor | None = None, quant_dtype: torch.dtype = dtypes.i8) -> Pair:
            blk_m, blk_n = block_shape
            assert x.shape[-1] % blk_n == 0, f"rows of {x.shape[-1]} elements are not cut into blocks of {blk_n}"
            assert blk_m == 1, f"blocks have {blk_m} rows; they have one"
            m, n = x.shape
            codes, scales = per_token_quant_func(x.view(-1, blk_n), scale=scale, quant_dtype=quant_dtype)
            return codes.view(m, n), scales.view(m, n // blk_n)

        return wrapper

    return decorator


def get_torch_quant(qType: Any) -> Callable[..., Any]:
    """Torch reference of a quantisation type."""
    return _pick(
        qType,
        {
            QuantType.per_Tensor.value: per_tensor_quant,
            QuantType.per_Token.value: pertoken_quant,
            QuantType.per_1x32.value: per_1x32_f4_quant,
            QuantType.per_1x128.value: per_block_quant_wrapper((1, 128))(pertoken_quant),
        },
    )


def get_hip_quant(qType: Any) -> Callable[..., Any]:
    """Device quantiser of a quantisation type."""
    return _pick(
        qType,
        {
            QuantType.per_Tensor.value: per_tensor_quant_hip,
            QuantType.per_Token.value: per_token_quant_hip,
            QuantType.per_1x32.value: per_1x32_mx_quant_hip,
            QuantType.per_1x128.value: functools.partial(per_group_quant_hip, group_size=128),
        },
    )


def per_token_quant_hip(
    x: torch.Tensor,
    scale: torch.Tensor | None = None,
    quant_dtype: torch.dtype = dtypes.i8,
    num_rows: torch.Tensor | None = None,
    num_rows_factor: int = 1,
) -> Pair:
    """Codes like ``x``, scales ``[..., 1]``; rows from the count on stay as they were in memory."""
    if scale is not None:
        raise ValueError("a scale was given to a quantiser that chooses its own")
    scales = device.empty((*x.shape[:-1], 1), torch.float32, x.device)
    codes = device.empty(tuple(x.shape), quant_dtype, x.device)
    dynamic_per_token_scaled_quant(codes, x, scales, num_rows=num_rows, num_rows_factor=num_rows_factor)
    return codes, scales


def per_group_quant_hip(
    x: torch.Tensor,
    scale: torch.Tensor | None = None,
    quant_dtype: torch.dtype = dtypes.i8,
    group_size: int = 128,
    transpose_scale: bool = False,
    num_rows: torch.Tensor | None = None,
    num_rows_factor: int = 1,
    scale_type: torch.dtype = dtypes.fp32,
) -> Pair:
    """Scales ``[M, N / group_size]``; with ``transpose_scale`` the bytes of its transpose under the same shape."""
    if scale is not None:
        raise ValueError("a scale was given to a quantiser that chooses its own")
    scales = device.empty((*x.shape[:-1], x.shape[-1] // group_size), scale_type, x.device)
    assert group_size in [32, 64, 128], f"groups of {group_size}; the kernel has those of 32, 64 and 128"
    codes = device.empty(tuple(x.shape), quant_dtype, x.device)
    options: dict[str, Any] = {
        "shuffle_scale": transpose_scale,
        "num_rows": num_rows,
        "num_rows_factor": num_rows_factor,
    }
    if scale_type == dtypes.fp8_e8m0:
        dynamic_per_group_scaled_quant(codes, x, scales, group_size, **options)
    else:
        dynamic_per_token_scaled_quant(codes, x.view(-1, group_size), scales, **options)
    return codes, scales


def per_1x32_mx_quant_hip(
    x: torch.Tensor,
    scale: torch.Tensor | None = None,
    quant_dtype: torch.dtype = dtypes.fp4x2,
    shuffle: bool = False,
    num_rows: torch.Tensor | None = None,
    num_rows_factor: int = 1,
    scale_type: torch.dtype | None = None,
) -> Pair:
    """MXFP4, or FP8 with float32 (the default) or E8M0 scales of 32 elements."""
    m, n = x.shape
    assert n % 32 == 0, f"rows of {n} elements; groups are of 32"
    fp4 = quant_dtype == dtypes.fp4x2
    if not fp4 and quant_dtype != dtypes.get_dtype_fp8():
        raise ValueError(f"per_1x32_mx_quant_hip has no payload {quant_dtype}; fp4x2 and fp8 it has")
    kind = scale_type or (dtypes.fp8_e8m0 if fp4 else dtypes.fp32)
    if fp4 and kind != dtypes.fp8_e8m0:
        raise ValueError(f"per_1x32_mx_quant_hip: fp4x2 goes with e8m0 scales, not with {scale_type}")
    if shuffle and kind == dtypes.fp32:
        raise NotImplementedError("per_1x32_mx_quant_hip does not shuffle float32 scales")
    if scale is not None:
        raise ValueError("a scale was given to a quantiser that chooses its own")
    scales = device.empty(mx.padded(m, n // 32) if shuffle else (m, n // 32), kind, x.device)
    codes = device.empty((m, n // 2 if fp4 else n), quant_dtype, x.device)
    dynamic_per_group_scaled_quant(
        codes, x, scales, 32, shuffle_scale=shuffle, num_rows=num_rows, num_rows_factor=num_rows_factor
    )
    return codes, scales


def per_tensor_quant_hip(
    x: torch.Tensor,
    scale: torch.Tensor | None = None,
    quant_dtype: torch.dtype = dtypes.i8,
    num_rows: torch.Tensor | None = None,
    num_rows_factor: int = 1,
) -> Pair:
    """One scale ``(1,)``, computed or given."""
    assert num_rows is None, "per_tensor_quant_hip takes all rows; give no num_rows"
    codes = device.empty(tuple(x.shape), quant_dtype, x.device)
    if quant_dtype not in (dtypes.get_dtype_fp8(), dtypes.i8):
        raise ValueError(f"no quantiser per tensor has payload {quant_dtype}")
    if scale is None:
        scale = device.empty((1,), torch.float32, x.device)
        dynamic_per_tensor_quant(codes, x, scale)
    else:
        static_per_tensor_quant(codes, x, scale)
    return codes, scale.view(1)


def static_per_tensor_quant(out: torch.Tensor, input: torch.Tensor, scale: torch.Tensor) -> None:
    """Raw entry (quant_kernels.cu:600)."""
    kernels.per_tensor(out, input, scale, static=True)


def dynamic_per_tensor_quant(out: torch.Tensor, input: torch.Tensor, scale: torch.Tensor) -> None:
    """Raw entry (quant_kernels.cu:674)."""
    kernels.per_tensor(out, input, scale, static=False)


def dynamic_per_token_scaled_quant(
    out: torch.Tensor,
    input: torch.Tensor,
    scales: torch.Tensor,
    scale_ub: torch.Tensor | None = None,
    shuffle_scale: bool = False,
    num_rows: torch.Tensor | None = None,
    num_rows_factor: int = 1,
) -> None:
    """Raw entry (quant_kernels.cu:720). Rows of 32, 64 or 128 take the group kernel; ``scale_ub`` is ignored."""
    del scale_ub
    if input.shape[-1] in (32, 64, 128):
        kernels.per_group(out, input, scales, input.shape[-1], shuffle_scale, num_rows, num_rows_factor)
    else:
        kernels.per_token(out, input, scales, num_rows, num_rows_factor)


def dynamic_per_group_scaled_quant(
    out: torch.Tensor,
    input: torch.Tensor,
    scales: torch.Tensor,
    group_size: int = 32,
    shuffle_scale: bool = True,
    num_rows: torch.Tensor | None = None,
    num_rows_factor: int = 1,
) -> None:
    """Raw entry (quant_kernels.cu:842). A one-byte scale type asks for E8M0."""
    if group_size not in (32, 64, 128):
        raise RuntimeError("dynamic_per_group_scaled_quant has groups of 32, 64 and 128")
    if input.shape[-1] % group_size:
        raise RuntimeError("dynamic_per_group_scaled_quant cols is not divisible by group_size")
    kernels.per_group(out, input, scales, group_size, shuffle_scale, num_rows, num_rows_factor)


def _cast(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Torch's conversion to an FP8 type, in which NaN stays NaN."""
    if dtype not in mx.FP8:
        raise NotImplementedError(f"the double quantises to {', '.join(map(str, mx.FP8))}, not to {dtype}")
    codes = device.fp8_codes(value, dtype)
    return torch.where(value.isnan(), 0x80 if dtype == torch.float8_e4m3fnuz else 0x7F, codes).view(dtype)


def _pick(kind: Any, choices: dict[int, Callable[..., Any]]) -> Callable[..., Any]:
    def none(*a: Any, **k: Any) -> tuple[Any, None]:
        return a[0], None

    def refuse(*a: Any, **k: Any) -> Any:
        raise NotImplementedError(f"no quantiser for {kind!r}")

    return {QuantType.No.value: none, **choices}.get(kind.value, refuse)
