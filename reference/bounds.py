"""Acceptance intervals of the combine sum, derived from formats and from the declared contract, never chosen by hand.

Model: the contributions of the destination ranks are exact inputs; c of them are added in any order by c - 1 additions
that round to nearest. All additions but the last change a contribution by at most c - 2 factors (1 + d), |d| <= u, so
what the last one adds up is off the exact sum by at most gamma(c-2) * sum|term| (Higham, Accuracy and Stability of
Numerical Algorithms, lemma 3.1 and section 4.2). The last addition and the store only round, and rounding is monotone:
the interval of results is [round(lowest sum), round(highest sum)], sound for every order; two contributions have one
result. A sum of two numbers of a format that is subnormal is exact, so no absolute term is needed. Levels compose: the
stored intervals of one level are the addends of the next.
What an accepted result does not prove: that the backend sums in the order it declares. Not covered: NaN, infinities,
overflow, and devices that flush subnormals.
"""

from __future__ import annotations

import torch

from reference.intervals import Interval
from reference.rounding import round_to

UNIT_FLOAT32 = 2.0**-24
UNIT_BFLOAT16 = 2.0**-8
_FLOAT32_BITS, _BFLOAT16_BITS = 24, 8


def gamma(count: torch.Tensor, unit: float) -> torch.Tensor:
    """Higham's gamma: ``n u / (1 - n u)`` for ``n = count`` rounding errors of relative size ``unit``."""
    n = count.clamp(min=0).double() * unit
    return n / (1 - n)


def round_up_to_float32(value: torch.Tensor) -> torch.Tensor:
    """Least float32 that is not below a float64 ``value``."""
    near = value.float()
    return torch.where(near.double() < value, torch.nextafter(near, torch.full_like(near, torch.inf)), near)


def combine_acceptance(
    terms: torch.Tensor,
    destinations: torch.Tensor,
    dtype: torch.dtype,
    *,
    nodes: int = 1,
    element_accumulation: bool = False,
    grid: float | None = None,
) -> Interval:
    """Interval of acceptable combine results.

    Args:
        terms: ``[W, n, H]`` float32 contributions, zero where a rank takes no part.
        destinations: ``[n, W]`` bool.
        dtype: element type of the result, bfloat16 or float32.
        nodes: rounding levels of the contract: 1, or the number of nodes whose partial sums are rounded first.
        element_accumulation: True if every addition rounds to ``dtype`` (a reduce-scatter in the element type).
        grid: promise that every term is a multiple of this power of two; makes sums exact where they fit.

    Returns:
        Interval of shape ``[n, H]``.

    Raises:
        ValueError: per-node levels together with element accumulation, which no contract declares.
    """
    if nodes > 1 and element_accumulation:
        raise ValueError("node levels are modelled for float32 accumulation only; pass nodes=1")
    world_size, n, hidden = terms.shape
    addends = terms.double()
    # Every addition of float32 elements is a float32 addition.
    if element_accumulation and dtype != torch.float32:
        return _sum_in_bfloat16(addends, destinations.sum(1, keepdim=True), grid)
    if nodes == 1:
        addend = Interval(addends, addends, addends)
        return _sum_in_float32(addend, destinations.sum(1, keepdim=True), dtype, grid)
    # [ranks of a node, N, n, H] and [N, n, 1]
    addends = addends.reshape(nodes, world_size // nodes, n, hidden).transpose(0, 1)
    count = destinations.reshape(n, nodes, world_size // nodes).sum(2).t().unsqueeze(2)
    partial = _sum_in_float32(Interval(addends, addends, addends), count, dtype, grid)
    return _sum_in_float32(partial, (count > 0).sum(0), dtype, grid)


def _sum_in_float32(addend: Interval, count: torch.Tensor, dtype: torch.dtype, grid: float | None) -> Interval:
    """Sum over dimension 0, of which ``count`` entries take part, in float32 in any order, stored as ``dtype``."""
    slack = _slack(addend, count, UNIT_FLOAT32, _FLOAT32_BITS, grid)

    def store(exact_sum: torch.Tensor) -> torch.Tensor:
        return round_to(exact_sum.float(), dtype).double()

    return Interval(store(addend.value.sum(0)), store(addend.lower.sum(0) - slack), store(addend.upper.sum(0) + slack))


def _sum_in_bfloat16(terms: torch.Tensor, count: torch.Tensor, grid: float | None) -> Interval:
    """Sum over dimension 0 with a rounding to bfloat16 after every addition, in any order."""
    # An addition may be computed in float32 first: two roundings, (1 + u16)(1 + u32) - 1.
    unit = (1 + UNIT_BFLOAT16) * (1 + UNIT_FLOAT32) - 1
    slack = _slack(Interval(terms, terms, terms), count, unit, _BFLOAT16_BITS, grid)
    total = terms.sum(0)
    # The last addition too may round once or twice; rounding outwards to float32 first covers both.
    lowest, highest = -round_up_to_float32(slack - total), round_up_to_float32(total + slack)
    low, value, high = (round_to(x, torch.bfloat16).double() for x in (lowest, total.float(), highest))
    return Interval(value, low, high)


def _slack(addend: Interval, count: torch.Tensor, unit: float, bits: int, grid: float | None) -> torch.Tensor:
    """How far the operands of the last addition, summed exactly, may be from the exact sum of the addends.

    Zero where every partial sum is exact: at most two addends, or addends that are multiples of ``grid`` with partial
    sums that fit a significand of ``bits`` bits.
    """
    magnitude = torch.maximum(addend.lower.abs(), addend.upper.abs()).sum(0)
    exact = count <= 2
    if grid is not None:
        # The ends of an interval need not be multiples, but sums are monotone and the results between them are.
        exact = exact | (magnitude <= grid * 2.0**bits)
    # Float64 errs by less than c * 2**-53 of the magnitude here. From three addends on, the second order of gamma,
    # (c-2)**2 * 2**-48, is more; the sum of two rounds to float32 as if it were exact (53 bits >= 2 * 24 + 2: Figueroa,
    # When is double rounding innocuous?, 1995).
    return torch.where(exact, 0.0, gamma(count - 2, unit) * magnitude)
