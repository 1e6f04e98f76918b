"""Acceptance intervals of sums: of any order, of a declared order, over ranks, and of products (GEMM, mean square).

Model: every addition rounds once to the accumulate format. In any order, along any tree, c terms meet c - 1 additions;
all but the last change a term by at most c - 2 factors (1 + d), |d| <= u, so what the last one adds up is off the exact
sum by at most gamma(c-2) * sum|term| (Higham, Accuracy and Stability of Numerical Algorithms, lemma 3.1 and section
4.2). The last addition only rounds, and rounding is monotone: results lie in [round(lowest), round(highest)], and two
terms have one result. A sum of two numbers of a format that is subnormal is exact, so no absolute term is needed unless
the device flushes. Products add one rounding each, which a fused multiply-add leaves out. A declared order of points is
computed bit by bit, so its interval is a point.

Float64 evaluation: the factor gamma(n) - n u = (n u)**2 / (1 - n u) is spare (Jeannerod and Rump, Improved error bounds
for inner products in floating-point arithmetic, 2013: n u suffices in any order). For n >= 1 and u >= 2**-24 it is at
least n**2 2**-48 of the magnitude, and sum, magnitude and difference err by less than (2 n + 6) 2**-53 of it.
Not covered: NaN, infinities, overflow of a partial sum, and accumulators that do not round to nearest.
"""

from __future__ import annotations

import torch

from reference.formats import BFLOAT16, FLOAT32, Format
from reference.intervals import FLOAT32_NORMAL, Interval
from reference.norm_numerics import SumOrder
from reference.rounding import round_to_bfloat16

#: Float32 numbers and products of two, of at least this magnitude, are multiples of 2**-126: so is any sum of them.
_FREE_OF_SUBNORMALS = 2.0**-78


def unit_roundoff(of: Format) -> float:
    """Largest relative error of one rounding to nearest."""
    return float(2.0 ** -(of.mantissa_bits + 1))


def gamma(count: torch.Tensor | int, unit: float) -> torch.Tensor:
    """Higham's gamma: ``n u / (1 - n u)`` for ``n = count`` rounding errors of relative size ``unit``.

    Raises:
        ValueError: so many errors of that size leave nothing (``n u >= 1``).
    """
    n = torch.as_tensor(count).clamp(min=0).double() * unit
    if n.numel() and float(n.max()) >= 1:
        raise ValueError(f"{float(n.max()) / unit:.0f} roundings of {unit} have no bound; accumulate in a wider format")
    return n / (1 - n)


def add_up(
    terms: Interval,
    dim: int = 0,
    *,
    accumulate: Format = FLOAT32,
    order: SumOrder = SumOrder.ANY,
    count: torch.Tensor | None = None,
    grid: float | torch.Tensor | None = None,
    may_flush: bool = False,
    stored: Format | None = None,
) -> Interval:
    """Sum of numbers of ``accumulate`` along ``dim``, each addition rounded to ``accumulate``.

    Args:
        terms: any shape.
        dim: summed over.
        accumulate: format of the accumulator; of every term too, or the terms are of a narrower one.
        order: RANK is ascending along ``dim``, ROTATED the same from any start on and around; then ``count`` and
            ``grid`` are not looked at.
        count: how many terms are not exact zeros, broadcastable to the result; all, if None.
        grid: promise that every term, and so every result, is a multiple of this power of two; makes sums exact where
            they fit the significand. A tensor, broadcastable to the result, promises it element by element, 0 nothing.
        may_flush: float32 subnormals may be taken for zero at every step.
        stored: format that the sum is rounded to in the end; ``accumulate``, if None.
    """
    if order is not SumOrder.ANY:
        rounded = _in_declared_order(terms.apply(lambda end: end.movedim(dim, 0)), accumulate, order, may_flush)
        return rounded if stored is None else rounded.store(stored)
    n = torch.as_tensor(terms.shape[dim], device=terms.value.device) if count is None else count
    slack = _slack(terms, dim, n, accumulate, grid)
    if may_flush:
        slack = slack + n * (4 * FLOAT32_NORMAL) * (_least(terms, dim) < _FREE_OF_SUBNORMALS)
    total = terms.value.sum(dim)
    low = total if terms.is_point else terms.lower.sum(dim)
    high = total if terms.is_point else terms.upper.sum(dim)
    spread = Interval(total, low, high)
    if may_flush:
        # A flushed sliver may be lost in float64 beside a large sum, hence the widening.
        spread = spread.widened(absolute=slack)
    elif not terms.is_point or bool(slack.any()):
        spread = Interval(total, low - slack, high + slack)
    if accumulate is FLOAT32 and stored is BFLOAT16 and not may_flush:
        # Known to be float32 in between: half the passes.
        return spread.apply(lambda end: round_to_bfloat16(end.float()).double())
    rounded = spread.store(accumulate, may_flush=may_flush)
    return rounded if stored is None else rounded.store(stored)


