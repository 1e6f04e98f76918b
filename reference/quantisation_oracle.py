"""A second derivation of the quantisers: rational scales, and the nearest value of a table.

Scope: every codec whose result is one (:class:`reference.codecs.PayloadRule` DIVIDE and RECIPROCAL). It judges
:mod:`reference.quantisation` and whatever is built on it, and shares no code with it, with :mod:`reference.scales` or
:mod:`reference.rounding`: largest magnitudes come from slices, scales from Python's integers and fractions, quotients
from the processor's float32 arithmetic, codes from comparing with the midpoints of a table that is built here.
What agreeing with it does not prove: that the declared codec is the one a library has.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise

import torch

from reference.codecs import Codec, Granularity, PayloadRule, ScaleFormat, ScaleRule, ZeroScale
from reference.formats import Ties

#: Stored mantissa bits, smallest and largest magnitude of each payload.
_PAYLOADS = {
    "float8_e4m3fn": (3, Fraction(1, 2**9), 448),
    "float8_e4m3fnuz": (3, Fraction(1, 2**10), 240),
    "float8_e5m2": (2, Fraction(1, 2**16), 57344),
    "float8_e5m2fnuz": (2, Fraction(1, 2**17), 57344),
    "float4_e2m1fn": (1, Fraction(1, 2), 6),
}
_LEAST_NORMAL = Fraction(1, 2**126)
_LEAST_POWER = Fraction(1, 2**127)


@lru_cache
def magnitudes(payload: str) -> tuple[Fraction, ...]:
    """Magnitudes of a payload's codes, ascending; an even place is an even code.

    A format with m mantissa bits counts 0, 1, ..., 2**(m+1) in units of its smallest value, then doubles the unit every
    2**m steps.
    """
    mantissa_bits, step, largest = _PAYLOADS[payload]
    found = [Fraction(0)]
    while found[-1] < largest:
        if len(found) > 2**mantissa_bits + 1 and (len(found) - 1) % 2**mantissa_bits == 0:
            step *= 2
        found.append(found[-1] + step)
    assert found[-1] == largest
    return tuple(found)


def quantise(rows: torch.Tensor, codec: Codec, scale: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Payload values and scales of ``rows [M, N]``.

    Args:
        rows: any floating type; wider ones are rounded to float32.
        codec: how.
        scale: of a static codec.

    Returns:
        Values, float64 ``[M, N]``, NaN in groups with NaN or an infinity (with a static scale: at such elements).
        Scales, float64: ``[1, 1]`` per tensor, ``[M, 1]`` per token, ``[M, G]`` per group, ``[ceil(M / block_rows),
        G]`` per block; what is returned for such a group is of no account.

    Raises:
        ValueError: the codec leaves a choice, or its maximum is not a value of its payload.
    """
    if codec.payload_rule is PayloadRule.APPROXIMATE_RECIPROCAL:
        raise ValueError(f"payload rule {codec.payload_rule.name} has no single result; judge it by its acceptance set")
    if Fraction(codec.maximum) not in magnitudes(codec.payload.name):
        raise ValueError(f"maximum is {codec.maximum}, which is no value of {codec.payload.name}")
    x = rows.float()
    tall, wide = x.shape
    height = {Granularity.TENSOR: tall, Granularity.BLOCK: codec.block_rows}.get(codec.granularity, 1)
    width = codec.group or wide
    tops = range(0, tall, max(height, 1)) if codec.granularity is not Granularity.TENSOR else range(1)
    lefts = range(0, wide, width) if codec.group else range(1)
    scales = torch.zeros(len(tops), len(lefts), dtype=torch.float64)
    by_element = torch.ones(tall, wide)
    sizes = x.abs().double()
    for i, top in enumerate(tops):
        for j, left in enumerate(lefts):
            part = (slice(top, top + height), slice(left, left + width))
            tile = sizes[part]
            found = _scale(tile.max().item() if tile.numel() else 0.0, codec) if scale is None else scale
            scales[i, j] = torch.tensor(found, dtype=torch.float32).double()
            by_element[part] = scales[i, j].float()
    return _values(x, by_element, codec), scales


