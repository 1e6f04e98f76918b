"""Quantisers as an executable specification, and the set of results each declared codec allows.

Scope: :class:`reference.codecs.Codec` on logical tensors: one code per element, one scale per group. Packing of E2M1
and scale layouts are elsewhere. :func:`quantise` is one legal result; :func:`accepted_scales` and
:func:`accepted_values` are all of them, :func:`half_step` is a bound that does not use them.

Policies. Rows are float32 values (wider ones are rounded to float32 first). The quotient is rounded to float32, then
clamped to the codec's maximum, then rounded to the payload. Where nothing is promised:

- A NaN or infinite element spoils its own group and no other; with a static scale only itself (:func:`undefined`).
- Where a scale is 0, or its reciprocal is used and overflows float32, or it is a subnormal that may be flushed, any
  finite code may come out: the dequantised value is off by less than the group's own scale times the maximum.
- Under ``may_flush`` a subnormal element, or any element whose scale has a subnormal reciprocal, may become zero.

Sources: AITER e4048607 csrc/kernels/quant_kernels.cu, csrc/include/aiter_opus_plus.h, aiter/ops/quant.py; OCP MX 1.0
§6.3. What a pass does not prove: anything about layouts, padding or memory that is not part of the result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from reference.codecs import Codec, PayloadRule
from reference.formats import Ties
from reference.intervals import Interval
from reference.rounding import decode, encode
from reference.scales import SMALLEST_NORMAL, amax, expand, scales_of, to_float32, unrounded

_UNIT = 2.0**-24


@dataclass
class Quantised:
    """Codes int64 ``[M, N]``, unpacked, and scales float64, shaped as :func:`reference.scales.amax` shapes them."""

    codes: torch.Tensor
    scales: torch.Tensor


def quantise(rows: torch.Tensor, codec: Codec, *, scale: float | None = None, num_rows: int | None = None) -> Quantised:
    """Quantise ``rows [M, N]``.

    Args:
        rows: any floating type.
        codec: how.
        scale: of a static codec, rounded to float32.
        num_rows: rows that exist, at most M. Rows from it on take no part and are not in the result.

    Raises:
        ValueError: a scale for a dynamic codec, none or one that is not positive for a static one, or ``num_rows``
            outside 0..M.
    """
    if num_rows is not None:
        if not 0 <= num_rows <= rows.shape[0]:
            raise ValueError(f"num_rows is {num_rows}; it must be from 0 to the {rows.shape[0]} rows given")
        rows = rows[:num_rows]
    if codec.static != (scale is not None):
        raise ValueError(f"scale is {scale} with static={codec.static}; a static codec needs one, a dynamic one none")
    x = to_float32(rows)
    if scale is None:
        scales = scales_of(amax(x, codec), codec)
    else:
        if not scale > 0:
            raise ValueError(f"scale is {scale}; a static scale must be positive")
        scales = to_float32(torch.full((1, 1), scale, dtype=torch.float64, device=rows.device))
    per_element = expand(scales, codec, *x.shape)
    quotient = _quotient(x, per_element, codec.payload_rule)
    # A finite element of a finite scale has a finite code: 0 / 0 and 0 * inf count as zero.
    spoilt = ~(x.isfinite() & per_element.isfinite())
    quotient = torch.where((quotient.isnan() | (per_element == 0)) & ~spoilt, 0.0, quotient)
    if codec.payload.nan_code is None:
        quotient = torch.where(quotient.isnan(), 0.0, quotient)
    return Quantised(encode(_clamp(quotient, codec), codec.payload, ties=codec.ties), scales)


def _quotient(x: torch.Tensor, scale: torch.Tensor, rule: PayloadRule) -> torch.Tensor:
    """What is rounded to the payload: a float32, in float64."""
    if rule is PayloadRule.DIVIDE:
        return to_float32(x / scale)
    return to_float32(x * to_float32(1 / scale))


def _clamp(quotient: torch.Tensor, codec: Codec) -> torch.Tensor:
    return quotient.clamp(-codec.maximum, codec.maximum)


def dequantise(quantised: Quantised, codec: Codec) -> torch.Tensor:
    """Code times scale, exact in float64, ``[M, N]``."""
    codes = quantised.codes
    return decode(codes, codec.payload) * expand(quantised.scales, codec, *codes.shape)


def undefined_groups(rows: torch.Tensor, codec: Codec) -> torch.Tensor:
    """True for the scales about which nothing is promised, shaped as scales: the group holds NaN or an infinity.

    False throughout with a static scale.
    """
    return ~amax(to_float32(rows), codec).isfinite() & (not codec.static)


def undefined(rows: torch.Tensor, codec: Codec) -> torch.Tensor:
    """True for the elements of ``rows [M, N]`` about which nothing is promised, not even that the result is finite.

    Codes that may be anything while the dequantised value is promised are not among them: :func:`accepted_values` is
    wide there and :func:`half_step` is not.
    """
    if codec.static:
        return ~to_float32(rows).isfinite()
    return expand(undefined_groups(rows, codec), codec, *rows.shape)


def accepted_scales(rows: torch.Tensor, codec: Codec) -> Interval:
    """Every scale that the codec allows for the groups of ``rows [M, N]``.

    One value, except where the largest magnitude or the scale is a float32 subnormal that may be flushed: then the ends
    are the scale and the scale of a flushed group. Unbounded where :func:`undefined_groups`.

    Raises:
        ValueError: the codec is static.
    """
    largest = amax(to_float32(rows), codec)
    known = largest.isfinite()
    largest = torch.where(known, largest, 0.0)
    scale = scales_of(largest, codec)
    lower, upper = scale, scale
    if codec.may_flush:
        small = torch.minimum(largest, unrounded(largest, codec)) < SMALLEST_NORMAL
        flushed = torch.where(small, scales_of(torch.zeros_like(largest), codec), scale)
        lower, upper = torch.minimum(scale, flushed), torch.maximum(scale, flushed)
    return Interval(scale, torch.where(known, lower, -torch.inf), torch.where(known, upper, torch.inf))


def accepted_values(rows: torch.Tensor, scales: torch.Tensor, codec: Codec) -> Interval:
    """Every payload value (decoded code) that the codec allows, given the scales that the backend itself chose.

    Args:
        rows: ``[M, N]``.
        scales: the backend's, float64, shaped as :func:`reference.scales.amax` shapes them.
        codec: how.

    Returns:
        Interval of shape ``[M, N]``. Unbounded where :func:`undefined`, and where a scale is not a finite number from 0
        on, for such a scale is judged by itself.
    """
    x, scale = to_float32(rows), expand(scales.double(), codec, *rows.shape)
    known = ~undefined(rows, codec) & scale.isfinite() & (scale >= 0)
    size, scale = torch.where(known, x.abs(), 0.0), torch.where(known, scale, 1.0)
    value = lower = upper = _code_value(_quotient(size, scale, codec.payload_rule), codec)
    if codec.payload_rule is PayloadRule.APPROXIMATE_RECIPROCAL:
        lower, upper = (_code_value(to_float32(size * end), codec) for end in _reciprocals(scale))
    lower = torch.where(_flushed(size, scale, codec), 0.0, lower)
    # A whole range where no code is promised.
    free, limit = ~known | _any_code(size, scale, codec), torch.where(known, codec.maximum, torch.inf)
    lower, upper = torch.where(free, -limit, lower), torch.where(free, limit, upper)
    minus = x < 0
    ends = torch.where(minus, -upper, lower), torch.where(minus, -lower, upper)
    return Interval(torch.where(minus, -value, value), *ends)


def _code_value(quotient: torch.Tensor, codec: Codec) -> torch.Tensor:
    """Decoded code of a quotient; 0 for 0 / 0 and 0 * inf."""
    clamped = torch.nan_to_num(quotient, nan=0.0, posinf=codec.maximum).clamp(max=codec.maximum)
    return decode(encode(clamped, codec.payload, ties=codec.ties), codec.payload)


def _flushed(size: torch.Tensor, scale: torch.Tensor, codec: Codec) -> torch.Tensor:
    """Elements that a device which flushes subnormals may take for zero, or multiply by zero."""
    if not codec.may_flush:
        return torch.zeros_like(size, dtype=torch.bool)
    subnormal = size < SMALLEST_NORMAL
    if codec.payload_rule is PayloadRule.RECIPROCAL:
        subnormal = subnormal | (to_float32(1 / scale) < SMALLEST_NORMAL)
    elif codec.payload_rule is PayloadRule.APPROXIMATE_RECIPROCAL:
        subnormal = subnormal | (_reciprocals(scale)[0] < SMALLEST_NORMAL)
    return subnormal


def _any_code(size: torch.Tensor, scale: torch.Tensor, codec: Codec) -> torch.Tensor:
    """Elements whose code may be any finite one; ``size`` is |x|, ``scale`` finite and not negative."""
    infinite = scale == 0
    if codec.may_flush:
        infinite = infinite | (scale < SMALLEST_NORMAL)
    if codec.payload_rule is not PayloadRule.DIVIDE:
        # The next float32 has a reciprocal that is finite, even one unit in the last place higher.
        infinite = infinite | (scale <= 2.0**-128)
    return infinite & ((size > 0) | (not codec.zero_codes_defined))


def _reciprocals(scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and greatest float32 within one unit in the last place of ``1 / scale``, as float64.

    Float64 suffices: unless it is one, ``1 / scale`` is at least 2**-48 (relative) away from every float32.
    """
    exact = 1 / scale
    last_place = _power_of_two((torch.frexp(exact)[1] - 24).clamp(min=-149))
    ends = []
    for end, inwards in ((exact - last_place, torch.inf), (exact + last_place, -torch.inf)):
        near = end.float()
        outside = near.double() < end if inwards > 0 else near.double() > end
        ends.append(torch.where(outside, torch.nextafter(near, torch.full_like(near, inwards)), near).double())
    return ends[0], ends[1]


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """2 to the ``exponent``, float64, from its bits."""
    return ((exponent.long().clamp(-1022, 1023) + 1023) << 52).view(torch.float64)


