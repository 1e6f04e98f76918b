"""Quantisers with one defect each, as replacements in the double of AITER.

Scope: scale rules, amax, rounding, layouts, stores and buffers. They synchronise the host where that is convenient and
prove nothing about timing.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from accelerated.standin.aiter_ops import device, kernels, mx
from conformance.faults.row_replacements import Replacement, constant, wrapped

Genuine = Callable[..., Any]

#: Elements after which a row's offset starts from 0 again: 2**32 on a device, where rows are longer.
WRAP = 4096
#: Rows up to which one path is taken.
FEW_ROWS = 8
#: A value that one wrong entry of a conversion table concerns, exact in bfloat16 and no midpoint.
WRONG_VALUE = 101.0


def _largest(maximum: float) -> Replacement:
    """The scale maps to another maximum than the codes have."""
    return wrapped("device:largest", lambda genuine, dtype: maximum)


def _next_row(genuine: Genuine, value: torch.Tensor) -> torch.Tensor:
    amax = genuine(value)
    return torch.cat((torch.maximum(amax[:-1], amax[1:]), amax[-1:]))


def _shifted_group(genuine: Genuine, value: torch.Tensor) -> torch.Tensor:
    flat = value.reshape(value.shape[0], -1)
    shifted = torch.cat((flat[:, 1:], torch.zeros_like(flat[:, :1])), 1)
    result: torch.Tensor = genuine(shifted.view(value.shape))
    return result


def _nan_of_row_before(genuine: Genuine, value: torch.Tensor) -> torch.Tensor:
    amax = genuine(value)
    return torch.cat((amax[:1], torch.where(amax[:-1].isnan(), torch.nan, amax[1:])))


def _beside_values(genuine: Genuine, value: torch.Tensor) -> torch.Tensor:
    """A group of zeros beside others has no largest magnitude, as if nothing had been written for it."""
    amax = genuine(value)
    lonely = (amax == 0) & (amax.amax(1, keepdim=True) > 0) if value.dim() == 3 else amax < 0
    return torch.where(lonely, torch.nan, amax)


def _unguarded_per_token(
    genuine: Genuine, x: torch.Tensor, scale: Any = None, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Without the scale of 1 for a row of zeros: 0 / 0."""
    codes, found = genuine(x, scale, **options)
    zero = (x == 0).all(-1, keepdim=True)
    raw = torch.where(zero, 0x80 if codes.dtype == torch.float8_e4m3fnuz else 0x7F, codes.view(torch.uint8))
    return raw.view(codes.dtype), torch.where(zero, 0.0, found)


def _zero_byte_is_zero(genuine: Genuine, scales: torch.Tensor) -> torch.Tensor:
    """A scale byte of 0 read as the float 0, by shifting it into the exponent."""
    return torch.where(scales == 0, 0.0, genuine(scales))


def _even_mode(genuine: Genuine, amax: torch.Tensor, payload: tuple[int, float, int], mode: int = 1) -> torch.Tensor:
    result: torch.Tensor = genuine(amax, payload, mx.EVEN if mode == mx.ROUND_UP else mode)
    return result


def _logarithm(genuine: Genuine, amax: torch.Tensor, payload: tuple[int, float, int], mode: int = 1) -> torch.Tensor:
    """``ceil(log(amax / max) / log 2)`` in float32 instead of integer arithmetic."""
    quotient = amax * mx.reciprocal(payload[1], amax.device)
    exponent = torch.ceil(torch.log(quotient) / torch.log(torch.full_like(quotient, 2.0)))
    byte = (exponent.nan_to_num(nan=128.0).clamp(-127, 128) + 127).to(torch.uint8)
    return torch.where(amax.isfinite() & (amax > 0), byte, genuine(amax, payload, mode))


def _nearest(genuine: Genuine, value: torch.Tensor, table: Any) -> torch.Tensor:
    """Ties away from zero."""
    middles = torch.tensor([(a + b) / 2 for a, b in pairwise(table)], device=value.device)
    return torch.bucketize(value.abs().contiguous(), middles, right=True).to(torch.uint8)


def _truncated(genuine: Genuine, value: torch.Tensor, table: Any) -> torch.Tensor:
    """Towards zero."""
    ends = torch.tensor(table[1:], device=value.device)
    return torch.bucketize(value.abs().contiguous(), ends, right=True).to(torch.uint8)


