"""Acceptance intervals of whole operations, derived from formats and contracts, never chosen by hand.

Scope: the combine sum, and a quantisation followed by the dequantisation; composed from :mod:`reference.sums` and
:mod:`reference.quantisation`.

Combine: the contributions of the destination ranks, exact or intervals, are summed in any order in float32 and stored,
or with a rounding to the element type after every addition. Levels compose: the stored intervals of one level are the
addends of the next. With a codec on the wire :mod:`reference.combine_bounds` takes over. What an accepted result does
not prove: that the backend sums in the order it declares. Not covered: NaN, infinities, overflow, and devices that
flush subnormals in a combine.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from reference.codecs import Codec, Granularity, ZeroScale
from reference.combine_bounds import coded_acceptance
from reference.combine_numerics import CombineCodec
from reference.intervals import Interval
from reference.quantisation import accepted_scales, accepted_values, half_step
from reference.rounding import format_of
from reference.scales import amax, expand, to_float32
from reference.sums import add_up

#: Twice the unit that a reciprocal may be off: widens a range of scales so far that rounding its ends is monotone.
_SCALE_MARGIN = 2.0**-22
#: Above it, and below its reciprocal, no scale or reciprocal of one is subnormal, or gives up what its codes are.
_ORDINARY = 2.0**-100


def combine_acceptance(
    terms: torch.Tensor | Interval,
    destinations: torch.Tensor,
    dtype: torch.dtype,
    *,
    nodes: int = 1,
    element_accumulation: bool = False,
    grid: float | torch.Tensor | None = None,
    codec: CombineCodec | None = None,
) -> Interval:
    """Interval of acceptable combine results.

    Args:
        terms: ``[W, n, H]`` float32 contributions, zero where a rank takes no part; or intervals of such.
        destinations: ``[n, W]`` bool.
        dtype: element type of the result, bfloat16 or float32.
        nodes: rounding levels of the contract: 1, or the number of nodes whose partial sums are rounded first.
        element_accumulation: True if every addition rounds to ``dtype`` (a reduce-scatter in the element type).
        grid: promise that every term is a multiple of this power of two; makes sums exact where they fit. A tensor
            ``[n, H]`` promises it element by element, 0 nothing.
        codec: what travels, or None for the element type. The terms are then the rows before they are coded, BF16
            numbers; ``grid`` is not looked at, because a code's own spacing says more.

    Returns:
        Interval of shape ``[n, H]``.

    Raises:
        ValueError: per-node levels together with element accumulation, which no contract declares; a codec with another
            dtype than bfloat16 or with element accumulation; what
            :func:`reference.combine_bounds.coded_acceptance` refuses.
    """
    if codec is not None:
        if dtype != torch.bfloat16 or element_accumulation:
            raise ValueError(
                f"dtype is {dtype} with element_accumulation={element_accumulation} and codec {codec.name}; a coded "
                f"combine sums in float32 and stores bfloat16"
            )
        return coded_acceptance(terms, destinations, codec, nodes=nodes)
    if nodes > 1 and element_accumulation:
        raise ValueError("node levels are modelled for float32 accumulation only; pass nodes=1")
    world_size, n, hidden = terms.shape
    addends, element = terms if isinstance(terms, Interval) else Interval.exact(terms), format_of(dtype)
    if element_accumulation:
        # A float32 addition of two numbers of the element type, then a rounding, is one rounding (Figueroa).
        return add_up(addends, accumulate=element, count=destinations.sum(1, keepdim=True), grid=grid)
    if nodes == 1:
        return add_up(addends, count=destinations.sum(1, keepdim=True), grid=grid, stored=element)
    # [ranks of a node, N, n, H] and [N, n, 1]
    ranks = world_size // nodes
    addends = addends.apply(lambda end: end.reshape(nodes, ranks, n, hidden).transpose(0, 1))
    count = destinations.reshape(n, nodes, ranks).sum(2).t().unsqueeze(2)
    partial = add_up(addends, count=count, grid=grid, stored=element)
    return add_up(partial, count=(count > 0).sum(0), grid=grid, stored=element)


def quantise_dequantise(rows: Interval, codec: Codec, *, scale: float | None = None) -> Interval:
    """Acceptable values of ``code * scale`` (exact, not stored) after any legal quantiser of ``rows [M, N]``.

    Two sound intervals are intersected. A code lies between the codes of both ends of its element, taken with the
    scales of the least and of the greatest largest magnitude that its group may have: narrow where those agree. And it
    is off its element by half a step: narrow where they do not.

    Args:
        rows: float32 numbers in these intervals.
        codec: how.
        scale: of a static codec.

    Returns:
        Interval of shape ``[M, N]``; unbounded where a group may hold NaN or an infinity.

    Raises:
        ValueError: a scale for a dynamic codec, or none for a static one.
    """
    if codec.static != (scale is not None):
        raise ValueError(f"scale is {scale} with static={codec.static}; a static codec needs one, a dynamic one none")
    if codec.may_flush:
        rows = rows.flushed()
    scales = _static(scale, rows) if scale is not None else _scales(rows, codec)
    of_element = scales.apply(lambda end: expand(end, codec, *rows.shape))
    known = of_element.lower.isfinite() & of_element.upper.isfinite() & rows.lower.isfinite() & rows.upper.isfinite()
    codes = accepted_values(rows.value, scales.value, codec)
    value = torch.where(known, codes.value * of_element.value, 0.0)
    free = (codes.lower < codes.upper) | (rows.lower < rows.upper) | (of_element.lower < of_element.upper)
    if not bool((free := free & known).any()):
        ends = value, value
    else:
        # The others have one result. What follows is by element: each is a row of its own.
        at = free.nonzero(as_tuple=True)
        by_element = replace(codec, granularity=Granularity.TOKEN, group=0, block_rows=0)
        elements, its_scales, its_codes = (
            part.apply(lambda end: end[at][:, None]) for part in (rows, of_element, codes)
        )
        low, high = _bounded(elements, its_scales, its_codes, by_element)
        ends = value.index_put(at, low[:, 0]), value.index_put(at, high[:, 0])
    if bool(known.all()) and ends[0] is value:
        return Interval(value, value, value)
    return Interval(value, torch.where(known, ends[0], -torch.inf), torch.where(known, ends[1], torch.inf))


def _bounded(rows: Interval, scales: Interval, declared: Interval, codec: Codec) -> tuple[torch.Tensor, torch.Tensor]:
    """Ends of the dequantised values of ``rows [n, 1]`` with scales ``[n, 1]``; ``declared``: codes of both values."""
    between = _codes(rows, scales, declared, codec) * scales
    # The step in units of the scale is largest for the least scale; what flushing takes, for the greatest.
    least = torch.where(scales.lower > 0, scales.lower, 1.0)
    size = rows.abs().upper
    step = half_step(size, scales.lower, codec) * (scales.upper / least) * (1 + 2.0**-40)
    step = torch.maximum(step, half_step(size, scales.upper, codec))
    step = torch.where(scales.lower > 0, step, size + codec.maximum * scales.upper)
    around = Interval(rows.value, to_float32(rows.lower), to_float32(rows.upper)).widened(absolute=step)
    return torch.maximum(between.lower, around.lower), torch.minimum(between.upper, around.upper)


def _static(scale: float, rows: Interval) -> Interval:
    """The caller's scale, shaped as scales are."""
    return Interval.exact(to_float32(torch.full((1, 1), scale, dtype=torch.float64, device=rows.value.device)))


