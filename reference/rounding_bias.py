"""The mean signed error of a rounded sum: what tells truncation from rounding to nearest over many elements.

Scope: residual out, whose error adds up over layers if it has a sign (AITER's bfloat16 stores on gfx942 truncate:
csrc/include/opus/opus.hpp, OPUS_FP32_to_BF16_DEFAULT). Every element may be inside its own interval where an order or a
path is open; the mean shows what all of them have in common.
What a mean near zero does not prove: that single elements are right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from reference.rounding import format_of, round_to_format

#: Probability with which an unbiased rounding may be called biased.
FALSE_ALARM = 2.0**-40


@dataclass
class SignedError:
    """Mean errors in units of the spacing at the exact result.

    Attributes:
        upward: of result - exact; -0.5 for rounding towards minus infinity.
        outward: of |result| - |exact|; -0.5 for truncation.
        upward_bound: what ``upward`` may be.
        outward_bound: what ``outward`` may be.
        count: elements that the format cannot hold exactly; the others are not counted.
    """

    upward: float
    outward: float
    upward_bound: float
    outward_bound: float
    count: int

    @property
    def biased(self) -> bool:
        """True if one of the means is beyond its bound."""
        return not (abs(self.upward) <= self.upward_bound and abs(self.outward) <= self.outward_bound)


def mean_signed_error(result: torch.Tensor, exact: torch.Tensor) -> SignedError:
    """Mean signed error of ``result`` (bfloat16, float16 or float32) against ``exact`` (float64, before its store).

    A mean is bounded by that of rounding ``exact`` to nearest, on these very data, plus Hoeffding's bound: n
    independent errors within half a spacing of zero mean have a mean beyond ``sqrt(ln(2 / p) / 2 n)`` with probability
    at most p; the two means share :data:`FALSE_ALARM`. Rounding to nearest itself is never beyond; a truncation is
    from about 60 elements on. Without elements to count, nothing is biased and the bounds are infinite.

    Raises:
        ValueError: an ``exact`` that is not finite, or shapes that differ.
    """
    if result.shape != exact.shape:
        raise ValueError(f"result has shape {list(result.shape)} and exact {list(exact.shape)}; give the same")
    if not bool(exact.isfinite().all()):
        raise ValueError("exact holds NaN or infinities; leave out the rows that do")
    to = format_of(result.dtype)
    nearest = round_to_format(exact, to)
    counted = nearest != exact
    count = int(counted.sum())
    if count == 0:
        return SignedError(0.0, 0.0, math.inf, math.inf, 0)
    wanted = exact[counted]
    exponent = (torch.frexp(wanted).exponent - 1).clamp(min=to.min_exponent)
    spacing = torch.exp2((exponent - to.mantissa_bits).double())
    chance = math.sqrt(math.log(4 / FALSE_ALARM) / (2 * count))

    def means(rounded: torch.Tensor) -> tuple[float, float]:
        error = (rounded[counted].double() - wanted) / spacing
        return float(error.mean()), float((error * torch.sign(wanted)).mean())

    upward, outward = means(result)
    upward_nearest, outward_nearest = means(nearest)
    return SignedError(upward, outward, abs(upward_nearest) + chance, abs(outward_nearest) + chance, count)
