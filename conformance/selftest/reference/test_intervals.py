"""Interval arithmetic, element by element: encloses every exact result, and is as narrow as the formats allow.

Scope: reference/intervals.py. Exact results are fractions; float32 results are numpy's; roundings to the small formats
are a search in the list of their values. Not covered: NaN, overflow, and float64 subnormals.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch

from conformance.selftest.reference import adversary as adv
from conformance.selftest.reference.adversary import Array
from reference.formats import BFLOAT16, E2M1, E4M3FN, E4M3FNUZ, E5M2, E5M2FNUZ, FLOAT16, FLOAT32, Format, Overflow, Ties
from reference.intervals import Interval

CASES = 10_000
Exact = Callable[[Fraction, Fraction], Fraction]
OPERATIONS: dict[str, tuple[Callable[[Interval, Interval], Interval], Exact]] = {
    "add": (lambda a, b: a + b, lambda a, b: a + b),
    "subtract": (lambda a, b: a - b, lambda a, b: a - b),
    "multiply": (lambda a, b: a * b, lambda a, b: a * b),
    "divide": (lambda a, b: a / b, lambda a, b: a / b),
    "square": (lambda a, b: a.square(), lambda a, b: a * a),
    "abs": (lambda a, b: a.abs(), lambda a, b: abs(a)),
    "maximum": (lambda a, b: a.maximum(b), max),
}


def tensor(values: Array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, np.float64))


def interval(
    random: np.random.Generator, shape: tuple[int, ...], *, apart_from_zero: bool = False, long: bool = False
) -> Interval:
    """Ends are float32 numbers, every other one of all 53 bits if ``long``: equal to far apart, of one sign or both."""
    centre = adv.bits_of(random, shape).astype(np.float64)
    width = np.abs(centre) * np.exp2(random.integers(-25, 3, shape)) * random.integers(0, 2, shape)
    if apart_from_zero:
        width = np.where(width >= np.abs(centre), np.abs(centre) / 2, width)
    low, high = (centre - width).astype(np.float32), (centre + width).astype(np.float32)
    value = low + (high.astype(np.float64) - low) * random.random(shape)
    ends: list[Array] = [np.clip(value.astype(np.float32), low, high), low, high]
    if long:
        factor = np.where(random.integers(0, 2, shape) == 1, 1 + random.integers(0, 1 << 24, shape) * 2.0**-52, 1.0)
        ends = [end.astype(np.float64) * factor for end in ends]
    return Interval(*(tensor(end) for end in ends))


def corners(a: Interval) -> list[Array]:
    return [end.numpy() for end in (a.lower, a.value, a.upper)]


@pytest.mark.parametrize("name", OPERATIONS)
def test_encloses_every_exact_result(name: str) -> None:
    random = np.random.default_rng(1)
    operation, exact = OPERATIONS[name]
    a = interval(random, (CASES,), long=True)
    b = interval(random, (CASES,), apart_from_zero=name == "divide", long=True)
    result = operation(a, b)
    assert bool((result.lower <= result.value).all() and (result.value <= result.upper).all())
    low, high = ([Fraction(x) for x in end.tolist()] for end in (result.lower, result.upper))
    for x in corners(a):
        for y in corners(b):
            for i, (left, right) in enumerate(zip(x.tolist(), y.tolist(), strict=True)):
                assert low[i] <= exact(Fraction(left), Fraction(right)) <= high[i], (left, right)


@pytest.mark.parametrize("name", OPERATIONS)
def test_float32_ends_are_reached(name: str) -> None:
    """Ends of a float32 result are results of numpy's operation at some corner, or zero for |x| and x**2."""
    random = np.random.default_rng(2)
    operation, _ = OPERATIONS[name]
    a = interval(random, (CASES,))
    b = interval(random, (CASES,), apart_from_zero=name == "divide")
    result = operation(a, b).round_float32()
    numpy = {
        "add": np.add,
        "subtract": np.subtract,
        "multiply": np.multiply,
        "divide": np.divide,
        "maximum": np.maximum,
    }
    alone = {"square": np.square, "abs": np.abs}
    pairs = [(x.astype(np.float32), y.astype(np.float32)) for x in corners(a)[::2] for y in corners(b)[::2]]
    found = np.stack([numpy[name](x, y) if name in numpy else alone[name](x) for x, y in pairs]).astype(np.float64)
    low, high = found.min(0), found.max(0)
    if name in alone:
        low = np.where((a.lower.numpy() < 0) & (a.upper.numpy() > 0), 0, low)
    assert np.array_equal(result.lower.numpy(), low)
    assert np.array_equal(result.upper.numpy(), high)


