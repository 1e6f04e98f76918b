"""Acceptance intervals that compose, from the inputs of an operation to every result a legal implementation may give.

Scope: the type, its arithmetic on real numbers and its roundings, element by element (OpenGL CTS and WebGPU CTS state
acceptance the same way). ``+ - * /`` are exact mathematics; what a device does to a result is said by a rounding after
it: ``(a + b).round_float32()`` is a float32 addition, ``(a * b + c).round_float32()`` a fused multiply-add, and where a
device may do either, the hull of both. Rounding is monotone, so rounding the ends is sound. Sums of many terms, whose
order is free, are in :mod:`reference.sums`.

Evaluation: ends are float64 and rounded outwards, by one unit in the last place of float64 wherever an operation is
not exact there, so a point stays a point while its arithmetic is exact. Magnitudes are taken to be zero or within
2**-500 to 2**500, which every product of two float32 numbers is. NaN stays NaN, and no result conforms to it.
What an accepted result does not prove: that it is the exact one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from reference.formats import BFLOAT16, FLOAT32, Format, Overflow, Ties
from reference.rounding import round_to_bfloat16, round_to_format

UNIT_FLOAT64 = 2.0**-53
#: Least normal float32: below, a device that flushes subnormals takes a number for zero.
FLOAT32_NORMAL = 2.0**-126


@dataclass
class Interval:
    """Every result in ``[lower, upper]`` is acceptable; ``value`` is the exact result, stored as the contract says.

    All float64, same shape; ``lower <= value <= upper``. The three may be one tensor: do not write into them.
    """

    value: torch.Tensor
    lower: torch.Tensor
    upper: torch.Tensor

    @classmethod
    def exact(cls, value: torch.Tensor) -> Interval:
        """The point ``value``, any floating type."""
        wide = value.double()
        return cls(wide, wide, wide)

    @property
    def is_point(self) -> bool:
        """True if the interval was made of one tensor. False says nothing: its ends may still be equal."""
        return self.lower is self.upper

    @property
    def shape(self) -> torch.Size:
        """Shape of the results."""
        return self.value.shape

    def apply(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Interval:
        """``change``, non-decreasing in every element (a reshape, a slice, a rounding, a clamp), done to each end."""
        value = change(self.value)
        return (
            Interval(value, value, value) if self.is_point else Interval(value, change(self.lower), change(self.upper))
        )

    def __add__(self, other: Interval | float) -> Interval:
        """The real sum."""
        other = _lift(other, self)
        total, error = _two_sum(self.lower, other.lower)
        lower = _stepped(total, error, down=True)
        if self.is_point and other.is_point:
            exact = not bool((error != 0).any())
            return (
                Interval(total, total, total) if exact else Interval(total, lower, _stepped(total, error, down=False))
            )
        return Interval(self.value + other.value, lower, _stepped(*_two_sum(self.upper, other.upper), down=False))

    __radd__ = __add__

    def __neg__(self) -> Interval:
        """The opposite."""
        value = -self.value
        return Interval(value, value, value) if self.is_point else Interval(value, -self.upper, -self.lower)

    def __sub__(self, other: Interval | float) -> Interval:
        """The real difference."""
        return self + -_lift(other, self)

    def __mul__(self, other: Interval | float) -> Interval:
        """The real product; ``x * x`` is wider than :meth:`square`."""
        other = _lift(other, self)
        value = self.value * other.value
        exact = self._is_short() & other._is_short()
        if self.is_point and other.is_point:
            if bool(exact.all()):
                return Interval(value, value, value)
            return Interval(value, *_outward(value, value, exact))
        ends = [a * b for a in (self.lower, self.upper) for b in (other.lower, other.upper)]
        return Interval(value, *_outward(*_least_and_most(ends), exact))

    __rmul__ = __mul__

    def __truediv__(self, other: Interval | float) -> Interval:
        """The real quotient.

        Raises:
            ValueError: an element of ``other`` may be zero.
        """
        other = _lift(other, self)
        if bool(((other.lower <= 0) & (other.upper >= 0)).any()):
            raise ValueError("an element of the divisor may be 0; divide only where its interval excludes 0")
        value = self.value / other.value
        if self.is_point and other.is_point:
            # Exact where the product gives the dividend back.
            exact = _is_short(value) & _is_short(other.value) & (value * other.value == self.value)
            return Interval(value, *_outward(value, value, exact))
        ends = [a / b for a in (self.lower, self.upper) for b in (other.lower, other.upper)]
        power = (other.lower == other.upper) & (torch.frexp(other.lower).mantissa.abs() == 0.5)
        return Interval(value, *_outward(*_least_and_most(ends), power))

    def abs(self) -> Interval:
        """The magnitude."""
        value = self.value.abs()
        if self.is_point:
            return Interval(value, value, value)
        upper = torch.maximum(-self.lower, self.upper)
        return Interval(value, torch.maximum(self.lower, -self.upper).clamp(min=0), upper)

    def square(self) -> Interval:
        """The real square."""
        size = self.abs()
        exact = self._is_short()
        low, high = _outward(size.lower.square(), size.upper.square(), exact)
        return Interval(self.value.square(), low.clamp(min=0), high)

    def maximum(self, other: Interval | float) -> Interval:
        """The larger of two, element by element."""
        other = _lift(other, self)
        ends = ((self.value, other.value), (self.lower, other.lower), (self.upper, other.upper))
        return Interval(*(torch.maximum(a, b) for a, b in ends))

    def amax(self, dim: int, *, keepdim: bool = False) -> Interval:
        """The largest along ``dim``."""
        return self.apply(lambda end: end.amax(dim, keepdim=keepdim))

    def sqrt(self, *, ulps: float = 0.5) -> Interval:
        """The float32 square root with an error of at most ``ulps`` units in the last place; 0.5 is to nearest."""
        root = self.apply(lambda end: end.clamp(min=0).sqrt())
        # Correctly rounded in float64; exact where the square of a short root gives the argument back.
        exact = _is_short(root.lower) & _is_short(root.upper)
        exact &= (root.lower.square() == self.lower) & (root.upper.square() == self.upper)
        return Interval(root.value, *_outward(root.lower, root.upper, exact))._as_float32(ulps)

    def rsqrt(self, *, ulps: float) -> Interval:
        """The float32 inverse square root, off by at most ``ulps`` units in the last place; infinite at zero."""
        root = self.apply(lambda end: end.clamp(min=0).sqrt())
        # Two float64 roundings: at most 2 units each way.
        low, high = _outward(*_outward(1 / root.upper, 1 / root.lower))
        return Interval(1 / root.value, low, high)._as_float32(ulps)

    def _as_float32(self, ulps: float) -> Interval:
        """Results of a float32 function whose exact ones are these."""
        return self.round_float32() if ulps == 0.5 else self.within_ulps(ulps)

    def within_ulps(self, ulps: float, of: Format = FLOAT32) -> Interval:
        """Numbers of ``of`` at most ``ulps`` units in the last place from an exact result; 1 or more."""
        # The unit of the largest exact result: that of the ends alone would miss a power of two between them.
        unit = _spacing(torch.maximum(self.lower.abs(), self.upper.abs()).clamp(max=of.max), of)
        low, high = _outward(self.lower - ulps * unit, self.upper + ulps * unit)
        value = nearest(self.value, of, Ties.EVEN, Overflow.IEEE)
        return Interval(value, torch.minimum(low, value), torch.maximum(high, value))

    def widened(self, relative: float | torch.Tensor = 0.0, absolute: float | torch.Tensor = 0.0) -> Interval:
        """Results off by at most ``relative`` (below 1) of the exact one plus ``absolute``."""
        ends = []
        for end, sign in ((self.lower, -1.0), (self.upper, 1.0)):
            distance = end.abs() * relative + absolute
            _, more = _outward(*_outward(distance, distance))  # zero, and nothing else, stays
            moved = end + sign * more
            beyond = torch.nextafter(moved, torch.full_like(moved, sign * torch.inf))
            ends.append(torch.where(more == 0, end, beyond))
        return Interval(self.value, *ends)

    def hull(self, other: Interval) -> Interval:
        """Results of one or of the other; the declared value is this one's."""
        return Interval(self.value, torch.minimum(self.lower, other.lower), torch.maximum(self.upper, other.upper))

    def flushed(self) -> Interval:
        """Results that, where subnormal in float32, may be taken for zero."""
        tiny = (self.lower < FLOAT32_NORMAL) & (self.upper > -FLOAT32_NORMAL) & ((self.lower != 0) | (self.upper != 0))
        if not bool(tiny.any()):
            return self
        low = torch.where(tiny, self.lower.clamp(max=0), self.lower)
        return Interval(self.value, low, torch.where(tiny, self.upper.clamp(min=0), self.upper))

    def round_float32(self, *, may_flush: bool = False) -> Interval:
        """Results rounded to nearest float32; ``may_flush``: a subnormal may become zero."""
        return self.store(FLOAT32, may_flush=may_flush)

    def store(
        self,
        to: Format,
        *,
        ties: Ties = Ties.EVEN,
        overflow: Overflow = Overflow.IEEE,
        limit: float | None = None,
        may_flush: bool = False,
    ) -> Interval:
        """Results rounded once to ``to``; a float32 accumulator in BF16 is ``round_float32().store(BFLOAT16)``.

        Args:
            to: format stored in.
            ties: rounding.
            overflow: what exceeds the format, and infinity, becomes.
            limit: results are clamped to this magnitude first (a quantiser's maximum).
            may_flush: what is subnormal in float32 before the rounding may be taken for zero.
        """
        before = self if limit is None else self.apply(lambda end: end.clamp(-limit, limit))
        if may_flush:
            before = before.flushed()
        return before.apply(lambda end: nearest(end, to, ties, overflow))

    def error_over_bound(self, result: torch.Tensor) -> torch.Tensor:
        """|result - value| over the distance from value to the end of the interval on that side.

        0 where the result is the value itself, at most 1 where it is accepted, above 1 everywhere else, infinite where
        no error is allowed; NaN counts as infinite. Float64, same shape.
        """
        result = result.double()
        error = (result - self.value).abs()
        room = torch.where(result > self.value, self.upper - self.value, self.value - self.lower)
        ratio = error / room
        inside = (result >= self.lower) & (result <= self.upper)
        # Inside, 0 / 0 is a point met, and an infinite end leaves no quotient. Outside, it may round to 1 for a hair.
        outside = ratio.nan_to_num(nan=torch.inf, posinf=torch.inf).clamp(min=1 + 2 * UNIT_FLOAT64)
        return torch.where(inside, ratio.nan_to_num(nan=0.0), outside)

    def _is_short(self) -> torch.Tensor:
        return _is_short(self.lower) if self.is_point else _is_short(self.lower) & _is_short(self.upper)


