"""Ranges of float32 numbers for the oracle of the experts: GEMMs, activations, quantisers, roundings.

Scope: what :mod:`reference.expert_oracle` is built from. A range is ``[low, high]`` in float64, widened by the error
that an operation may make, a little more than it is so that float64's own is covered; a rounding is a monotone step of
its ends, done by scaling; codes are decoded from a table of exact fractions. It shares no code with
:mod:`reference.intervals`, :mod:`reference.rounding`, :mod:`reference.scales` or :mod:`reference.quantisation`.
What ranges do not prove: that any number in them comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache

import torch

from reference.codecs import Codec, Granularity, PayloadRule, ScaleFormat, ScaleRule
from reference.expert_numerics import SWIGLU_ALPHA, Activation, ExpertNumerics
from reference.formats import FLOAT32, Format, Ties

UNIT = 2.0**-24
#: Of one rounding to float32, and what float64 loses beside it.
ROUNDING = UNIT * (1 + 2.0**-20)
#: More than a float32 step loses where numbers are subnormal, flushed or not.
_TINY = 2.0**-125
#: Scales below it: a subnormal may be lost beside them, in more than one way. Far below any scale that matters.
_TINY_SCALE = 2.0**-100
#: Where x * sigmoid(x) and x * (1 + erf(x / sqrt 2)) / 2 are least.
_LEAST_AT = {Activation.SILU: -1.2784645427610738, Activation.GELU: -0.7517915241935645}
_LEAST_AT[Activation.SWIGLU] = _LEAST_AT[Activation.SILU] / SWIGLU_ALPHA
_POWERS = torch.tensor([2.0**k for k in range(-1074, 1024)], dtype=torch.float64)


@dataclass
class Range:
    """Numbers in ``[low, high]``, float64; ``value`` is the exact one, stored where the numerics say.

    With ``joint [M, G]`` the numbers of group g of a row are all times one ``1 + d``, ``|d| <= joint``: of their scale
    only so much is known. Only :func:`requantised` gives it, and only a GEMM takes it.
    """

    value: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    joint: torch.Tensor | None = None

    @classmethod
    def point(cls, value: torch.Tensor) -> Range:
        return cls(value, value, value)

    @property
    def is_point(self) -> bool:
        return self.low is self.high

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Range:
        """A non-decreasing ``change`` of every number."""
        return (
            Range.point(change(self.value)) if self.is_point else Range(*map(change, (self.value, self.low, self.high)))
        )

    def rows(self, index: torch.Tensor) -> Range:
        """Rows by number, repeated or left out."""
        picked = self.each(lambda end: end[index])
        return picked if self.joint is None else replace(picked, joint=self.joint[index])

    def stored(self, of: Format | None, ulps: float = 0.5) -> Range:
        """Rounded to nearest, or with 1 ulp to either neighbour."""
        if of is None:
            return self
        if ulps == 0.5:
            return self.each(lambda end: nearest(end, of))
        low, high = (spacing(end, of) for end in (self.low, self.high))
        return Range(nearest(self.value, of), (self.low / low).floor() * low, (self.high / high).ceil() * high)

    def off(self, slack: torch.Tensor) -> Range:
        return Range(self.value, self.low - slack, self.high + slack)

    def size(self) -> torch.Tensor:
        return self.low.abs() if self.is_point else torch.maximum(-self.low, self.high)

    def times(self, factor: torch.Tensor) -> Range:
        """The float32 product with numbers that are known."""
        ends = self.low * factor, self.high * factor
        product = Range(self.value * factor, torch.minimum(*ends), torch.maximum(*ends))
        return product.off(product.size() * ROUNDING + underflow(product.size()))


def of_parts(magnitude: torch.Tensor, parts: int, each: Format, added: Format | None, ulps: float) -> torch.Tensor:
    """What is lost if a sum is made of parts, each rounded, and these are added in a format, up to the last addition.

    ``added`` None: the additions are counted elsewhere.

    A rounding loses a share of the part, or of a subnormal a share of the least number; the parts add up to no more
    than ``magnitude``.
    """
    share = gamma(torch.tensor(1.0), ulps * 2.0**-each.mantissa_bits)
    if added is not None:
        further = gamma(torch.tensor(max(parts - 2.0, 0.0)), ulps * 2.0**-added.mantissa_bits)
        share = share + further + share * further
    return share * magnitude + parts * each.smallest * (magnitude != 0)


def gemm(
    x: Range, parts: Sequence[tuple[torch.Tensor, torch.Tensor | None, slice]], numerics: ExpertNumerics
) -> tuple[Range, torch.Tensor]:
    """``x [S, K]`` times the transpose of each part's matrix ``[N, K]`` in its rows of x, plus its bias ``[N]``.

    And a bound of the sum of magnitudes, where the numerics have partial sums.
    """
    depth = x.value.shape[1]
    lost = gamma(torch.tensor(depth + 1.0 + numerics.scale_roundings), numerics.accumulator_ulps * 2 * UNIT)
    full = x.size() if x.joint is None else x.size() * (1 + x.joint.amax(1, keepdim=True))
    size, middle, split = full * lost, x.value, numerics.gemm1_partial is not None or numerics.inner_parts > 1
    if not x.is_point:
        middle, size = (x.low + x.high) / 2, size + (x.high - x.low) / 2
    found, magnitudes = [], []
    for matrix, bias, where in parts:
        across = matrix.t()
        centre, reach = middle[where] @ across, size[where] @ across.abs()
        value = centre if x.is_point else x.value[where] @ across
        if x.joint is not None:
            joint = x.joint[where]
            reach = reach * (1 + joint.amax(1, keepdim=True))
            width = -(-depth // joint.shape[1])
            for group, start in enumerate(range(0, depth, width)):
                cut = slice(start, start + width)
                reach = reach + joint[:, group : group + 1] * (middle[where, cut] @ across[cut]).abs()
        if bias is not None:
            value, centre, reach = value + bias, centre + bias, reach + lost * bias.abs()
        reach = reach + depth * underflow(reach)
        found.append(Range(value, centre - reach, centre + reach))
        sizes = full[where] @ across.abs() * (1 + 2 * lost) if split else torch.zeros_like(value)
        magnitudes.append(sizes if bias is None else sizes + bias.abs())
    total = Range(*(torch.cat([getattr(part, end) for part in found]) for end in ("value", "low", "high")))
    return total, torch.cat(magnitudes)


def activated(gate: Range, up: Range, numerics: ExpertNumerics) -> Range:
    """The activation of float32 gate and up."""
    kind, limit = numerics.activation, numerics.limit
    if limit is not None:
        gate, up = gate.each(lambda end: end.clamp(max=limit)), up.each(lambda end: end.clamp(-limit, limit))

    def curve(at: torch.Tensor) -> torch.Tensor:
        if kind is Activation.GELU:
            twice: torch.Tensor = at * torch.special.erfc(-at * 0.5**0.5)
            return twice / 2
        return at * torch.sigmoid(at * (SWIGLU_ALPHA if kind is Activation.SWIGLU else 1.0))

    # Falling up to its minimum, rising from there on.
    least = curve(torch.full_like(gate.low, _LEAST_AT[kind]).clamp(gate.low, gate.high))
    most = torch.maximum(curve(gate.low), curve(gate.high))
    reach = gate.size()
    relative = torch.full_like(reach, 4 * ROUNDING)
    absolute = 2.0**-126 * reach
    if kind is Activation.GELU:
        # Of a result up to 1, and of its argument, whose slope times itself is below 1/2; then one addition.
        absolute = absolute + reach / 2 * (numerics.function_ulps + 2) * 2 * ROUNDING
    else:
        relative = relative + numerics.function_ulps * 2 * ROUNDING
        if kind is Activation.SWIGLU:
            # The slope and its product move the argument; the sigmoid moves by no more than the exponential.
            relative = relative + torch.expm1(SWIGLU_ALPHA * reach * 3 * ROUNDING)
    slack = relative * torch.maximum(least.abs(), most.abs()) + absolute
    gated = Range(curve(gate.value), least - slack, most + slack)
    if kind is Activation.SWIGLU:
        up = up.each(lambda end: end + 1)
        up = up.off(up.size() * ROUNDING)
    corners = [a * b for a in (gated.low, gated.high) for b in (up.low, up.high)]
    low = torch.minimum(torch.minimum(*corners[:2]), torch.minimum(*corners[2:]))
    high = torch.maximum(torch.maximum(*corners[:2]), torch.maximum(*corners[2:]))
    product = Range(gated.value * up.value, low, high)
    return product.off(underflow(product.size()))


def requantised(x: Range, codec: Codec, any_group: bool = False) -> Range:
    """Code times scale of every legal quantiser of float32 numbers in ``x [M, N]``.

    The scale lies between those of the least and the greatest largest magnitude of its group, as every rule is
    monotone in it. Powers of two that are at most a factor of two apart are tried out. Otherwise a code is between
    those of both ends with either scale; and, whatever the scale, off x by half a step of the payload: that is at most
    half of ``|x|`` in its last kept bit, half a least step, or what lies beyond the maximum. Float32 scales that are
    known well are taken at the middle of their range, and the rest is ``joint``.

    With ``any_group`` an element's scale may be that of any part of its group that holds it.
    """
    size = x.size()
    inside = size if x.is_point else torch.maximum(x.low, -x.high).clamp(min=0)
    exact = size if x.is_point else x.value.abs()
    columns = x.value.shape[1]
    low_scale, high_scale, scale = (
        _spread(_scale(_largest(end, codec), codec), codec, columns) for end in (inside, size, exact)
    )
    if any_group:
        low_scale = _scale(inside, codec)
    certain = x.is_point and not any_group
    doubtful = low_scale < _TINY_SCALE
    some_doubtful = bool(doubtful.any())
    # Where all of a group is zero, a scale that divides nothing.
    below, above, by = (torch.where(s < _TINY_SCALE, 1.0, s) for s in (low_scale, high_scale, scale))
    value = torch.where(scale < _TINY_SCALE, 0.0, _code(x.value, by, codec, 0) * by)
    if certain and codec.payload_rule is not PayloadRule.APPROXIMATE_RECIPROCAL and not some_doubtful:
        return Range.point(value)
    scales = [below] if certain else [below, above]
    lows, highs = ([_code(end, s, codec, way) for s in scales] for end, way in ((x.low, -1), (x.high, 1)))
    lowest, highest = torch.minimum(lows[0], lows[-1]), torch.maximum(highs[0], highs[-1])
    # A reciprocal within a unit in the last place and the quotient move x by less than 4u of it.
    near, payload = size * (1 + 8 * ROUNDING), codec.payload
    step = torch.maximum(near * 2.0**-payload.mantissa_bits, high_scale * payload.smallest)
    error = torch.maximum(step if codec.ties is Ties.TRUNCATE else step / 2, near - codec.maximum * low_scale)
    error = error + 8 * ROUNDING * near
    around = x.low - error, x.high + error
    low, high = torch.minimum(lowest * below, lowest * above), torch.maximum(highest * below, highest * above)
    if codec.scale_format is not ScaleFormat.FLOAT32:
        tried = above <= 2 * below
        low = torch.where(tried, torch.minimum(lows[0] * below, lows[-1] * above), low)
        high = torch.where(tried, torch.maximum(highs[0] * below, highs[-1] * above), high)
    low, high = torch.maximum(low, around[0]), torch.minimum(high, around[1])
    joint = torch.zeros_like(low)
    if codec.scale_format is ScaleFormat.FLOAT32 and not certain and not any_group:
        middle, known = (below + above) / 2, (above <= 1.25 * below) & ~doubtful
        joint = torch.where(known, (above - below) / (2 * middle) * (1 + 2.0**-40), 0.0)
        apart = 2 * joint * (size + error)
        low = torch.where(known, torch.maximum(lowest * middle, around[0] - apart), low)
        high = torch.where(known, torch.minimum(highest * middle, around[1] + apart), high)
    if some_doubtful:
        # Beside a tiny scale all of its group may be lost, or come out as any code.
        lost = 4 * _TINY_SCALE * codec.maximum
        nothing = size == 0 if codec.zero_codes_defined else (size == 0) & (high_scale == 0)
        low = torch.where(doubtful, around[0] - lost, low).masked_fill(nothing, 0.0)
        high = torch.where(doubtful, around[1] + lost, high).masked_fill(nothing, 0.0)
    return Range(value, low, high, joint[:, :: codec.group or columns] if bool(joint.any()) else None)


def _largest(size: torch.Tensor, codec: Codec) -> torch.Tensor:
    """Largest magnitude of each group, ``[M, G]``."""
    group = codec.group or size.shape[1]
    filled = torch.nn.functional.pad(size, (0, -size.shape[1] % group))
    return filled.reshape(size.shape[0], filled.shape[1] // group, group).amax(2)


def _spread(by_group: torch.Tensor, codec: Codec, columns: int) -> torch.Tensor:
    """Each group's number at each of its elements, ``[M, columns]``."""
    return by_group.repeat_interleave(codec.group or columns, 1)[:, :columns]


