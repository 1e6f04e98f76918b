"""The interval of acceptable results of one operation, element by element.

Scope: the type and how far a result lies in it. What an accepted result does not prove: that it is the exact one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

UNIT_FLOAT64 = 2.0**-53


@dataclass
class Interval:
    """Every result in ``[lower, upper]`` is acceptable; ``value`` is the exact result, stored as the contract says.

    All float64, same shape; ``lower <= value <= upper``.
    """

    value: torch.Tensor
    lower: torch.Tensor
    upper: torch.Tensor

    def error_over_bound(self, result: torch.Tensor) -> torch.Tensor:
        """|result - value| over the distance from value to the end of the interval on that side.

        0 where the result is the value itself, at most 1 where it is accepted, above 1 everywhere else, infinite where
        no error is allowed; NaN counts as infinite. Float64, same shape.
        """
        result = result.double()
        error = (result - self.value).abs()
        room = torch.where(result > self.value, self.upper - self.value, self.value - self.lower)
        ratio = torch.nan_to_num(error / room, nan=torch.inf, posinf=torch.inf)
        # The quotient may round to 1 for a result a hair outside.
        outside = (result < self.lower) | (result > self.upper)
        ratio = torch.where(outside, ratio.clamp(min=1 + 2 * UNIT_FLOAT64), ratio)
        return torch.where(result == self.value, 0.0, ratio)
