"""The oracle of a coded combine: the sum of what travelled, derived a second time, densely and in float64.

Scope: apart from the declaration it shares no code with :mod:`reference.combine_codecs` and its bounds: codes come from
the midpoints of a table built here, float32 and BF16 by scaling, and a sum of c scaled contributions is off its exact
value by gamma(c) times the sum of magnitudes, the rounding of a product counted in. Where rows are not known exactly
(float32 experts), a decoded number is off its row by half a step of the coarsest scale that its block may have.
What agreeing with it does not prove: anything about communication; there is none here. Not covered: NaN.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from reference.combine_numerics import BlockScale, CombineCodec
from reference.formats import Format

_FLOAT32, _BFLOAT16 = 24, 8  # significant bits
_UNIT = 2.0**-24
_TINY = 2.0**-149


@lru_cache
def magnitudes(of: Format) -> tuple[float, ...]:
    """Every finite magnitude of a payload format, ascending: the index is the code without its sign."""
    first_normal = 2.0**of.min_exponent
    table = [k * of.smallest for k in range(2**of.mantissa_bits)]
    while len(table) <= of.max_code:
        table += [first_normal * (1 + k / 2**of.mantissa_bits) for k in range(2**of.mantissa_bits)]
        first_normal *= 2
    return tuple(table[: of.max_code + 1])


def nearest_code(value: torch.Tensor, of: Format) -> torch.Tensor:
    """``value`` float64 as the nearest number of the payload format, ties to the even code, saturated; float64."""
    table = torch.tensor(magnitudes(of), dtype=torch.float64, device=value.device)
    middles = (table[1:] + table[:-1]) / 2
    size = value.abs().contiguous()
    below, above = torch.bucketize(size, middles), torch.bucketize(size, middles, right=True)
    # They differ on a midpoint, and one of two neighbours is even.
    return torch.copysign(table[torch.where(below % 2 == 0, below, above)], value)


def decoded(rows: torch.Tensor, codec: CombineCodec) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``rows [..., H]`` (float64, BF16 numbers) are worth on the other side: values of codes and their scales."""
    if codec.scale is BlockScale.NONE:
        return nearest_code(rows, codec.payload), torch.ones_like(rows)
    scale, factor = _scales(_amax(rows, codec), codec)
    return nearest_code(_rounded(rows * factor, _FLOAT32), codec.payload), scale


def coded_sum(wire: torch.Tensor, reached: torch.Tensor, codec: CombineCodec, nodes: int = 1) -> torch.Tensor:
    """Sum per token of rows that travel coded, rounded to BF16.

    Args:
        wire: ``[1 or 3, n, W, H]`` float64: BF16 rows by destination rank, zero where none; or value, least, greatest.
        reached: ``[n, W]`` bool, the ranks that a token went to.
        codec: what travels.
        nodes: N, where partial sums are rounded.

    Returns:
        ``[1 or 3, n, H]`` float64: the result, or value, least and greatest one.
    """
    if codec.scale is BlockScale.NONE:
        values = nearest_code(wire, codec.payload)
        if codec.rounds_partials:
            ends, n, world_size, hidden = values.shape
            partial = _plain_sum(values.reshape(ends, n, nodes, world_size // nodes, hidden))
            values = nearest_code(partial, codec.payload)
        return _rounded(_plain_sum(values), _BFLOAT16)
    value, scale = decoded(wire[0], codec)
    low = high = product = value * scale
    if wire.shape[0] > 1:
        low, high = _around(wire, product, codec)
    count = reached.sum(1, keepdim=True)
    size = torch.maximum(low.abs(), high.abs()).sum(1)
    # One contribution is a product, rounded; the sum of unscaled ones is exact while it fits 24 bits.
    exact = (scale == 1).all(1) & (size <= codec.payload.smallest * 2.0**24) & (low == high).all(1)
    slack = torch.where(count > 1, count * _UNIT / (1 - count * _UNIT), 0.0) * size
    slack = torch.where(exact, 0.0, slack) + torch.where((scale < 2.0**-100).any(1), count * _TINY, 0.0)
    if not slack.any() and wire.shape[0] == 1:
        return _stored(product.sum(1)).unsqueeze(0)
    return _stored(torch.stack([product.sum(1), low.sum(1) - slack, high.sum(1) + slack]))


def _plain_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum over the last but one dimension of numbers of one payload format: exact in float32, any order.

    Raises:
        ValueError: so many ranks that a sum may need more than 24 bits.
    """
    if values.shape[-2] > 64:
        raise ValueError(f"{values.shape[-2]} ranks; sums of FP8 numbers are shown to be exact for 64, split the test")
    return values.sum(-2)


def _amax(rows: torch.Tensor, codec: CombineCodec) -> torch.Tensor:
    """Largest magnitude of its block for every element, NaN passed over."""
    found = torch.zeros_like(rows)
    width = -(-rows.shape[-1] // codec.blocks)
    for start in range(0, rows.shape[-1], width):
        size = rows[..., start : start + width].abs()
        found[..., start : start + width] = torch.where(size.isnan(), 0.0, size).amax(-1, keepdim=True)
    return found


def _scales(amax: torch.Tensor, codec: CombineCodec) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and factor of blocks with these largest magnitudes."""
    top, one = codec.payload.max, torch.ones_like(amax)
    factor = _rounded(top / torch.where(amax == 0, one, amax), _FLOAT32)
    if codec.scale is BlockScale.ALWAYS:
        return torch.where(amax == 0, one, _rounded(amax / top, _FLOAT32)), torch.where(amax == 0, 0.0, factor)
    inverse = _rounded(one / top, _FLOAT32)
    return torch.where(amax > top, _rounded(amax * inverse, _FLOAT32), one), torch.where(amax > top, factor, one)


def _around(wire: torch.Tensor, product: torch.Tensor, codec: CombineCodec) -> tuple[torch.Tensor, torch.Tensor]:
    """Least and greatest decoded numbers of rows between ``wire[1]`` and ``wire[2]``."""
    least, most = wire[1], wire[2]
    size = torch.maximum(least.abs(), most.abs())
    coarsest, _ = _scales(_amax(size, codec), codec)
    known = _amax(most - least, codec) == 0
    # Relative half a step, or that of the subnormals; the float32 roundings of factor, scale and product beside it.
    half = torch.maximum(size * 2.0 ** -(codec.payload.mantissa_bits + 1), codec.payload.smallest / 2 * coarsest)
    half = half * (1 + 2.0**-16)
    return torch.where(known, product, least - half), torch.where(known, product, most + half)


def _rounded(value: torch.Tensor, bits: int) -> torch.Tensor:
    """Float64 ``value`` to ``bits`` significant ones with the exponents of float32, ties to even."""
    exponent = torch.frexp(value).exponent.clamp(min=-125)
    quantum = torch.ldexp(torch.ones_like(value), exponent - bits)
    return torch.round(value / quantum) * quantum


def _stored(total: torch.Tensor) -> torch.Tensor:
    """A float32 sum as BF16."""
    return _rounded(_rounded(total, _FLOAT32), _BFLOAT16)