def _scale(largest: torch.Tensor, codec: Codec) -> torch.Tensor:
    """What the scale rule makes of largest magnitudes, in the processor's float32; ``zero_scale`` left aside."""
    top, power = torch.tensor(codec.maximum), 2.0**codec.power
    largest = largest.float().clamp(min=torch.tensor(codec.amax_floor))
    rule = codec.scale_rule
    if rule in (ScaleRule.EVEN, ScaleRule.EVEN_ONE_BIT):
        bits = 1 if rule is ScaleRule.EVEN_ONE_BIT else codec.payload.mantissa_bits
        mantissa, exponent = torch.frexp(largest.double())
        # 0.5 <= mantissa < 1: half a step below 1 it rounds to 1.
        carried = exponent + (mantissa >= 1 - 2.0 ** -(bits + 2)).int() - 1
        return (torch.where(largest > 0, _power(carried), 0.0) / power).clamp(min=2.0**-127)
    if rule in (ScaleRule.RECIPROCAL, ScaleRule.CEIL_OF_RECIPROCAL):
        ratio = largest * (1 / top)
    else:
        ratio = largest / (power if rule in (ScaleRule.DOWN, ScaleRule.CEIL) else top)
    ratio = ratio.clamp(min=torch.tensor(codec.scale_floor)).double()
    if codec.scale_format is ScaleFormat.FLOAT32:
        return ratio
    mantissa, exponent = torch.frexp(ratio)
    if rule is ScaleRule.DOWN:
        found = torch.where(ratio < 2.0**-126, 0.0, _power(exponent - 1))
    else:
        found = torch.where(ratio > 0, _power(exponent - (mantissa == 0.5).int()).clamp(min=2.0**-126), 0.0)
    return found if codec.scale_format is ScaleFormat.UE8M0_FLOAT32 else found.clamp(min=2.0**-127)