def _lift(other: Interval | float, like: Interval) -> Interval:
    """A number as a point."""
    return other if isinstance(other, Interval) else Interval.exact(like.value.new_tensor(other))


def nearest(value: torch.Tensor, to: Format, ties: Ties, overflow: Overflow) -> torch.Tensor:
    """``value`` float64 rounded once to ``to``, float64; the common cases in a tenth of the time."""
    if ties is Ties.EVEN and overflow is Overflow.IEEE:
        if to is FLOAT32:
            return value.float().double()
        if to is BFLOAT16:
            single = value.float()
            # Rounding twice differs only where the first rounding led to a midpoint of the second: step off it again.
            bits = single.view(torch.int32)
            midpoint = (bits & 0xFFFF) == 0x8000
            if bool(midpoint.any()):
                on, size = single.double()[midpoint], value[midpoint].abs()
                step = (size > on.abs()).int() - (size < on.abs()).int()
                single = bits.masked_scatter(midpoint, bits[midpoint] + step).view(torch.float32)
            return round_to_bfloat16(single).double()
    return round_to_format(value, to, overflow=overflow, ties=ties)


def _least_and_most(ends: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest and the largest of four, element by element."""
    low = torch.minimum(torch.minimum(ends[0], ends[1]), torch.minimum(ends[2], ends[3]))
    return low, torch.maximum(torch.maximum(ends[0], ends[1]), torch.maximum(ends[2], ends[3]))


def _spacing(size: torch.Tensor, of: Format) -> torch.Tensor:
    """Distance of neighbouring numbers of ``of`` in the binade of magnitude ``size``."""
    exponent = (torch.frexp(size).exponent - 1).clamp(min=of.min_exponent)
    return torch.ldexp(torch.ones_like(size), exponent - of.mantissa_bits)


def _is_short(value: torch.Tensor) -> torch.Tensor:
    """True where float64 ``value`` has at most 26 significant bits: a product of two such is exact."""
    return value.view(torch.int64) & ((1 << 27) - 1) == 0


def _two_sum(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float64 sum and its rounding error, exactly (Knuth)."""
    total = left + right
    part = total - left
    return total, (left - (total - part)) + (right - part)


def _stepped(total: torch.Tensor, error: torch.Tensor, *, down: bool) -> torch.Tensor:
    """The float64 number next to ``total + error`` on one side: ``total`` itself unless it lies on the other."""
    away = error < 0 if down else error > 0
    return torch.where(away, torch.nextafter(total, torch.full_like(total, -torch.inf if down else torch.inf)), total)


def _outward(
    low: torch.Tensor, high: torch.Tensor, exact: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both ends one unit of float64 further out, except where ``exact`` or zero (a float64 zero did not underflow)."""
    infinity = torch.full_like(low, torch.inf)
    keep_low, keep_high = low == 0, high == 0
    if exact is not None:
        keep_low, keep_high = keep_low | exact, keep_high | exact
    low_out = torch.where(keep_low, low, torch.nextafter(low, -infinity))
    return low_out, torch.where(keep_high, high, torch.nextafter(high, infinity))
