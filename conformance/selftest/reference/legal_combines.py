"""Coded combines by the definition, in fractions: what every element travels as, and every legal sum of a few of them.

Scope: MoRI 624002c8's three combine codecs read once more from their description, sharing no code and no parameter with
reference/: rounding divides by the spacing, and Python rounds fractions half to even. Slow and exact. It proves nothing
by itself; test_combine_codecs*.py use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

from reference.combine_numerics import CombineCodec

#: (value, scale) of one element.
Part = tuple[Fraction, Fraction]
_ONE = Fraction(1)


@dataclass(frozen=True)
class Grid:
    """A format: significant bits, the exponent of its least spacing, its largest number (None: never reached here)."""

    bits: int
    least: int
    top: Fraction | None = None


FLOAT32, BFLOAT16 = Grid(24, -149), Grid(8, -133)
PAYLOADS = {
    "float8_e4m3fn": Grid(4, -9, Fraction(448)),
    "float8_e4m3fnuz": Grid(4, -10, Fraction(240)),
    "float4_e2m1fn": Grid(2, -1, Fraction(6)),
}


def nearest(value: Fraction, to: Grid) -> Fraction:
    """``value`` rounded to nearest, ties to even, and saturated."""
    if not value:
        return value
    size = abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if Fraction(2) ** exponent > size:
        exponent -= 1
    spacing = Fraction(2) ** max(exponent - to.bits + 1, to.least)
    rounded = round(value / spacing) * spacing
    return rounded if to.top is None else max(-to.top, min(to.top, rounded))


def coded_row(row: Sequence[float], codec: CombineCodec) -> list[Part]:
    """What travels of each element of a row; NaN counts in no largest magnitude and is 0 here."""
    payload = PAYLOADS[codec.payload.name]
    exact = [Fraction(0) if x != x else Fraction(x) for x in row]  # noqa: PLR0124
    if codec.name == "fp8_direct_cast":
        return [(nearest(x, payload), _ONE) for x in exact]
    top, parts = payload.top, list[Part]()
    assert top is not None
    width = (len(row) + codec.blocks - 1) // codec.blocks
    for start in range(0, len(row), width):
        block = exact[start : start + width]
        amax = max(abs(x) for x in block)
        scale = factor = _ONE
        if codec.name == "fp8_blockwise" and amax > top:
            scale, factor = nearest(amax * nearest(1 / top, FLOAT32), FLOAT32), nearest(top / amax, FLOAT32)
        elif codec.name == "fp4_blockwise" and amax:
            scale, factor = nearest(amax / top, FLOAT32), nearest(top / amax, FLOAT32)
        parts += [(nearest(nearest(x * factor, FLOAT32), payload), scale) for x in block]
    return parts


def legal_results(parts: Sequence[Part]) -> set[Fraction]:
    """Every BF16 result of adding ``parts`` from zero in any order, each addition fused or not."""
    sums: dict[frozenset[int], set[Fraction]] = {frozenset(): {Fraction(0)}}
    for _ in parts:
        longer: dict[frozenset[int], set[Fraction]] = {}
        for taken, totals in sums.items():
            for i in set(range(len(parts))) - taken:
                value, scale = parts[i]
                addends = {value * scale, nearest(value * scale, FLOAT32)}
                found = longer.setdefault(taken | {i}, set())
                found |= {nearest(total + addend, FLOAT32) for total in totals for addend in addends}
        sums = longer
    (totals,) = sums.values()
    return {nearest(total, BFLOAT16) for total in totals}


def two_levels(parts: Sequence[Sequence[Part]], codec: CombineCodec) -> Fraction:
    """The BF16 result where every node's sum is rounded to the payload and saturated; ``parts`` by node."""
    payload = PAYLOADS[codec.payload.name]
    partial = [nearest(nearest(sum((v for v, _ in node), Fraction(0)), FLOAT32), payload) for node in parts]
    return nearest(nearest(sum(partial, Fraction(0)), FLOAT32), BFLOAT16)


def contributions(rows: torch.Tensor, codec: CombineCodec) -> list[list[list[Part]]]:
    """``[W][n][H]`` parts of rows ``[W, n, H]``."""
    return [[coded_row(row, codec) for row in rank] for rank in rows.double().tolist()]