@pytest.mark.parametrize("name", ["add", "subtract", "multiply", "divide", "square", "sqrt"])
@pytest.mark.parametrize("exponents", [(-30, 31), (-149, -60), (-75, -40)])
def test_points_have_one_float32_result(name: str, exponents: tuple[int, int]) -> None:
    """The declared operation on float32 numbers is numpy's, bit for bit, down to subnormals and their midpoints."""
    random = np.random.default_rng(3)
    a, b = (adv.bits_of(random, (4 * CASES,), *exponents) for _ in range(2))
    b = np.where(np.arange(b.size) % 2 == 0, b, np.float32(1) + np.arange(b.size, dtype=np.float32) / 64)
    points = Interval.exact(torch.from_numpy(a)), Interval.exact(torch.from_numpy(b))
    usual = b != 0
    with np.errstate(divide="ignore", over="ignore"):
        if name == "sqrt":
            got, want = points[0].abs().sqrt(), np.sqrt(np.abs(a))
        elif name == "square":
            got, want = points[0].square().round_float32(), a * a
        else:
            function = {"add": np.add, "subtract": np.subtract, "multiply": np.multiply, "divide": np.divide}[name]
            kept = tuple(Interval.exact(point.value[torch.from_numpy(usual)]) for point in points)
            got, want = OPERATIONS[name][0](*kept).round_float32(), function(a[usual], b[usual])
    for end in (got.lower, got.value, got.upper):
        assert torch.equal(end, torch.from_numpy(want).double())


def test_reciprocal_root_within_its_units() -> None:
    """The furthest float32 within the declared units is accepted; the next one is not."""
    random = np.random.default_rng(4)
    x = np.abs(adv.bits_of(random, (CASES,)))
    exact = 1 / np.sqrt(x.astype(np.longdouble))
    unit = np.ldexp(1.0, np.frexp(exact)[1] - 24)
    for ulps in (1.0, 2.0):
        bound = Interval.exact(torch.from_numpy(x)).rsqrt(ulps=ulps)
        for sign in (-1, 1):
            wanted = exact + sign * ulps * unit
            furthest = wanted.astype(np.float32)
            outside = sign * (furthest.astype(np.longdouble) - wanted) > 0
            furthest = np.where(outside, np.nextafter(furthest, np.float32(-sign * np.inf)), furthest)
            ratio = bound.error_over_bound(torch.from_numpy(furthest))
            assert float(ratio.max()) <= 1
            assert float(ratio.max()) > 0.9
            beyond = np.nextafter(furthest, np.float32(sign * np.inf))
            assert float(bound.error_over_bound(torch.from_numpy(beyond)).min()) > 1
    wide = interval(random, (CASES,), apart_from_zero=True).abs()
    bound = wide.rsqrt(ulps=1.0)
    for end in corners(wide):
        root = (1 / np.sqrt(end.astype(np.longdouble))).astype(np.float32)
        for near in (root, np.nextafter(root, np.float32(0)), np.nextafter(root, np.float32(np.inf))):
            off = np.abs(near.astype(np.longdouble) - 1 / np.sqrt(end.astype(np.longdouble)))
            legal = off <= np.ldexp(1.0, np.frexp(root)[1] - 25)
            assert float(bound.error_over_bound(torch.from_numpy(np.where(legal, near, root))).max()) <= 1


def test_units_between_two_ends() -> None:
    """A unit in the last place doubles at a power of two inside the interval."""
    x = Interval(*(torch.tensor([1 + d], dtype=torch.float64) for d in (0.0, -(2.0**-24), 2.0**-30)))
    assert x.within_ulps(1.0).error_over_bound(torch.tensor([1 - 2.0**-23])).item() <= 1


def test_widened_encloses() -> None:
    random = np.random.default_rng(5)
    a = interval(random, (CASES,))
    relative, absolute = (tensor(np.abs(adv.bits_of(random, (CASES,), -40, 0))) for _ in range(2))
    keep = torch.arange(CASES) % 3
    relative, absolute = torch.where(keep == 0, 0.0, relative), torch.where(keep == 1, 0.0, absolute)
    result = a.widened(relative, absolute)
    r, extra = ([Fraction(x) for x in end.tolist()] for end in (relative, absolute))
    for end, bound, sign in ((a.lower, result.lower, -1), (a.upper, result.upper, 1)):
        for i, (x, got) in enumerate(zip(end.tolist(), bound.tolist(), strict=True)):
            least = sign * Fraction(x) + abs(Fraction(x)) * r[i] + extra[i]
            assert sign * Fraction(got) >= least
            assert sign * Fraction(got) - least <= (abs(Fraction(x)) + least - sign * Fraction(x)) / 2**50
    zero = Interval.exact(torch.zeros(1)).widened(relative=0.5)
    assert zero.lower.item() == zero.upper.item() == 0


def test_hull_takes_both_and_nothing_else() -> None:
    random = np.random.default_rng(6)
    a, b = interval(random, (CASES,)), interval(random, (CASES,))
    both = a.hull(b)
    assert torch.equal(both.value, a.value)
    for end in corners(a) + corners(b):
        assert float(both.error_over_bound(torch.from_numpy(end)).max()) <= 1
    assert bool(((both.lower == a.lower) | (both.lower == b.lower)).all())
    assert bool(((both.upper == a.upper) | (both.upper == b.upper)).all())


