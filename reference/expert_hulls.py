"""Hulls over what experts' kernels may do that keep their arithmetic to themselves.

Scope: the fields of :class:`reference.expert_numerics.ExpertNumerics` that leave a choice open: stores that may give
either neighbour, partial sums that are rounded apart, parts of the intermediate that are added one by one, scales over
groups that nobody names. A size is an upper bound of the sum of the magnitudes of a sum's terms. What a result inside
a hull does not prove: that the kernel did any one of these things throughout.

Rounding the parts of a sum of size S moves it by at most ``u S``, u being the largest relative error of the rounding,
and half the smallest number for each part. Additions are those of :mod:`reference.sums`: all but the last change what
they add up by at most gamma(parts - 2) of the rounded parts' size, and the last is monotone. Fewer parts meet fewer
roundings.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from reference.codecs import Codec, ScaleFormat
from reference.expert_numerics import ExpertNumerics, SlotSum
from reference.formats import FLOAT32, Format, Overflow, Ties
from reference.intervals import FLOAT32_NORMAL, Interval, nearest
from reference.quantisation import accepted_scales
from reference.scales import expand
from reference.sums import gamma, unit_roundoff

#: What float64 errs by in a few operations, relative.
_EVALUATION = 2.0**-48


def stored(value: Interval, to: Format, ulps: float) -> Interval:
    """Results rounded once to ``to``: to nearest with 0.5 ``ulps``, to either neighbour with 1."""
    if ulps <= 0.5:
        return value.store(to)
    low, high = _towards(value.lower, to, torch.floor), _towards(value.upper, to, torch.ceil)
    return Interval(nearest(value.value, to, Ties.EVEN, Overflow.IEEE).clamp(low, high), low, high)


def _towards(value: torch.Tensor, to: Format, side: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Float64 rounded to ``to`` on one side; beyond its largest number infinite, or that number."""
    exponent = (torch.frexp(value).exponent - 1).clamp(min=to.min_exponent)
    unit = torch.ldexp(torch.ones_like(value), exponent - to.mantissa_bits)
    moved = side(value / unit) * unit
    beyond = torch.where(side(value.sign() / 2) == 0, value.sign() * to.max, value.sign() * torch.inf)
    return torch.where(moved.abs() > to.max, beyond, moved)


def split(total: Interval, size: torch.Tensor, step: torch.Tensor | None, numerics: ExpertNumerics) -> Interval:
    """``W1 x`` as at most ``gemm1_parts`` sums, each rounded to ``gemm1_partial``, added in ``gemm1_store``.

    Args:
        total: in float32, in one part.
        size: of it.
        step: power of two of which every term is a multiple, 0 where none is known; or None.
        numerics: name the formats and the parts.
    """
    to, accumulate, parts = numerics.gemm1_partial, numerics.gemm1_store or FLOAT32, numerics.gemm1_parts
    assert to is not None
    slack, rounded = _parts_rounded(size, parts, to, numerics.store_ulps)
    # The first part is added to a zero, which rounds it if the sum has fewer bits.
    additions = parts - 2 + (accumulate.mantissa_bits < to.mantissa_bits)
    slack = (slack + gamma(additions, unit_roundoff(accumulate)) * rounded) * (1 + _EVALUATION)
    if step is not None:
        bits = min(to.mantissa_bits, accumulate.mantissa_bits) + 1
        exact = (step >= to.smallest) & (size <= step * 2.0**bits)
        slack = torch.where(exact, 0.0, slack)
    return _moved(total, slack, size).store(accumulate)


def add_parts(
    terms: Interval, size: torch.Tensor, count: torch.Tensor, to: Format, numerics: ExpertNumerics
) -> Interval:
    """Slots of a row, each a sum of at most ``inner_parts`` that are rounded and added one by one.

    Args:
        terms: ``[S, U, H]``: each slot's whole term; zero where there is none.
        size: ``[S, U, H]``, of the terms.
        count: ``[U, 1]``, slots of a row that are not zero.
        to: the element type.
        numerics: of the sum and its stores; FLOAT32 sums have no parts.
    """
    accumulate = to if numerics.slot_sum is SlotSum.ATOMIC else FLOAT32
    magnitude, parts = size.sum(0), count.double() * numerics.inner_parts
    slack, rounded = _parts_rounded(magnitude, parts, to, numerics.store_ulps)
    # Each part is multiplied by the routing weight, too.
    slack = slack + rounded * (2 * unit_roundoff(FLOAT32))
    slack = (slack + gamma(parts - 2, unit_roundoff(accumulate)) * rounded) * (1 + _EVALUATION)
    total = _moved(terms.apply(lambda end: end.sum(0)), slack, magnitude).store(accumulate)
    return total if accumulate is to else stored(total, to, numerics.store_ulps)


def _parts_rounded(
    size: torch.Tensor, parts: int | torch.Tensor, to: Format, ulps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """How far rounding the parts of a sum to ``to`` moves it, and the size of the rounded parts."""
    slack = size * (2 * ulps * unit_roundoff(to)) + parts * to.smallest
    return slack, size + slack


def _moved(total: Interval, slack: torch.Tensor, size: torch.Tensor) -> Interval:
    """The total off by ``slack``, but not where nothing is added up."""
    off = torch.where(size == 0, 0.0, slack)
    return Interval(total.value, total.lower - off, total.upper + off)


def quantised_in_any_group(rows: Interval, codec: Codec) -> Interval:
    """``code * scale`` of ``rows [M, N]`` where the codec's groups may be cut into any parts.

    The scale s of an element is at most that of its whole group. Given s the element is off by half a step of its code:
    ``|x| 2**-(m + 1)`` for a payload of m mantissa bits, or half the payload's smallest number times s, twice that if
    codes are truncated; by what saturates, at most ``1 - max / 2**(k + 1)`` of it if s is a power of two (2**k is the
    largest not above max), and nothing but the rounding of s otherwise; and by a share of 2**-20, which covers a scale,
    a reciprocal and a quotient of float32. A part whose scale is subnormal may have any codes.
    """
    size = rows.abs().upper
    known = size.isfinite()
    size = torch.where(known, size, 0.0)
    largest = expand(accepted_scales(size, codec).upper, codec, *rows.shape)
    payload = codec.payload
    half = 0.5 * (2 if codec.ties is Ties.TRUNCATE else 1)
    power = codec.scale_format is not ScaleFormat.FLOAT32
    share = 1 - codec.maximum / 2.0 ** (codec.power + 1) if power else 0.0
    step = torch.maximum(size * 2.0**-payload.mantissa_bits, largest * payload.smallest) * half
    step = step + size * (share + 2.0**-20)
    # No code has the other sign, but those of a subnormal scale.
    least = torch.where(size == 0, 0.0, 4 * codec.maximum * FLOAT32_NORMAL)
    low = torch.where(rows.lower >= 0, (rows.lower - step).clamp(min=0), rows.lower - step) - least
    high = torch.where(rows.upper <= 0, (rows.upper + step).clamp(max=0), rows.upper + step) + least
    low, high = torch.where(known, low, -torch.inf), torch.where(known, high, torch.inf)
    return Interval(torch.where(known, rows.value, 0.0), low, high)
