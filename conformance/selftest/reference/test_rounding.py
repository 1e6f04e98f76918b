"""Rounding to bfloat16, bit-level and by scaling, against neighbours derived from the list of all bfloat16 numbers.

Scope: reference/rounding.py and the oracle's round_half_even: every pattern, every midpoint and the float32 numbers
next to it. The expectation compares distances to the two neighbouring numbers in exact float64 arithmetic, so it shares
nothing with either. A pass proves nothing about a device's casts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch

from reference.oracle import round_half_even
from reference.rounding import round_to, round_to_bfloat16

PATTERNS = torch.arange(65536, dtype=torch.int32)
#: Every bfloat16 as float32: the upper half of the bits.
EVERY = (PATTERNS << 16).view(torch.float32)
#: Finite numbers from 0 up, then the power of two that overflow rounds to.
LADDER = torch.cat([EVERY[:0x7F80].double(), torch.tensor([2.0**128], dtype=torch.float64)])


def _by_oracle(value: torch.Tensor) -> torch.Tensor:
    return round_half_even(value.double(), torch.bfloat16).float()


ROUNDINGS = [round_to_bfloat16, _by_oracle]
Rounding = Callable[[torch.Tensor], torch.Tensor]


def _nearest(value: torch.Tensor) -> torch.Tensor:
    """Nearest step of the ladder by distance, ties to the even step; float32, finite input only."""
    size = value.double().abs()
    above = torch.searchsorted(LADDER, size).clamp(1, len(LADDER) - 1)
    below = above - 1
    # Neighbours differ by one unit in the last place: both distances are exact in float64.
    down, up = size - LADDER[below], LADDER[above] - size
    step = torch.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    return torch.copysign(LADDER[step], value.double()).float()  # 2**128 becomes infinity


def _same(got: torch.Tensor, want: torch.Tensor) -> bool:
    return torch.equal(got.view(torch.int32), want.view(torch.int32))


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_every_bfloat16_rounds_to_itself(rounding: Rounding) -> None:
    finite = EVERY[EVERY.isfinite()]
    assert len(finite) == 65536 - 2 * 128
    assert _same(rounding(finite), finite)


def test_infinities_and_nans_stay() -> None:
    rest = EVERY[~EVERY.isfinite()]
    assert _same(round_to_bfloat16(rest), rest)
    quiet_only_below = torch.tensor([0x7F800001, -1, 0x7FFFFFFF, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
    assert round_to_bfloat16(quiet_only_below).isnan().all()
    assert _by_oracle(torch.tensor([math.inf, -math.inf])).tolist() == [math.inf, -math.inf]


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_midpoints_and_their_neighbours(rounding: Rounding) -> None:
    finite = PATTERNS[EVERY.isfinite()] << 16
    # Low halves of float32: next to the number, around the midpoint, next to the following number.
    for low in (1, 2, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0x8002, 0xFFFE, 0xFFFF):
        value = (finite | low).view(torch.float32)
        assert _same(rounding(value), _nearest(value)), hex(low)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_random_patterns(rounding: Rounding) -> None:
    bits = torch.randint(-(2**31), 2**31, (400_000,), generator=torch.Generator().manual_seed(1)).int()
    value = bits.view(torch.float32)
    value = value[value.isfinite()]
    assert _same(rounding(value), _nearest(value))


def test_named_values() -> None:
    """The expectation itself, on values anyone can check."""
    pairs = [
        (1 + 2.0**-8, 1.0),
        (1 + 3 * 2.0**-8, 1 + 2.0**-6),
        (-(1 + 2.0**-8 + 2.0**-23), -(1 + 2.0**-7)),
        (2.0**-134, 0.0),
        (3 * 2.0**-134, 2.0**-132),
        (2.0**-134 + 2.0**-149, 2.0**-133),
        (-(2.0**-149), -0.0),
        ((2 - 2.0**-7) * 2.0**127, (2 - 2.0**-7) * 2.0**127),
        ((2 - 2.0**-8) * 2.0**127, math.inf),
        ((2 - 2.0**-8 - 2.0**-23) * 2.0**127, (2 - 2.0**-7) * 2.0**127),
    ]
    value = torch.tensor([x for x, _ in pairs])
    want = torch.tensor([y for _, y in pairs])
    for rounding in (*ROUNDINGS, _nearest):
        assert _same(rounding(value), want)


def test_oracle_rounds_to_float32_like_fractions() -> None:
    """Float64 to float32 by exact rational distances, from subnormals to overflow."""
    generator = torch.Generator().manual_seed(2)
    mantissa = 1 + torch.randint(0, 2**52, (600,), generator=generator).double() / 2**52
    coarse = (mantissa * 2**24).round() / 2**24  # many of these are midpoints
    value = torch.cat([mantissa, coarse]) * torch.exp2(torch.arange(1200).remainder(279).double() - 151)
    got = round_half_even(value, torch.float32)
    for x, y in zip(value.tolist(), got.tolist(), strict=True):
        unit = Fraction(2) ** (max(math.frexp(x)[1], -125) - 24)
        steps = round(Fraction(x) / unit)  # Python rounds fractions half to even
        want = steps * unit
        assert y == (math.inf if want >= 2**128 else want), x


def test_other_types_are_refused() -> None:
    assert round_to(torch.ones(1), torch.float32).item() == 1
    with pytest.raises(ValueError, match=r"^no rounding to torch.float64 is modelled; use torch.bfloat16, torch"):
        round_to(torch.ones(1), torch.float64)
    with pytest.raises(ValueError, match=r"^value is torch.float64; round float32 tensors only$"):
        round_to_bfloat16(torch.ones(1, dtype=torch.float64))