def table(of: Format) -> Array:
    """Finite magnitudes of a format, ascending; even places are even codes."""
    codes = np.arange(of.max_code + 1)
    exponent, mantissa = codes >> of.mantissa_bits, codes & ((1 << of.mantissa_bits) - 1)
    steps = np.where(exponent == 0, mantissa, mantissa + (1 << of.mantissa_bits)).astype(np.float64)
    return np.asarray(np.ldexp(steps, np.maximum(exponent, 1) - of.bias - of.mantissa_bits))


def stored(value: Array, of: Format, ties: Ties) -> Array:
    """``value`` rounded by search, saturating."""
    if of is FLOAT32:
        assert ties is Ties.EVEN
        return value.astype(np.float32).astype(np.float64)
    known, size = table(of), np.abs(value)
    above = np.clip(np.searchsorted(known, size), 1, len(known) - 1)
    low, high = known[above - 1], known[above]
    middle = (low + high) / 2
    up = size > middle
    if ties is Ties.TRUNCATE:
        up = size >= high
    elif ties is Ties.AWAY:
        up |= size == middle
    else:
        up |= (size == middle) & (above % 2 == 0)
    return np.copysign(np.where(up, high, low), value)


STORES = [(to, ties) for to in (BFLOAT16, FLOAT16, E4M3FN, E4M3FNUZ, E5M2, E5M2FNUZ, E2M1) for ties in Ties]


@pytest.mark.parametrize(("to", "ties"), [*STORES, (FLOAT32, Ties.EVEN)], ids=lambda x: getattr(x, "name", None))
def test_store_takes_every_rounding_of_the_interval(to: Format, ties: Ties) -> None:
    random = np.random.default_rng(8)
    known = table(to) if to is not FLOAT32 else np.abs(adv.bits_of(random, (4096,), -20, 20)).astype(np.float64)
    known = known if to.bits <= 8 else known[known < to.max / 4]
    middle = random.choice((known[1:] + known[:-1]) / 2, CASES) if to is not FLOAT32 else random.choice(known, CASES)
    signed = middle * random.choice([-1.0, 1.0], CASES)
    unit = np.spacing(np.abs(signed)) * random.integers(0, 3, CASES)
    wide = np.abs(signed) * np.exp2(random.integers(-30, 1, CASES)) * random.integers(0, 2, CASES)
    a = Interval(tensor(signed), tensor(signed - unit - wide), tensor(signed + unit + wide))
    overflow = Overflow.SATURATE if to.bits <= 8 else Overflow.IEEE
    bound = a.store(to, ties=ties, overflow=overflow)
    worst = 0.0
    for value in (*corners(a), signed - wide * random.random(CASES), signed + wide * random.random(CASES)):
        worst = max(worst, float(bound.error_over_bound(torch.from_numpy(stored(value, to, ties))).max()))
    assert 0.5 < worst <= 1
    for got, end in zip((bound.lower, bound.value, bound.upper), corners(a), strict=True):
        assert np.array_equal(got.numpy(), stored(end, to, ties))


def test_flushing_takes_subnormals_for_zero_and_nothing_else() -> None:
    random = np.random.default_rng(9)
    least = 2.0**-126
    x = adv.bits_of(random, (CASES,), -130, -120)
    point = Interval.exact(torch.from_numpy(x))
    for kept in (x, adv.flush(x)):
        assert float(point.round_float32(may_flush=True).error_over_bound(torch.from_numpy(kept)).max()) <= 1
    normal = torch.from_numpy(np.abs(x) >= least)
    zero = point.round_float32(may_flush=True).error_over_bound(torch.zeros(CASES))
    assert torch.equal(zero > 1, normal)
    # What is rounded up to the least normal number was subnormal before.
    near = Interval.exact(torch.tensor([least * (1 - 2.0**-30)], dtype=torch.float64))
    for result in (0.0, least):
        assert near.round_float32(may_flush=True).error_over_bound(torch.tensor([result])).item() <= 1
    assert near.round_float32().error_over_bound(torch.zeros(1)).item() > 1


def test_refuses_a_divisor_that_may_be_zero() -> None:
    one = Interval.exact(torch.ones(1))
    with pytest.raises(ValueError, match=r"^an element of the divisor may be 0; divide only where"):
        one / Interval(torch.ones(1).double(), -torch.ones(1).double(), torch.ones(1).double())


def test_infinite_ends() -> None:
    a = Interval(*(torch.tensor([x], dtype=torch.float64) for x in (torch.inf, 1.0, torch.inf)))
    for result, accepted in ((torch.inf, True), (2.0, True), (0.5, False), (torch.nan, False)):
        assert (a.error_over_bound(torch.tensor([result])).item() <= 1) is accepted
