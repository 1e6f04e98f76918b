"""Acceptance of a combine whose rows are coded on the wire, derived from the codec.

Scope: what :func:`reference.bounds.combine_acceptance` does with a codec. Codes and scales have one legal result, so
the only freedom is the sum: any order of float32 additions, and for a scaled contribution a fused multiply-add or a
product rounded first, addition by addition. Without scales every value is a multiple of the payload's smallest number,
sums fit 24 bits and the interval is a point; with partial sums that are rounded and saturated per node (InterNodeV1),
too.

With scales, let p be the exact product (at most 28 bits) and r = round(p). An operand of the last addition is p or r,
or a sum of others that met at most c - 2 additions, each off by a factor (1 + d), |d| <= u: the argument of
:mod:`reference.sums` with intervals [min(p, r), max(p, r)] as addends. A single contribution is r.
Only FP4 has products that are no multiples of 2**-149 (scales of subnormal size): there each step may also err by half
of that.
What an accepted result does not prove: that a kernel adds in the order or fuses where it says. Not covered: NaN.
"""

from __future__ import annotations

import torch

from reference.combine_codecs import code_rows, decode_rows
from reference.combine_numerics import CombineCodec
from reference.formats import BFLOAT16, FLOAT32, Overflow
from reference.intervals import Interval
from reference.sums import add_up, gamma, unit_roundoff

#: Spacing of float32's subnormals; a scale below 2**-125 is a multiple of it and no more.
_LEAST, _ROUGH_SCALE = FLOAT32.smallest, 2.0**-125


def coded_acceptance(
    terms: torch.Tensor | Interval, destinations: torch.Tensor, codec: CombineCodec, *, nodes: int = 1
) -> Interval:
    """Interval of acceptable results, stored as bfloat16.

    Args:
        terms: ``[W, n, H]`` BF16 numbers in float32, the rows before they are coded; intervals of such (every number
            between two BF16 ends) only for codecs without scales.
        destinations: ``[n, W]`` bool.
        codec: what travels.
        nodes: N, nodes whose partial sums are rounded first where ``codec.rounds_partials``; 1 otherwise.

    Returns:
        Interval of shape ``[n, H]``.

    Raises:
        ValueError: node levels with a codec that does not round partial sums; terms that are no BF16 numbers, or
            intervals for a codec with scales; what :func:`reference.combine_codecs.code_rows` refuses.
    """
    if nodes > 1 and not codec.rounds_partials:
        raise ValueError(f"nodes is {nodes} with {codec.name}, which rounds no partial sums; pass nodes=1")
    if codec.blocks:
        if isinstance(terms, Interval) and not torch.equal(terms.lower, terms.upper):
            raise ValueError(f"terms are intervals with {codec.name}, whose scales need exact ones; give points")
        exact = terms.value if isinstance(terms, Interval) else terms
        values, scales = _decoded(exact, destinations, codec)
        assert scales is not None
        return _sum_of_products(values, scales, destinations, codec)
    addends = terms if isinstance(terms, Interval) else Interval.exact(terms)
    decoded = addends.apply(lambda end: _decoded(end, destinations, codec)[0])
    if not codec.rounds_partials:
        return _exact_sum(decoded, destinations.sum(1, keepdim=True), codec).store(BFLOAT16)
    world_size, n, hidden = decoded.shape
    ranks = world_size // nodes
    by_node = decoded.apply(lambda end: end.reshape(nodes, ranks, n, hidden).transpose(0, 1))
    count = destinations.reshape(n, nodes, ranks).sum(2).t().unsqueeze(2)
    partial = _exact_sum(by_node, count, codec).store(codec.payload, overflow=Overflow.SATURATE)
    return _exact_sum(partial, (count > 0).sum(0), codec).store(BFLOAT16)


def _exact_sum(values: Interval, count: torch.Tensor, codec: CombineCodec) -> Interval:
    """Float32 sum of numbers of the payload format; exact up to 68 terms, whatever they are."""
    return add_up(values, count=count, grid=codec.payload.smallest)


def _decoded(
    terms: torch.Tensor, destinations: torch.Tensor, codec: CombineCodec
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Values and scales of what travels for ``terms [W, n, H]``, float64, zero where nothing does."""
    rank, token = destinations.t().nonzero(as_tuple=True)
    sent = terms[rank, token]
    rows = sent.to(torch.bfloat16)
    if not bool((rows == sent).logical_or(sent.isnan()).all()):
        raise ValueError("terms hold numbers that bfloat16 does not; give the rows as they are handed to combine")
    values, scales = decode_rows(code_rows(rows, codec), codec, terms.shape[2])

    def placed(found: torch.Tensor) -> torch.Tensor:
        by_rank = torch.zeros(terms.shape, dtype=torch.float64, device=terms.device)
        by_rank[rank, token] = found.double()
        return by_rank

    return placed(values), None if scales is None else placed(scales)


def _sum_of_products(
    values: torch.Tensor, scales: torch.Tensor, destinations: torch.Tensor, codec: CombineCodec
) -> Interval:
    """Float32 sum over dimension 0 of ``values * scales`` in any order, fused or not, stored as bfloat16."""
    product = values * scales
    rounded = product.float().double()
    count = destinations.sum(1, keepdim=True)
    addends = Interval(product, torch.minimum(product, rounded), torch.maximum(product, rounded))
    total = Interval.exact(torch.zeros_like(product[0]))
    for rank in range(product.shape[0]):
        total = total + addends.apply(lambda end: end[rank])  # noqa: B023
    size = torch.maximum(-addends.lower, addends.upper).sum(0)
    # Unscaled values are multiples of one power of two: sums that fit 24 bits are exact in any order.
    plain = (scales == 1).logical_or(values == 0).all(0) & (size <= codec.payload.smallest * 2.0**24)
    slack = gamma(count - 2, unit_roundoff(FLOAT32)).to(size.device) * size
    rough = (scales > 0).logical_and(scales < _ROUGH_SCALE).any(0)
    slack = torch.where(plain, 0.0, slack) + torch.where(rough & (count > 1), count * _LEAST, 0.0)
    # A single contribution becomes a point: its product, rounded or not, is stored as float32.
    return total.widened(absolute=slack).store(FLOAT32).store(BFLOAT16)
