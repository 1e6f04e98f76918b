"""Every number format again, from the tables of its specification, with integers and fractions.

Scope: an expectation for reference/rounding.py that shares no code, no parameter and no method with it: the exact value
of every code once as a Fraction, and codes of values by search in the sorted list of midpoints. Sources: OCP 8-bit
Floating Point Specification 1.0 table 1, OCP Microscaling Formats 1.0 tables 1 to 5, IEEE 754-2019 §3.4, LLVM APFloat
for FNUZ. What agreement does not prove: that a device implements these definitions.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property

import torch

from reference.formats import Ties


@dataclass(frozen=True, eq=False)
class Definition:
    """A format by its fields' widths, the value of magnitude code 1 and where the finite magnitudes end.

    ``infinity`` and ``nans`` are magnitude codes (sign excluded); ``nan`` is the NaN that is written. FNUZ formats have
    one NaN, the code that would be minus zero.
    """

    exponent: int
    mantissa: int
    smallest: Fraction
    finite: int  # number of finite magnitudes
    infinity: int | None = None
    nan: int | None = None
    nans: range = field(default=range(0))
    fnuz: bool = False

    @property
    def sign(self) -> int:
        return 1 << (self.exponent + self.mantissa)

    def magnitude(self, code: int) -> Fraction:
        """Value of a magnitude code as if no code were special: the spacing doubles with every binade but the first."""
        binade, step = divmod(code, 1 << self.mantissa)
        if binade == 0:
            return step * self.smallest
        return ((1 << self.mantissa) + step) * self.smallest * (1 << (binade - 1))

    @cached_property
    def steps(self) -> torch.Tensor:
        """Finite magnitudes and the one that would follow, float64 and exact."""
        return _exact([self.magnitude(code) for code in range(self.finite + 1)])

    @cached_property
    def midpoints(self) -> torch.Tensor:
        """Halfway from each finite magnitude to the next, float64 and exact."""
        values = [self.magnitude(code) for code in range(self.finite + 1)]
        return _exact([(low + high) / 2 for low, high in itertools.pairwise(values)])

    @cached_property
    def values(self) -> torch.Tensor:
        """Value of every code, float64."""
        size = torch.full((self.sign,), torch.nan, dtype=torch.float64)
        size[: self.finite] = self.steps[:-1]
        if self.infinity is not None:
            size[self.infinity] = torch.inf
        both = torch.cat([size, -size])
        if self.fnuz:
            both[self.sign] = torch.nan
        return both

    @property
    def nan_codes(self) -> set[int]:
        """Every code that is NaN."""
        return {self.sign} if self.fnuz else {sign + code for sign in (0, self.sign) for code in self.nans}

    def codes(self, value: torch.Tensor, negative: torch.Tensor, ties: Ties, saturate: bool) -> torch.Tensor:
        """Codes of float64 ``value`` with the sign bits ``negative``; -1 where the format has no answer."""
        size = value.abs()
        below = torch.searchsorted(self.midpoints, size, right=False)  # midpoints below size: rounding ties down
        reached = torch.searchsorted(self.midpoints, size, right=True)  # midpoints up to size: rounding ties up
        if ties is Ties.EVEN:
            code = torch.where(below % 2 == 0, below, reached)
        elif ties is Ties.AWAY:
            code = reached
        else:
            code = (torch.searchsorted(self.steps, size, right=True) - 1).clamp(max=self.finite - 1)
        over = (code == self.finite) | size.isinf()
        nan = value.isnan()
        instead = self.finite - 1 if saturate else self.infinity
        if instead is None:
            nan, instead = nan | over, 0
        code = torch.where(over, instead, code)
        signed = code + negative.long() * self.sign
        if self.fnuz:
            return torch.where(nan, self.sign, torch.where(code == 0, 0, signed))
        if self.nan is None:
            return torch.where(nan, -1, signed)
        return torch.where(nan, self.nan + negative.long() * self.sign, signed)


def _exact(values: list[Fraction]) -> torch.Tensor:
    floats = [float(value) for value in values]
    assert [Fraction(value) for value in floats] == values, "float64 does not hold them"
    return torch.tensor(floats, dtype=torch.float64)


def _power(exponent: int) -> Fraction:
    return Fraction(2) ** exponent


DEFINITIONS = {
    "bfloat16": Definition(8, 7, _power(-133), 0x7F80, 0x7F80, 0x7FC0, range(0x7F81, 0x8000)),
    "float16": Definition(5, 10, _power(-24), 0x7C00, 0x7C00, 0x7E00, range(0x7C01, 0x8000)),
    "float8_e4m3fn": Definition(4, 3, _power(-9), 0x7F, None, 0x7F, range(0x7F, 0x80)),
    "float8_e4m3fnuz": Definition(4, 3, _power(-10), 0x80, fnuz=True),
    "float8_e5m2": Definition(5, 2, _power(-16), 0x7C, 0x7C, 0x7F, range(0x7D, 0x80)),
    "float8_e5m2fnuz": Definition(5, 2, _power(-17), 0x80, fnuz=True),
    "float4_e2m1fn": Definition(2, 1, _power(-1), 8),
}
#: Largest finite value and smallest normal number as the specifications print them.
LANDMARKS = {
    "bfloat16": (float.fromhex("0x1.fep127"), 2.0**-126),
    "float16": (65504.0, 2.0**-14),
    "float8_e4m3fn": (448.0, 2.0**-6),
    "float8_e4m3fnuz": (240.0, 2.0**-7),
    "float8_e5m2": (57344.0, 2.0**-14),
    "float8_e5m2fnuz": (57344.0, 2.0**-15),
    "float4_e2m1fn": (6.0, 1.0),
}


def with_neighbours(size: torch.Tensor) -> torch.Tensor:
    """Non-negative ``size``, the numbers of its type next to it, and all of them negated."""
    up, down = torch.full_like(size, torch.inf), torch.zeros_like(size)
    three = torch.cat([size, torch.nextafter(size, up), torch.nextafter(size, down)])
    return torch.cat([three, -three])