def mean_square(
    terms: Interval, dim: int = -1, *, keepdim: bool = True, grid: float | None = None, may_flush: bool = False
) -> Interval:
    """Mean of the squares of float32 ``terms`` along ``dim``, summed in float32 in any order, fused or not.

    The sum is divided by the count, or multiplied by its rounded reciprocal. ``grid``: promise that every term is a
    multiple of this power of two.
    """
    if may_flush:
        terms = terms.flushed()
    count, squares = terms.shape[dim], terms.square()
    total = squares.apply(lambda end: end.sum(dim, keepdim=keepdim))
    least = _least(terms, dim, keepdim=keepdim).square()
    total = _sum_of_products(
        total, total.upper, count, FLOAT32, None if grid is None else grid * grid, least, may_flush
    )
    if count & (count - 1) == 0:
        mean = total * (1.0 / count)
    else:
        mean = (total / float(count)).widened(relative=unit_roundoff(FLOAT32))  # of the reciprocal
    return mean.round_float32(may_flush=may_flush)


def matmul(
    left: Interval,
    right: Interval,
    *,
    accumulate: Format = FLOAT32,
    grid: float | None = None,
    may_flush: bool = False,
) -> Interval:
    """``left [..., M, K] @ right [..., K, N]`` of numbers of ``accumulate``, in any order, fused or not.

    Args:
        left: first factor.
        right: second factor.
        accumulate: format that products and sums are rounded to.
        grid: promise that every product of two elements is a multiple of this power of two.
        may_flush: float32 subnormals may be taken for zero at every step.
    """
    if may_flush:
        left, right = left.flushed(), right.flushed()
    value, size = left.value @ right.value, left.abs().upper @ right.abs().upper
    total = Interval(value, value, value)
    if not (left.is_point and right.is_point):
        # |a b - a' b'| <= |a'| |b - b'| + |a - a'| |b| for the declared a', b'
        off = [torch.maximum(x.upper - x.value, x.value - x.lower) for x in (left, right)]
        total = total.widened(absolute=(left.value.abs() @ off[1] + off[0] @ right.abs().upper) * (1 + 2.0**-40))
    least = _least(left, -1, keepdim=True) * _least(right, -2, keepdim=True)
    return _sum_of_products(total, size, left.shape[-1], accumulate, grid, least, may_flush)


def _sum_of_products(
    total: Interval,
    size: torch.Tensor,
    count: int,
    accumulate: Format,
    grid: float | None,
    least: torch.Tensor,
    may_flush: bool,
) -> Interval:
    """Rounded sum of ``count`` products, of which the exact sum, the sum of magnitudes and the least product are given.

    The operands of the last addition, or of the last fused multiply-add, carry at most ``count - 1`` roundings.
    """
    slack = gamma(count - 1, unit_roundoff(accumulate)).to(size.device) * size
    # Where a product may be subnormal, each step errs by half the smallest number, or by all that is flushed.
    step = 4 * FLOAT32_NORMAL if may_flush else accumulate.smallest
    slack = slack + torch.where(least < _FREE_OF_SUBNORMALS, count * step, 0.0)
    if grid is not None and grid >= (FLOAT32_NORMAL if may_flush else accumulate.smallest):
        slack = torch.where(size <= grid * 2.0 ** (accumulate.mantissa_bits + 1), 0.0, slack)
    return total.widened(absolute=slack).store(accumulate, may_flush=may_flush)


def _in_declared_order(terms: Interval, accumulate: Format, order: SumOrder, may_flush: bool) -> Interval:
    """Sum over dimension 0 in ascending order from the first term, or from any."""
    world_size = terms.shape[0]
    if may_flush:
        # Operands too: two subnormals whose sum is normal may give zero.
        terms = terms.flushed()
    found: Interval | None = None
    for first in range(world_size if order is SumOrder.ROTATED else 1):
        total = terms.apply(lambda end: end[first])  # noqa: B023
        for step in range(1, world_size):
            term = terms.apply(lambda end: end[(first + step) % world_size])  # noqa: B023
            total = (total + term).store(accumulate, may_flush=may_flush)
        found = total if found is None else found.hull(total)
    assert found is not None
    return found


def _slack(
    terms: Interval, dim: int, count: torch.Tensor, accumulate: Format, grid: float | torch.Tensor | None
) -> torch.Tensor:
    """How far the operands of the last addition, summed exactly, may be from the exact sum of the terms.

    Zero where every partial sum is exact: at most two terms, or terms that are multiples of ``grid`` with partial sums
    that fit the significand. Of two terms the float64 sum rounds as the exact one would: a significand of 53 bits is at
    least 2 * 24 + 2 (Figueroa, When is double rounding innocuous?, 1995).
    """
    size = terms.value.abs() if terms.is_point else torch.maximum(-terms.lower, terms.upper)
    magnitude = size.sum(dim)
    exact = count <= 2
    if grid is not None:
        # The ends of an interval need not be multiples, but sums are monotone and the results between them are.
        exact = exact | (magnitude <= grid * 2.0 ** (accumulate.mantissa_bits + 1))
    return torch.where(exact, 0.0, gamma(count - 2, unit_roundoff(accumulate)) * magnitude)


def _least(terms: Interval, dim: int, *, keepdim: bool = False) -> torch.Tensor:
    """Least magnitude along ``dim`` that a term which is not exactly zero may have."""
    size = terms.abs()
    return torch.where(size.upper == 0, torch.inf, size.lower).amin(dim, keepdim=keepdim)
