"""GEMMs of experts: dequantised weights, and the interval of a product of rows with each row's own matrix.

Scope: ``W x + b`` for pairs of a row and an expert, grouped by expert. A dot product of K terms is ``K - 1`` additions
in any order and along any tree, and ``scale_roundings`` more roundings per term: it is off by at most
gamma(K - 1 + scale_roundings) of the sum of magnitudes (Higham, Accuracy and Stability of Numerical Algorithms, lemma
3.1; :mod:`reference.sums`), in units of ``accumulator_ulps * 2**-23``. Where every term is a multiple of one power of
two and the magnitudes add up to at most 2**24 of it, every partial sum is a float32 number and the result is exact,
scales of any size included: if a product with a scale fits, so did its factors. An operand that is an interval adds its
half width times the other's magnitude.

What an accepted product does not prove: anything about the order in which it was added up. Not covered: NaN,
infinities, overflow of a partial sum, and matrix cores that cut off more than ``accumulator_ulps`` of a partial sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from reference.expert_numerics import ExpertNumerics
from reference.expert_weights import ExpertWeights
from reference.intervals import FLOAT32_NORMAL, Interval
from reference.sums import gamma

#: Elements of W1 and W2 up to which dequantised weights are kept for the next call (16 bytes each).
KEEP_ELEMENTS = 1 << 21
#: Unit in the last place of float32, relative.
ULP = 2.0**-23
#: Relative error of a float64 dot product, per term, rounded up.
FLOAT64_TERM = 2.0**-50
#: (local slot, first pair, end) of every expert that is hit; the pairs are in that order.
Groups = Sequence[tuple[int, int, int]]


class Matrix:
    """One expert's W1 or W2, dequantised, ``[N, K]``."""

    def __init__(self, exact: torch.Tensor) -> None:
        self.exact = exact

    @cached_property
    def single(self) -> torch.Tensor:
        """Rounded to float32."""
        return self.exact.float()

    @cached_property
    def size(self) -> torch.Tensor:
        """Magnitudes, float32."""
        return self.single.abs()

    @cached_property
    def grid(self) -> torch.Tensor:
        """``[N]``: the largest power of two of which every element of a row is a multiple."""
        return grid_of(self.exact).amin(1)


class Dense:
    """Weights of one rank, dequantised expert by expert when first used.

    Args:
        local: the weights; must not change while this is in use.
        keep: keep what was dequantised; by default if there are at most :data:`KEEP_ELEMENTS`.
    """

    def __init__(self, local: ExpertWeights, *, keep: bool | None = None) -> None:
        self.local = local
        self._keep = local.w1.numel() + local.w2.numel() <= KEEP_ELEMENTS if keep is None else keep
        self._kept: dict[int, tuple[Matrix, Matrix]] = {}

    def matrices(self, slot: int) -> tuple[Matrix, Matrix]:
        """W1 and W2 of a local slot."""
        found = self._kept.get(slot)
        if found is None:
            first, second = self.local.pick([slot]).dequantised()
            found = Matrix(first[0]), Matrix(second[0])
            if self._keep:
                self._kept[slot] = found
        return found


def grid_of(value: torch.Tensor) -> torch.Tensor:
    """Largest power of two of which each float64 is a multiple; infinite for zero."""
    bits = value.view(torch.int64)
    # Without its lowest one a significand is less by that one; if it has none, the number is the power itself.
    lowest = (value - (bits & (bits - 1)).view(torch.float64)).abs()
    power = bits & ((1 << 52) - 1) == 0
    return torch.where(value == 0, torch.inf, torch.where(power, value.abs(), lowest))


@dataclass
class Product:
    """A GEMM's result before any store.

    Attributes:
        total: ``[P, N]``, float32.
        size: ``[P, N]``, at least the sum of the magnitudes of all terms, what they may be off by included.
        step: ``[P, N]``, power of two of which every term is a multiple, 0 where none is known; or None.
    """

    total: Interval
    size: torch.Tensor
    step: torch.Tensor | None


def dot(
    left: Interval,
    grid: torch.Tensor | None,
    groups: Groups,
    dense: Dense,
    which: int,
    bias: torch.Tensor | None,
    numerics: ExpertNumerics,
) -> Product:
    """``[P, K]`` times the matrix of each pair's expert, plus its bias, added up in any order.

    Args:
        left: of any width.
        grid: ``[P]``, power of two of which every element of a row is a multiple, 0 where the row is no point; or None.
        groups: whose expert each pair's is.
        dense: the matrices.
        which: 0 for W1, 1 for W2.
        bias: ``[P, N]``, one more term, or None.
        numerics: unit and number of roundings.
    """
    terms = left.shape[1] + (bias is not None)
    single = _Singles.of(left)
    values, sizes, grids = [], [], []
    for slot, first, end in groups:
        matrix = dense.matrices(slot)[which]
        values.append(left.value[first:end] @ matrix.exact.T)
        sizes.append(single.times(matrix, first, end))
        if grid is not None:
            grids.append(grid[first:end, None] * matrix.grid)
    value = torch.cat(values)
    size, radius, shift = (torch.cat(part).double() for part in zip(*sizes, strict=True))
    # What float32 errs by in these three sums of magnitudes, to the safe side; and what underflowed.
    spare = 1 + (left.shape[1] + 8) * 2 * ULP
    size = size * spare
    if bias is not None:
        wide = bias.double()
        value, size = value + wide, size + wide.abs()
    unit = numerics.accumulator_ulps * ULP
    share = float(gamma(terms - 1 + numerics.scale_roundings, unit)) + terms * FLOAT64_TERM
    slack = size * share + torch.where(size == 0, 0.0, (terms + 1) * 2 * FLOAT32_NORMAL)
    step = None
    if grids:
        step = torch.cat(grids)
        if bias is not None:
            step = torch.minimum(step, grid_of(wide))
        exact = (step >= FLOAT32_NORMAL) & (size <= step * 2.0**24)
        slack = torch.where(exact, 0.0, slack)
    if single.point:
        return Product(Interval(value, value - slack, value + slack), size + slack, step)
    # Float32 errs by (K + 3) 2**-24 of the shift's magnitudes, which are no larger than the radii.
    reach = radius * (spare + (left.shape[1] + 8) * ULP) + slack
    low, high = value + shift - reach, value + shift + reach
    total = Interval(value, torch.minimum(low, value), torch.maximum(high, value))
    return Product(total, size + slack, step)


@dataclass
class _Singles:
    """An interval ``[P, K]`` in float32: greatest magnitude, half width, and the distance from value to middle."""

    point: bool
    size: torch.Tensor
    radius: torch.Tensor
    shift: torch.Tensor

    @classmethod
    def of(cls, left: Interval) -> _Singles:
        point = left.is_point or torch.equal(left.lower, left.upper)
        if point:
            size = left.value.abs().float()
            return cls(True, size, size, size)
        size = torch.maximum(-left.lower, left.upper).float()
        middle = left.lower + (left.upper - left.lower) / 2
        radius = torch.maximum(left.upper - middle, middle - left.lower)
        return cls(False, size, radius.float(), (middle - left.value).float())

    def times(self, matrix: Matrix, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sums of magnitudes of a dot product, of its half width, and its shift; only the first for a point."""
        rows = slice(first, end)
        if self.point:
            size = self.size[rows] @ matrix.size.T
            return size, size[:0], size[:0]
        both = torch.cat([self.size[rows], self.radius[rows]]) @ matrix.size.T
        size, radius = both.chunk(2)
        return size, radius, self.shift[rows] @ matrix.single.T
