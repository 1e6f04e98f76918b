"""Rows that sit on the edges of quantisers, and a quantiser that takes every legal choice.

Scope: groups of zeros, subnormals, midpoints, powers of two, thresholds of the scale rules and extreme sizes; scales
and codes in numpy's float32 with a rounding of its own: any reciprocal within one unit in the last place, subnormals
flushed or kept, garbage where garbage is allowed. It shares no code with reference/quantisation.py and
reference/scales.py. It proves nothing by itself; test_quantisation_bounds.py uses it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from reference.codecs import STANDARD, Codec, Granularity, PayloadRule, ScaleFormat, ScaleRule, ZeroScale
from reference.formats import E5M2, E5M2FNUZ, Ties
from reference.quantisation_oracle import magnitudes

Array = npt.NDArray[Any]

#: Columns of the groups that :func:`groups` draws.
WIDTH = 2
_NORMAL = np.float32(2.0**-126)
_token = STANDARD["token_fn"]
#: Kinds that no library has, but that a codec can declare.
UNUSUAL = {
    "away": replace(_token, ties=Ties.AWAY),
    "truncate": replace(_token, ties=Ties.TRUNCATE),
    "flushing division": replace(_token, may_flush=True, zero_scale=ZeroScale.FORMULA),
    "flushing division, garbage": replace(
        _token, may_flush=True, zero_scale=ZeroScale.FORMULA, zero_codes_defined=False
    ),
    "flushing mxfp4": replace(
        STANDARD["mxfp4_up"], payload_rule=PayloadRule.APPROXIMATE_RECIPROCAL, may_flush=True, zero_codes_defined=False
    ),
    "flushing mxfp8, ceil": replace(STANDARD["mxfp8_fn_ceil"], may_flush=True, payload_rule=PayloadRule.RECIPROCAL),
    "unflushed approximation": replace(STANDARD["token_hip_fn"], may_flush=False),
    "power of two of 256": replace(_token, maximum=256.0),
    "static, reciprocal": replace(STANDARD["tensor_static_fn"], payload_rule=PayloadRule.RECIPROCAL),
    "static, flushing approximation": replace(
        STANDARD["tensor_static_fnuz"],
        payload_rule=PayloadRule.APPROXIMATE_RECIPROCAL,
        may_flush=True,
        zero_codes_defined=False,
    ),
    "e5m2": Codec(E5M2, Granularity.TOKEN, E5M2.max),
    "e5m2fnuz": Codec(E5M2FNUZ, Granularity.TOKEN, E5M2FNUZ.max, payload_rule=PayloadRule.RECIPROCAL),
}


def narrowed(codec: Codec) -> Codec:
    """The same codec with groups of :data:`WIDTH` elements, so that many fit."""
    if codec.granularity is Granularity.GROUP:
        return replace(codec, group=WIDTH)
    return replace(codec, group=1, block_rows=WIDTH) if codec.granularity is Granularity.BLOCK else codec


def groups(codec: Codec, count: int, random: np.random.Generator) -> Array:
    """Distinct finite groups, ``[count, WIDTH]`` float32."""
    each = count // 5
    exponents = np.exp2(random.integers(-130, 127, (each, 1)).astype(np.float64))
    table = np.array([float(m) for m in magnitudes(codec.payload.name)])
    middles = (table[1:] + table[:-1]) / 2
    top = codec.maximum
    # With the maximum in the group the scale is a power of two, and these are midpoints of codes.
    on_midpoints = random.choice(middles, (each, WIDTH))
    on_midpoints[:, 0] = top
    # Magnitudes at which some scale rule takes the next power of two, and their neighbours.
    turns = np.array([1.0, 1.25, 1.5, 1.75, 1.9375, 1.9990234375, top / 2.0**codec.power])
    edge = random.standard_normal((each, WIDTH)) * 0.4
    edge[:, 0] = random.choice(turns, each)
    edge = _neighbours(edge * exponents, random)
    drawn = [
        random.standard_normal((each, WIDTH)) * exponents,
        on_midpoints * np.exp2(random.integers(-110, 100, (each, 1)).astype(np.float64)),
        edge,
        _neighbours(on_midpoints * np.exp2(random.integers(-110, 100, (each, 1)).astype(np.float64)), random),
        random.integers(0, 0x7F80, (each, WIDTH)).astype(np.uint32).__lshift__(16).view(np.float32),  # bfloat16
        random.integers(0, 0x7F800000, (each, WIDTH), dtype=np.uint32).view(np.float32),
        random.integers(0, 2**24, (each, WIDTH), dtype=np.uint32).view(np.float32),  # subnormal, or nearly
        random.choice([0.0, 2.0**-149, 2.0**-133, 2.0**-126, 1.0, top], (each // 8, WIDTH))
        * np.exp2(random.integers(-8, 8, (each // 8, 1)).astype(np.float64)),
    ]
    with np.errstate(over="ignore", under="ignore"):
        rows = np.concatenate([part.astype(np.float32) for part in drawn])
    rows = rows * random.choice(np.array([-1, 1], np.float32), rows.shape)
    rows = np.where(np.isfinite(rows), rows, np.finfo(np.float32).max)
    found: Array = np.unique(rows, axis=0)
    random.shuffle(found)
    return found[:count]


def _neighbours(value: Array, random: np.random.Generator) -> Array:
    with np.errstate(over="ignore", under="ignore"):
        single = value.astype(np.float32)
        towards = random.choice(np.array([-np.inf, np.nan, np.inf], np.float32), single.shape)
        return np.where(np.isnan(towards), single, np.nextafter(single, towards))


@dataclass(frozen=True)
class Choice:
    """One way to be legal."""

    flush_scale: bool = False
    flush_payload: bool = False
    reciprocal: int = 0  # float32 steps away from the nearest
    garbage: int = 0  # place in the table where any code is allowed


def choices(codec: Codec) -> Iterator[Choice]:
    """Every choice the codec leaves."""
    steps = range(-2, 3) if codec.payload_rule is PayloadRule.APPROXIMATE_RECIPROCAL else range(1)
    flags = (False, True) if codec.may_flush else (False,)
    for step in steps:
        for scale in flags:
            for payload in flags:
                yield Choice(scale, payload, step, (step + 2 * scale + payload) % 3 - 1)


def _flush(value: Array, really: bool) -> Array:
    return np.where(np.abs(value) < _NORMAL, value * 0, value) if really else value


def scale_of(largest: Array, codec: Codec, choice: Choice) -> Array:
    """A legal scale of each group, float32 ``[...]``; E8M0's 2**-127 is a float32 too."""
    one, top = np.float32(1), np.float32(codec.maximum)
    power = np.float32(2.0 ** np.floor(np.log2(codec.maximum)))
    rule, floor = codec.scale_rule, np.float32(codec.amax_floor)
    largest = np.maximum(_flush(largest, choice.flush_scale), floor)
    if rule in (ScaleRule.RECIPROCAL, ScaleRule.CEIL_OF_RECIPROCAL):
        scale = largest * (one / top)
    elif rule in (ScaleRule.DOWN, ScaleRule.CEIL):
        scale = largest / power
    elif rule in (ScaleRule.EVEN, ScaleRule.EVEN_ONE_BIT):
        bits = 1 if rule is ScaleRule.EVEN_ONE_BIT else codec.payload.mantissa_bits
        mantissa, exponent = np.frexp(largest)
        # 0.5 <= mantissa < 1; half a step below 1 it rounds to 1.
        carried = exponent + (mantissa >= 1 - 2.0 ** -(bits + 2))
        scale = np.where(largest > 0, np.ldexp(1.0, carried - 1) / power, 0)
        least: Array = np.maximum(scale, 2.0**-127).astype(np.float32)
        return least
    else:
        scale = largest / top
    scale = np.maximum(_flush(scale, choice.flush_scale), np.float32(codec.scale_floor))
    if codec.scale_format is not ScaleFormat.FLOAT32:
        mantissa, exponent = np.frexp(scale)
        up = (mantissa != 0.5) & (rule is not ScaleRule.DOWN)
        tiny = 2.0**-127 if rule is ScaleRule.DOWN else 2.0**-126
        nothing = 0.0 if codec.scale_format is ScaleFormat.UE8M0_FLOAT32 else 2.0**-127
        found = np.ldexp(1.0, exponent - 1 + up)
        scale = np.where(scale > 0, np.where(scale < _NORMAL, tiny, found), nothing).astype(np.float32)
    chosen: Array = np.where((scale == 0) & (codec.zero_scale is ZeroScale.ONE), one, scale)
    return chosen


