"""Numerics of AITER's quantising kernels in float32 torch arithmetic.

Scope: csrc/kernels/quant_kernels.cu of AITER e4048607. Rows from a device row count on are not written, subnormals are
flushed, an all-zero row has garbage codes under a zero scale, and nothing synchronises with the host. The real
reciprocal instruction may be one unit off where this one is correctly rounded. A pass proves nothing about hardware.
"""

from __future__ import annotations

import torch

from accelerated.standin.aiter_ops import device, mx
from accelerated.standin.aiter_ops.jit.utils.chip_info import get_gfx_runtime
from accelerated.standin.aiter_ops.utility import dtypes

#: Least largest magnitude of the group kernel, a float32 constant.
FLOOR = 1e-10


def per_tensor(out: torch.Tensor, rows: torch.Tensor, scale: torch.Tensor, *, static: bool) -> None:
    """``data_to_scale_kernel`` and ``scaled_quant_kernel``."""
    _check(out, rows, "scaled_quant_kernel")
    value = device.flush(rows.float())
    if not static:
        # The scale starts at 0 and rises to the largest row's; with no rows nothing launches and it stays 0.
        amax = value.abs().amax() if value.numel() else torch.zeros((), device=value.device)
        scale.copy_(device.flush(amax * mx.reciprocal(device.largest(out.dtype), rows.device)).view(1))
    write(out, _payload(value, scale, out.dtype))


def per_token(
    out: torch.Tensor, rows: torch.Tensor, scales: torch.Tensor, num_rows: torch.Tensor | None, factor: int
) -> None:
    """``dynamic_per_token_scaled_quant_kernel``: the largest magnitude starts at 0."""
    _check(out, rows, "quant_kernel")
    value = device.flush(rows.reshape(-1, rows.shape[-1]).float())
    amax = largest_magnitudes(value)
    scale = device.flush(amax * mx.reciprocal(device.largest(out.dtype), rows.device))
    written = _written(value.shape[0], num_rows, factor, value.device)
    write(out.view(value.shape), _payload(value, scale, out.dtype), written)
    write(scales.view(-1, 1), scale, written)


def per_group(
    out: torch.Tensor,
    rows: torch.Tensor,
    scales: torch.Tensor,
    group: int,
    shuffle: bool,
    num_rows: torch.Tensor | None,
    factor: int,
) -> None:
    """``dynamic_per_group_scaled_quant_kernel`` on rows as long as those of ``out``."""
    _check(out, rows, "dynamic_per_group_scaled_quant_kernel")
    fp4 = out.dtype == dtypes.fp4x2
    columns = out.shape[-1] * (2 if fp4 else 1)
    value = device.flush(rows.reshape(-1, columns // group, group).float())
    amax = largest_magnitudes(value).clamp(min=FLOOR)
    e8m0 = scales.dtype != torch.float32
    if e8m0:
        scale_codes = mx.scale_bytes(amax, mx.FP4 if fp4 else mx.FP8[out.dtype])
        scale, stored = mx.scale_values(scale_codes), scale_codes
    else:
        scale = stored = device.flush(amax * mx.reciprocal(device.largest(out.dtype), rows.device))
    written = _written(value.shape[0], num_rows, factor, value.device)
    codes = device.fp4_bytes(value / scale) if fp4 else _payload(value, scale, out.dtype)
    write(out.view(torch.uint8).view(value.shape[0], -1), codes.view(value.shape[0], -1), written)
    place_scales(scales, stored.squeeze(2), group, shuffle, num_rows, factor)


def place_scales(
    scales: torch.Tensor,
    stored: torch.Tensor,
    group: int,
    shuffle: bool,
    num_rows: torch.Tensor | None = None,
    factor: int = 1,
) -> None:
    """Write scales ``[M, G]`` where the kernel does: row-major, transposed, or swizzled (E8M0 of 32 elements).

    The stride of the transposed bytes is the device's row count, not M.
    """
    count, groups = stored.shape
    written = _written(count, num_rows, factor, stored.device)
    flat = scales.view(torch.uint8).view(-1) if scales.dtype != torch.float32 else scales.view(-1)
    row = torch.arange(count, device=stored.device)[:, None]
    column = torch.arange(groups, device=stored.device)[None, :]
    if shuffle and group == 32 and stored.dtype == torch.uint8:
        place = mx.swizzled_places(count, groups, stored.device)
    elif shuffle:
        place = column * (count if num_rows is None else num_rows.long() * factor) + row
    else:
        place = row * groups + column
    # What is not written goes to a place behind the end.
    place = torch.where(written, place, flat.numel())
    longer = torch.cat((flat, flat.new_empty(1)))
    flat.copy_(longer.scatter(0, place.reshape(-1), stored.reshape(-1))[:-1])


def largest_magnitudes(value: torch.Tensor) -> torch.Tensor:
    """Largest magnitude of each row ``[M, N]``, or of each group ``[M, G, N / G]``, kept as a last dimension of 1."""
    return value.abs().amax(-1, keepdim=True)


def write(out: torch.Tensor, new: torch.Tensor, written: torch.Tensor | None = None) -> None:
    """Store ``new`` in the rows that are ``written [M, 1]``, or in all; FP8 and FP4 buffers take bytes."""
    if out.dtype != new.dtype:
        out = out.view(new.dtype)
    new = new.view(out.shape)
    out.copy_(new if written is None else torch.where(written, new, out))


def _payload(value: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``x * (1 / scale)`` in FP8 codes; the reciprocal of 0 is infinity and 0 * inf is NaN."""
    return device.fp8_codes(device.flush(value * device.flush(1.0 / scale)), dtype)


def _written(count: int, num_rows: torch.Tensor | None, factor: int, on: torch.device) -> torch.Tensor:
    """Which of ``count`` rows the kernel writes, bool ``[count, 1]``."""
    row = torch.arange(count, device=on)[:, None]
    return row >= 0 if num_rows is None else row < num_rows * factor


def _check(out: torch.Tensor, rows: torch.Tensor, name: str) -> None:
    """The library's own checks, with its messages."""
    if out.dtype not in (dtypes.get_dtype_fp8(), dtypes.fp4x2):
        # FP8 of another architecture has no number in AITER's table of types.
        raise AssertionError(f"no kernel writes {out.dtype}")
    if out.dtype == dtypes.fp4x2 and get_gfx_runtime() == "gfx942":
        raise RuntimeError(f"{name} not support output type: fp4x2")
    if rows.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError(f"{name} has no rows of {rows.dtype}")
    if not (rows.is_contiguous() and out.is_contiguous()):
        raise RuntimeError(f"{name}: input.is_contiguous() and out.is_contiguous() are wanted")