def _values(x: torch.Tensor, scale: torch.Tensor, codec: Codec) -> torch.Tensor:
    """Nearest payload values of float32 ``x`` over or times float32 scales, by element."""
    size = x.abs()
    quotient = size / scale if codec.payload_rule is PayloadRule.DIVIDE else size * (1 / scale)
    defined = x.isfinite() & scale.isfinite()
    # Nothing over nothing, and a finite element whose scale is zero, count as zero.
    quotient = torch.where(defined & ((x == 0) | (scale == 0)), 0.0, quotient).double()
    names = [value for value in magnitudes(codec.payload.name) if value <= codec.maximum]
    table = torch.tensor([float(value) for value in names], dtype=torch.float64)
    middles = torch.tensor([float((a + b) / 2) for a, b in pairwise(names)], dtype=torch.float64)
    below, up_to = torch.bucketize(quotient, middles), torch.bucketize(quotient, middles, right=True)
    if codec.ties is Ties.EVEN:
        place = torch.where((below != up_to) & (below % 2 == 1), up_to, below)
    elif codec.ties is Ties.AWAY:
        place = up_to
    else:
        place = torch.bucketize(quotient, table, right=True) - 1
    value = torch.where(x < 0, -table[place], table[place])
    return torch.where(defined, value, torch.nan)


def _floor_log2(value: Fraction) -> int:
    """Exponent of the largest power of two not above a positive ``value``."""
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    return exponent - (Fraction(2) ** exponent > value)


def _nearest_float32(value: Fraction) -> Fraction:
    """A value from 0 on, rounded to float32's 24 bits, ties to even, without an upper limit."""
    if not value:
        return value
    unit = Fraction(2) ** (max(_floor_log2(value), -126) - 23)
    return round(value / unit) * unit


def _scale(amax: float, codec: Codec) -> float:
    """Scale of a group with this largest magnitude."""
    if not math.isfinite(amax):
        return math.nan if codec.scale_format is not ScaleFormat.FLOAT32 else amax
    largest = max(Fraction(amax), _nearest_float32(Fraction(codec.amax_floor)))
    scale = _power_of_two(largest, codec) if codec.scale_format is not ScaleFormat.FLOAT32 else _linear(largest, codec)
    return 1.0 if not scale and codec.zero_scale is ZeroScale.ONE else float(scale)


def _linear(largest: Fraction, codec: Codec) -> Fraction:
    """The float32 scale."""
    maximum = Fraction(codec.maximum)
    if codec.scale_rule in (ScaleRule.RECIPROCAL, ScaleRule.CEIL_OF_RECIPROCAL):
        scale = _nearest_float32(largest * _nearest_float32(1 / maximum))
    else:
        scale = _nearest_float32(largest / maximum)
    return max(scale, _nearest_float32(Fraction(codec.scale_floor)))


def _power_of_two(largest: Fraction, codec: Codec) -> Fraction:
    """The scale that is a power of two; in between 2**-126 and nothing there is only the smallest byte, 2**-127."""
    nothing = Fraction(0) if codec.scale_format is ScaleFormat.UE8M0_FLOAT32 else _LEAST_POWER
    if not largest:
        return nothing
    rule, power = codec.scale_rule, Fraction(2) ** _floor_log2(Fraction(codec.maximum))
    if rule in (ScaleRule.EVEN, ScaleRule.EVEN_ONE_BIT):
        bits = 1 if rule is ScaleRule.EVEN_ONE_BIT else _PAYLOADS[codec.payload.name][0]
        below = Fraction(2) ** _floor_log2(largest)
        # Above the last value of this binade and half a step, the nearest power of two is the next.
        rounded = 2 * below if largest >= below * (2 - Fraction(1, 2 ** (bits + 1))) else below
        return max(rounded / power, _LEAST_POWER)
    if rule is ScaleRule.DOWN:
        scale = _nearest_float32(largest / power)
        return Fraction(2) ** _floor_log2(scale) if scale >= _LEAST_NORMAL else nothing
    if rule is ScaleRule.CEIL:
        scale = _nearest_float32(largest / power)
    elif rule is ScaleRule.UP:
        scale = _nearest_float32(largest / Fraction(codec.maximum))
    else:
        scale = _linear(largest, codec)
    if not scale:
        return nothing
    below = Fraction(2) ** _floor_log2(scale)
    return max(below if below == scale else 2 * below, _LEAST_NORMAL)