def values_of(rows: Array, scale: Array, codec: Codec, choice: Choice) -> Array:
    """Legal payload values of ``rows``, given a float32 scale for each element; float64."""
    size = _flush(np.abs(rows), choice.flush_payload)
    used = _flush(scale, choice.flush_payload)
    with np.errstate(all="ignore"):
        if codec.payload_rule is PayloadRule.DIVIDE:
            quotient = size / used
        else:
            reciprocal = _flush(_moved(used, choice.reciprocal), choice.flush_payload)
            quotient = size * reciprocal
        quotient = _flush(quotient, choice.flush_payload)
    table = np.array([float(m) for m in magnitudes(codec.payload.name) if m <= codec.maximum])
    garbage = np.where(size > 0, table[choice.garbage], table[choice.garbage] * (not codec.zero_codes_defined))
    value = np.where(np.isnan(quotient), garbage, _nearest(quotient.astype(np.float64), table, codec.ties))
    return np.where(np.signbit(rows), -value, value)


def _moved(scale: Array, steps: int) -> Array:
    """The float32 nearest to ``1 / scale``, moved by ``steps`` where that is within a unit in the last place."""
    nearest = np.float32(1) / scale
    moved = nearest
    for _ in range(abs(steps)):
        moved = np.nextafter(moved, np.float32(np.copysign(np.inf, steps)))
    # r * s - 1 is exact with 64 bits of significand, and so is a unit of 1 / s (which is below a power of two) times s.
    exact = np.longdouble(1) / scale.astype(np.longdouble)
    unit = np.exp2(np.maximum(np.frexp(exact)[1] - 24, -149).astype(np.longdouble))
    off = np.abs(moved.astype(np.longdouble) * scale.astype(np.longdouble) - 1)
    legal = off <= unit * scale.astype(np.longdouble)
    chosen: Array = np.where(legal & np.isfinite(nearest), moved, nearest)
    return chosen


def _nearest(quotient: Array, table: Array, ties: Ties) -> Array:
    """Entries of the table by comparing with both neighbours; an even place is an even code."""
    above = np.clip(np.searchsorted(table, quotient), 1, len(table) - 1)
    low, high = table[above - 1], table[above]
    clipped = np.clip(quotient, 0, table[-1])
    to_high = high - clipped < clipped - low
    tie = high - clipped == clipped - low
    if ties is Ties.TRUNCATE:
        to_high = clipped >= high
    elif ties is Ties.AWAY:
        to_high |= tie
    else:
        to_high |= tie & (above % 2 == 0)
    return np.where(to_high, high, low)