def half_step(rows: torch.Tensor, scales: torch.Tensor, codec: Codec) -> torch.Tensor:
    """Bound on ``|dequantised - x|``, float64 ``[M, N]``, from the spacing of the payload alone.

    With z = |x| / s, the quotient z' that is rounded differs from z by at most e z: one float32 rounding, and before it
    that of the reciprocal if there is one (half a unit in its last place, or a whole one; units of subnormals are
    relatively larger). The code is off z' by at most half the spacing at z' (a whole one if it truncates), which is no
    more than that at z (1 + e); beyond the maximum it is off by what is cut. So |v s - x| <= s (|v - z'| + e z). A
    subnormal quotient has code 0, being below half of any payload's smallest value: there z itself is the error. What
    may be flushed is off by x, and where any code may come out by x + maximum s.
    Infinite where :func:`undefined`, and where a scale is not a finite number from 0 on. Float64 computes the bound and
    an error with some 2**-52 of each, of which e z is the 2**28-fold.
    """
    x, scale = to_float32(rows).abs(), expand(scales.double(), codec, *rows.shape)
    z = torch.where(scale > 0, x / scale, 0.0)
    last_places = {PayloadRule.DIVIDE: 0.0, PayloadRule.RECIPROCAL: 0.5, PayloadRule.APPROXIMATE_RECIPROCAL: 1.0}
    reciprocal = last_places[codec.payload_rule] * (2.0**-149 * scale).clamp(min=2.0**-23)
    relative = (1 + reciprocal) * (1 + _UNIT) - 1
    highest = z * (1 + relative)
    payload = codec.payload
    # frexp's exponent is one above that of IEEE 754.
    exponent = (torch.frexp(highest)[1] - 1).clamp(min=payload.min_exponent)
    spacing = _power_of_two(exponent - payload.mantissa_bits)
    rounding = spacing if codec.ties is Ties.TRUNCATE else spacing / 2
    bound = scale * (torch.maximum(rounding, highest - codec.maximum) + relative * z)
    bound = torch.where(_flushed(x, scale, codec), torch.maximum(bound, x), bound)
    bound = torch.where(_any_code(x, scale, codec), x + codec.maximum * scale, bound)
    return torch.where(undefined(rows, codec) | ~scale.isfinite() | (scale < 0), torch.inf, bound)