def _code(x: torch.Tensor, scale: torch.Tensor, codec: Codec, way: int) -> torch.Tensor:
    """Decoded code of ``x``; the highest legal one with ``way`` 1, the lowest with -1."""
    if codec.payload_rule is PayloadRule.DIVIDE:
        quotient = x / scale
    elif codec.payload_rule is PayloadRule.RECIPROCAL:
        quotient = x * (1 / scale).float()
    else:
        quotient = x * _reciprocal(scale, torch.sign(x) * way)
    quotient = quotient.float().double().clamp(-codec.maximum, codec.maximum)
    return nearest(quotient, codec.payload, codec.ties)


def _reciprocal(scale: torch.Tensor, way: torch.Tensor) -> torch.Tensor:
    """The float32 furthest up (1) or down (-1) that is within a unit in the last place of ``1 / scale``."""
    exact = 1 / scale
    end = exact + way * spacing(exact, FLOAT32)
    near = end.float()
    beyond = (near.double() - end) * way > 0
    return torch.where(beyond, torch.nextafter(near, exact.float()), near).double()


def nearest(value: torch.Tensor, of: Format, ties: Ties = Ties.EVEN) -> torch.Tensor:
    """Float64 ``value`` rounded to the nearest number of a format; beyond the largest, to infinity."""
    if of is FLOAT32:
        return value.float().double()
    quantum = spacing(value, of)
    steps = value / quantum
    if ties is Ties.EVEN:
        whole = torch.round(steps)
    else:
        whole = torch.trunc(steps) if ties is Ties.TRUNCATE else torch.trunc(steps + torch.sign(steps) / 2)
    rounded = whole * quantum
    return torch.where(rounded.abs() > of.max, torch.copysign(torch.full_like(value, torch.inf), value), rounded)


