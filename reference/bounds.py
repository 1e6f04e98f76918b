"""Acceptance intervals of the combine sum, derived from formats and from the declared contract, never chosen by hand.

Model: the contributions of the destination ranks are exact inputs; they are added in float32 in any order (|error| <=
gamma(c-1) * sum|term| for c contributions, Higham, Accuracy and Stability of Numerical Algorithms, eq. 4.4), then stored
with one rounding to nearest even per declared level. Because rounding is monotone, the interval of results is
[round(lowest float32 sum), round(highest float32 sum)]: sound for every order, and reached by some.
What an accepted result does not prove: that the backend sums in the order it declares.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from reference.rounding import round_to

UNIT_FLOAT32 = 2.0**-24
UNIT_FLOAT64 = 2.0**-53
UNIT_BFLOAT16 = 2.0**-8
_UNIT = {torch.float32: UNIT_FLOAT32, torch.bfloat16: UNIT_BFLOAT16}


@dataclass
class Acceptance:
    """Every result in ``[lower, upper]`` is acceptable; ``value`` is the correctly rounded one. All float64, same shape."""

    value: torch.Tensor
    lower: torch.Tensor
    upper: torch.Tensor

    def error_over_bound(self, result: torch.Tensor) -> torch.Tensor:
        """|result - value| over the distance from value to the end of the interval on that side.

        0 where the result is the value itself, at most 1 where it is accepted, infinite where no error is allowed,
        NaN counts as infinite. Float64, same shape.
        """
        result = result.double()
        error = (result - self.value).abs()
        room = torch.where(result > self.value, self.upper - self.value, self.value - self.lower)
        ratio = torch.where(error == 0, 0.0, error / room)
        return torch.where(result == self.value, 0.0, torch.nan_to_num(ratio, nan=torch.inf))


def gamma(count: torch.Tensor, unit: float) -> torch.Tensor:
    """Higham's gamma: ``n u / (1 - n u)`` for ``n = count`` rounding errors of relative size ``unit``."""
    n = count.clamp(min=0).double() * unit
    return n / (1 - n)


def round_up_to_float32(value: torch.Tensor) -> torch.Tensor:
    """Least float32 that is not below a float64 ``value``."""
    near = value.float()
    return torch.where(near.double() < value, torch.nextafter(near, torch.full_like(near, torch.inf)), near)


def _store(low: torch.Tensor, high: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Float64 interval of results after a float32 value in ``[low, high]`` is stored as ``dtype``."""
    lowest = round_up_to_float32(low)
    highest = -round_up_to_float32(-high)
    return round_to(lowest, dtype).double(), round_to(highest, dtype).double()


def _nearest(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The float32 number nearest to a float64 ``value``, stored as ``dtype``; float64."""
    return round_to(value.float(), dtype).double()


def _float32_slack(count: torch.Tensor, magnitude: torch.Tensor, grid: float | None) -> torch.Tensor:
    """Largest distance between a float32 sum of ``count`` terms in any order and the exact sum.

    Zero where every partial sum is exact: at most one term, or terms that are multiples of ``grid`` and too small to
    leave the 24-bit significand.
    """
    slack = (gamma(count - 1, UNIT_FLOAT32) + count * UNIT_FLOAT64) * magnitude
    exact = count <= 1
    if grid is not None:
        exact = exact | (magnitude <= grid * 2.0**24)
    return torch.where(exact, 0.0, slack)


def combine_acceptance(
    terms: torch.Tensor,
    destinations: torch.Tensor,
    dtype: torch.dtype,
    *,
    nodes: int = 1,
    element_accumulation: bool = False,
    grid: float | None = None,
) -> Acceptance:
    """Interval of acceptable combine results.

    Args:
        terms: ``[W, n, H]`` float32 contributions, zero where a rank takes no part.
        destinations: ``[n, W]`` bool.
        dtype: element type of the result, bfloat16 or float32.
        nodes: rounding levels of the contract: 1, or the number of nodes whose partial sums are rounded first.
        element_accumulation: True if every addition rounds to ``dtype`` (a reduce-scatter in the element type).
        grid: promise that every term is a multiple of this power of two; makes sums exact where they fit.

    Returns:
        Acceptance of shape ``[n, H]``.
    """
    world_size, n, hidden = terms.shape
    exact = terms.double()
    if element_accumulation:
        total, magnitude = exact.sum(0), exact.abs().sum(0)
        count = destinations.sum(1, keepdim=True)
        # One addition: computed in float32 or directly, then rounded to the element type.
        unit = _UNIT[dtype] + 2 * UNIT_FLOAT32
        slack = gamma(count - 1, unit) * magnitude
        return Acceptance(_nearest(total, dtype), total - slack, total + slack)
    if nodes == 1:
        total, magnitude = exact.sum(0), exact.abs().sum(0)
        slack = _float32_slack(destinations.sum(1, keepdim=True), magnitude, grid)
        return Acceptance(_nearest(total, dtype), *_store(total - slack, total + slack, dtype))
    by_node = exact.reshape(nodes, world_size // nodes, n, hidden)
    count = destinations.reshape(n, nodes, world_size // nodes).sum(2).t().unsqueeze(2)
    total, magnitude = by_node.sum(1), by_node.abs().sum(1)
    slack = _float32_slack(count, magnitude, grid)
    lower, upper = _store(total - slack, total + slack, dtype)
    return _sum_of_nodes(_nearest(total, dtype), lower, upper, (count > 0).sum(0), dtype, grid)


def _sum_of_nodes(
    value: torch.Tensor,
    lower: torch.Tensor,
    upper: torch.Tensor,
    count: torch.Tensor,
    dtype: torch.dtype,
    grid: float | None,
) -> Acceptance:
    """Second level: float32 sum of the stored partial sums ``[N, n, H]``, ``count [n, 1]`` of them present."""
    magnitude = torch.maximum(lower.abs(), upper.abs()).sum(0)
    slack = _float32_slack(count, magnitude, grid)
    stored = _store(lower.sum(0) - slack, upper.sum(0) + slack, dtype)
    return Acceptance(_nearest(value.sum(0), dtype), *stored)
