"""Encoding, decoding and rounding of every format, at bit level on integers.

Scope: IEEE 754-2019 §4.3 rounding (to nearest even, ties away, towards zero), saturation, NaN and signed zeros of
:mod:`reference.formats`. No library cast is used, because library casts have been wrong. What a pass does not prove:
anything about a device's own casts.
"""

from __future__ import annotations

import torch

from reference.formats import E8M0_BIAS, E8M0_NAN, FORMATS, Format, Overflow, Ties

_FLOAT64_MANTISSA, _FLOAT64_BIAS = 52, 1023


def encode(
    value: torch.Tensor, to: Format, *, overflow: Overflow = Overflow.SATURATE, ties: Ties = Ties.EVEN
) -> torch.Tensor:
    """Codes of ``value`` (any floating type up to float64, taken exactly), int64 of the same shape.

    NaN becomes the format's NaN with the value's sign, where the format has one. ``overflow`` applies to infinities and
    to what rounds beyond the largest finite value; a finite value never rounds there with ties TRUNCATE (IEEE 754-2019
    §7.4).

    Raises:
        ValueError: ``value`` is no floating tensor, or ``to`` (E2M1) has no NaN and ``value`` holds one or overflows
            under Overflow.IEEE.
    """
    if not value.is_floating_point():
        raise ValueError(f"value is {value.dtype}; encode floating tensors only")
    bits = value.double().view(torch.int64)
    magnitude = bits & 0x7FFFFFFFFFFFFFFF
    exponent = (magnitude >> _FLOAT64_MANTISSA) - _FLOAT64_BIAS
    significand = (magnitude & ((1 << _FLOAT64_MANTISSA) - 1)) | (1 << _FLOAT64_MANTISSA)
    # Float64 subnormals are far below half of any format's smallest value: that they have no leading one is no matter.
    scale = exponent.clamp(min=to.min_exponent)
    drop = (scale - exponent + (_FLOAT64_MANTISSA - to.mantissa_bits)).clamp(max=_FLOAT64_MANTISSA + 3)
    if ties is Ties.EVEN:
        # Half a unit less one, plus the lowest kept bit, carries exactly when the value must round up.
        significand = significand + ((significand >> drop) & 1) + ((1 << (drop - 1)) - 1)
    elif ties is Ties.AWAY:
        significand = significand + (1 << (drop - 1))
    # A carry out of the mantissa lands in the exponent, which is the next binade. Infinity and NaN land beyond all.
    code = ((scale - to.min_exponent) << to.mantissa_bits) + (significand >> drop)
    beyond = value.isinf() if ties is Ties.TRUNCATE else code > to.max_code
    if ties is Ties.TRUNCATE:
        code = code.clamp(max=to.max_code)
    limit = to.max_code if overflow is Overflow.SATURATE else to.infinity_code
    nan = value.isnan()
    if limit is None:
        nan, limit = nan | beyond, 0
    code = code.masked_fill(beyond, limit)
    if to.nan_code is None:
        if bool(nan.any()):
            what = "NaN" if overflow is Overflow.SATURATE else "NaN or overflow"
            raise ValueError(f"value holds {what}, which {to.name} cannot represent; encode finite values, or saturate")
    elif to.negative_zero:
        code = code.masked_fill(nan, to.nan_code)
    signed = code | ((bits >> 63) & to.sign_bit)
    if to.negative_zero:
        return signed
    assert to.nan_code is not None
    return signed.masked_fill(code == 0, 0).masked_fill(nan, to.nan_code)


def decode(codes: torch.Tensor, of: Format) -> torch.Tensor:
    """Values of integer ``codes`` (bits above the format's width are ignored), float64 of the same shape."""
    codes = codes.long() & (2 * of.sign_bit - 1)
    magnitude = codes & (of.sign_bit - 1)
    exponent, mantissa = magnitude >> of.mantissa_bits, magnitude & ((1 << of.mantissa_bits) - 1)
    normal = (
        ((exponent - of.bias + _FLOAT64_BIAS) << _FLOAT64_MANTISSA) | mantissa << (_FLOAT64_MANTISSA - of.mantissa_bits)
    ).view(torch.float64)
    value = torch.where(exponent == 0, mantissa.double() * of.smallest, normal)
    value = torch.where(codes & of.sign_bit != 0, -value, value)
    if not of.negative_zero:
        assert of.nan_code is not None
        return value.masked_fill(codes == of.nan_code, torch.nan)
    if of.infinity_code is not None:
        infinite = torch.copysign(torch.full_like(value, torch.inf), value)
        value = torch.where(magnitude == of.infinity_code, infinite, value)
    if of.nan_code is not None:
        value = value.masked_fill(magnitude > (of.infinity_code or of.max_code), torch.nan)
    return value


def round_to_format(
    value: torch.Tensor, to: Format, *, overflow: Overflow = Overflow.IEEE, ties: Ties = Ties.EVEN
) -> torch.Tensor:
    """``value`` rounded once to ``to``, float64 of the same shape. A store overflows to infinity by default."""
    return decode(encode(value, to, overflow=overflow, ties=ties), to)


def decode_e8m0(codes: torch.Tensor) -> torch.Tensor:
    """Values of E8M0 codes (uint8 or wider), float64: ``2**(code - 127)``, NaN for 255."""
    codes = codes.long() & 0xFF
    value = ((codes + (_FLOAT64_BIAS - E8M0_BIAS)) << _FLOAT64_MANTISSA).view(torch.float64)
    return value.masked_fill(codes == E8M0_NAN, torch.nan)


def format_of(dtype: torch.dtype) -> Format:
    """Format of a torch element type.

    Raises:
        ValueError: no such format is modelled.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in FORMATS:
        raise ValueError(f"no format is modelled for {dtype}; use one of {', '.join(sorted(FORMATS))}")
    return FORMATS[name]


def round_to_bfloat16(value: torch.Tensor) -> torch.Tensor:
    """Round float32 to the nearest bfloat16, ties to even; returned as float32 of the same shape. NaN stays NaN.

    The same as :func:`round_to_format` in a tenth of the time: every combine is stored this way.

    Raises:
        ValueError: ``value`` is not float32; its bits would be misread.
    """
    if value.dtype != torch.float32:
        raise ValueError(f"value is {value.dtype}; round float32 tensors only")
    bits = value.view(torch.int32)
    # Adding half a unit less one, plus the lowest kept bit, carries exactly when the value must round up.
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    return torch.where(value.isnan(), value, rounded.view(torch.float32))


def round_to(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round float32 ``value`` to ``dtype`` (bfloat16, float16 or float32), returned as float32.

    Raises:
        ValueError: another element type.
    """
    if dtype == torch.float32:
        return value
    if dtype == torch.bfloat16:
        return round_to_bfloat16(value)
    if dtype == torch.float16:
        return round_to_format(value, format_of(dtype)).float()
    raise ValueError(f"no rounding to {dtype} is modelled; use torch.bfloat16, torch.float16 or torch.float32")