def _scales(rows: Interval, codec: Codec) -> Interval:
    """Scales that the groups of ``rows`` may have: every rule is monotone in the largest magnitude."""
    if rows.is_point:
        return accepted_scales(rows.value, codec)
    size = rows.abs()
    value, least, most = (accepted_scales(end, codec) for end in (size.value, size.lower, size.upper))
    lower, upper = torch.minimum(least.lower, most.lower), torch.maximum(least.upper, most.upper)
    if codec.zero_scale is ZeroScale.ONE:
        # The exception from monotone: zero has scale one, and what is just above zero a scale just above zero.
        straddles = (amax(size.lower, codec) == 0) & (amax(size.upper, codec) > 0)
        lower = torch.where(straddles, 0.0, lower)
    return Interval(value.value, lower, upper)


def _codes(rows: Interval, scales: Interval, declared: Interval, codec: Codec) -> Interval:
    """Decoded codes of ``rows [n, 1]`` with scales from a range; ``declared``: those of the values."""
    wide = scales.upper > scales.lower
    least = torch.where(wide, scales.lower * (1 - _SCALE_MARGIN), scales.lower)
    most = torch.where(wide, scales.upper * (1 + _SCALE_MARGIN), scales.upper)
    if bool((least > _ORDINARY).all()) and bool((most < 1 / _ORDINARY).all()):
        # A code grows with the element, and its magnitude falls with the scale.
        lower = accepted_values(rows.lower, torch.where(rows.lower < 0, least, most), codec).lower
        upper = accepted_values(rows.upper, torch.where(rows.upper < 0, most, least), codec).upper
    else:
        found = [accepted_values(row, end, codec) for row in (rows.lower, rows.upper) for end in (least, most)]
        lower = torch.minimum(found[0].lower, found[1].lower)
        upper = torch.maximum(found[2].upper, found[3].upper)
    return Interval(declared.value, torch.minimum(lower, declared.lower), torch.maximum(upper, declared.upper))