def _nan_codes(genuine: Genuine, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """NaN is not clamped: it becomes the format's own."""
    return torch.where(value.isnan(), 0x80 if dtype == torch.float8_e4m3fnuz else 0x7F, genuine(value, dtype))


def _one_wrong_value(genuine: Genuine, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """One entry of the conversion is the next code."""
    codes = genuine(value, dtype)
    return torch.where(value == WRONG_VALUE, codes + 1, codes)


def _other_reciprocal(genuine: Genuine, value: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Many rows take a path whose reciprocal is the next number on the other side of the exact one: legal by itself."""
    if value.dim() != 2 or value.shape[0] <= FEW_ROWS:
        result: torch.Tensor = genuine(value, scale, dtype)
        return result
    inverse, exact = 1.0 / scale, 1.0 / scale.double()
    other = torch.nextafter(inverse, torch.where(inverse.double() > exact, -torch.inf, torch.inf))
    return device.fp8_codes(device.flush(value * device.flush(other)), dtype)


def _layout(transposed: bool) -> Replacement:
    """The scales lie in another order than was asked for."""

    def wrapper(
        genuine: Genuine, scales: torch.Tensor, stored: torch.Tensor, group: int, shuffle: bool, *rest: Any
    ) -> None:
        genuine(scales, stored, group, transposed, *rest)

    return wrapped("kernels:place_scales", wrapper)


def _clamped_row(
    genuine: Genuine,
    out: torch.Tensor,
    rows: torch.Tensor,
    scales: torch.Tensor,
    group: int,
    shuffle: bool,
    num_rows: torch.Tensor | None,
    factor: int,
) -> None:
    """Rows beyond the count are taken for the last one that counts, and written there."""
    if num_rows is not None and 0 < int(num_rows) < rows.shape[0]:
        rows = rows.clone()
        rows[int(num_rows) - 1] = rows[-1]
    genuine(out, rows, scales, group, shuffle, num_rows, factor)


def _spilt_nibbles(genuine: Genuine, out: torch.Tensor, *rest: Any) -> None:
    """The last store of a packed row is one byte too wide, and the next row is already there."""
    genuine(out, *rest)
    packed = out.view(torch.uint8).view(out.shape[0], -1)
    packed[1:, 0] = packed[:-1, -1].clone()


def _behind_the_end(genuine: Genuine, out: torch.Tensor, *rest: Any) -> None:
    """The last store of the last row is one byte too wide: it goes behind the buffer."""
    genuine(out, *rest)
    raw = out.view(torch.uint8)
    end = raw.storage_offset() + raw.numel()
    if end < raw.untyped_storage().nbytes():
        raw.as_strided((1,), (1,), end).zero_()


def _only_grows(genuine: Genuine, out: torch.Tensor, rows: torch.Tensor, scale: torch.Tensor, *, static: bool) -> None:
    """The scale rises by an atomic maximum of its bits, and nobody sets it to zero before."""
    before = scale.view(torch.int32).clone()
    genuine(out, rows, scale, static=static)
    if not static:
        scale.copy_(torch.maximum(before, scale.view(torch.int32)).view(torch.float32))
        kernels.write(out, kernels._payload(device.flush(rows.float()), scale, out.dtype))


def _multiplied(genuine: Genuine, out: torch.Tensor, rows: torch.Tensor, scale: torch.Tensor, *, static: bool) -> None:
    """A given scale is taken for its reciprocal."""
    genuine(out, rows, 1.0 / scale if static else scale, static=static)


def _wrapping_offset(
    genuine: Genuine, out: torch.Tensor, rows: torch.Tensor, scales: torch.Tensor, num_rows: Any, factor: int
) -> None:
    """A row's offset in elements wraps around."""
    count, columns = rows.shape
    offset = (torch.arange(count, device=rows.device) * columns % WRAP)[:, None]
    genuine(out, rows.view(-1)[offset + torch.arange(columns, device=rows.device)], scales, num_rows, factor)


_held: dict[tuple[object, ...], torch.Tensor] = {}


def _same_memory(genuine: Genuine, shape: Any, dtype: torch.dtype, on: torch.device) -> torch.Tensor:
    """What was handed out for an earlier call of the same sizes is handed out again."""
    key = (tuple(shape), dtype)
    if key not in _held:
        _held[key] = genuine(shape, dtype, on)
    return _held[key]


def _flushes_input(genuine: Genuine, out: torch.Tensor, rows: torch.Tensor, *rest: Any) -> None:
    """The kernel stores what it flushed where it read it."""
    rows.copy_(device.flush(rows.float()))
    genuine(out, rows, *rest)


REPLACED: dict[str, tuple[Replacement, ...]] = {
    "maximum_448": (_largest(448.0),),
    "maximum_224": (_largest(224.0),),
    "zero_row_nan": (wrapped("ops.quant:pertoken_quant", _unguarded_per_token),),
    "no_amax_floor": (constant("kernels:FLOOR", 0.0),),
    "zero_scale_byte": (constant("kernels:FLOOR", 0.0), wrapped("mx:scale_values", _zero_byte_is_zero)),
    "zero_group_nan": (wrapped("kernels:largest_magnitudes", _beside_values),),
    "nan_codes": (wrapped("device:fp8_codes", _nan_codes),),
    "amax_of_next_row": (wrapped("kernels:largest_magnitudes", _next_row),),
    "shifted_group": (wrapped("kernels:largest_magnitudes", _shifted_group),),
    "nan_of_row_before": (wrapped("kernels:largest_magnitudes", _nan_of_row_before),),
    "even_scale_mode": (wrapped("mx:scale_bytes", _even_mode),),
    "scale_by_logarithm": (wrapped("mx:scale_bytes", _logarithm),),
    "ties_away": (wrapped("device:_nearest", _nearest),),
    "truncated_codes": (wrapped("device:_nearest", _truncated),),
    "one_wrong_value": (wrapped("device:fp8_codes", _one_wrong_value),),
    "path_by_row_count": (wrapped("kernels:_payload", _other_reciprocal),),
    "row_major_scales": (_layout(False),),
    "transposed_scales": (_layout(True),),
    "count_clamps_rows": (wrapped("kernels:per_group", _clamped_row),),
    "fp4_into_next_row": (wrapped("kernels:per_group", _spilt_nibbles),),
    "fp4_behind_the_end": (wrapped("kernels:per_group", _behind_the_end),),
    "scale_only_grows": (wrapped("kernels:per_tensor", _only_grows),),
    "scale_multiplied": (wrapped("kernels:per_tensor", _multiplied),),
    "row_offset_wraps": (wrapped("kernels:per_token", _wrapping_offset),),
    "reused_outputs": (wrapped("device:empty", _same_memory),),
    "flushes_input": (wrapped("kernels:per_group", _flushes_input),),
}