def spacing(value: torch.Tensor, of: Format) -> torch.Tensor:
    """Distance between neighbours in a format, in the binade of ``value``."""
    # value = m * 2**exponent with 0.5 <= |m| < 1, so the last kept bit weighs 2**(exponent - bits).
    return _power(torch.frexp(value)[1].clamp(min=of.min_exponent + 1) - (of.mantissa_bits + 1))


def _power(exponent: torch.Tensor) -> torch.Tensor:
    """2 to the integer ``exponent``, exactly."""
    return _POWERS[exponent.long() + 1074]


def gamma(roundings: torch.Tensor, unit: float) -> torch.Tensor:
    """Largest ``|(1 + d_1) ... (1 + d_n) - 1|`` with ``|d_i| <= unit``: at most ``n u / (1 - n u)``."""
    n = roundings.double() * unit
    return n / (1 - n)


def underflow(magnitude: torch.Tensor) -> torch.Tensor:
    """What subnormals may lose beside numbers that are not exactly zero."""
    return (magnitude != 0).double() * _TINY


@cache
def _table(of: Format) -> torch.Tensor:
    """Values of all codes of a format of at most 8 bits, from fractions."""
    values: list[float] = []
    for code in range(2**of.bits):
        magnitude = code % of.sign_bit
        exponent, mantissa = divmod(magnitude, 2**of.mantissa_bits)
        part = Fraction(mantissa, 2**of.mantissa_bits)
        size = (1 + part) * Fraction(2) ** (exponent - of.bias) if exponent else part * Fraction(2) ** (1 - of.bias)
        value = -float(size) if code >= of.sign_bit else float(size)
        special = code == of.nan_code if not of.negative_zero else magnitude > of.max_code
        if magnitude == of.infinity_code:
            value, special = value * float("inf"), False
        values.append(float("nan") if special else value)
    return torch.tensor(values, dtype=torch.float64)


def dequantised(stored: torch.Tensor, scales: torch.Tensor | None, codec: Codec | None) -> torch.Tensor:
    """One stored matrix ``[N, K]`` in float64."""
    if codec is None or scales is None:
        return stored.double()
    rows, columns = stored.shape
    tall = {Granularity.TENSOR: rows, Granularity.BLOCK: codec.block_rows}.get(codec.granularity, 1)
    by_row = scales.repeat_interleave(tall, 0)[:rows]
    return _table(codec.payload)[stored.long()] * by_row.repeat_interleave(codec.group or columns, 1)[:, :columns]
