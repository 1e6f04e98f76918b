"""Intervals of sums, GEMMs, mean squares and reductions over ranks: sound, tight, and points where nothing may differ.

Scope: reference/sums.py. At least 10,000 distinct sums per operation, each in many legal orders and the worst one that
a greedy search finds. Soundness is not proven by this, the derivation in the module is.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from conformance.selftest.reference import adversary as adv
from conformance.selftest.reference.adversary import Array
from reference.formats import BFLOAT16, FLOAT16, FLOAT32, Format
from reference.intervals import Interval
from reference.norm_numerics import SumOrder
from reference.sums import add_up, gamma, matmul, mean_square

CASES = 10_000
ADDITIONS = {
    FLOAT32: [adv.add_float32],
    BFLOAT16: [adv.add_bfloat16, adv.add_bfloat16_directly],
    FLOAT16: [adv.add_float16],
}
FORMATS = list(ADDITIONS)


def exact(values: Array) -> Interval:
    return Interval.exact(torch.from_numpy(np.ascontiguousarray(values)))


def ratio(bound: Interval, result: Array) -> float:
    return float(bound.error_over_bound(torch.from_numpy(np.ascontiguousarray(result))).max())


def held(values: Array, by: Format) -> Array:
    """``values`` rounded to a format, as float32, without overflow."""
    if by is FLOAT16:
        return np.clip(values, -500, 500).astype(np.float16).astype(np.float32)
    return adv.to_bfloat16(values) if by is BFLOAT16 else values.astype(np.float32)


def drawn(by: Format, counts: tuple[int, ...] = adv.RANKS) -> Iterator[Array]:
    random = np.random.default_rng(1)
    dtype = torch.float32 if by is FLOAT32 else torch.bfloat16
    for count in counts:
        for name, terms in adv.families(count, dtype, random):
            if by is not FLOAT16 or name not in ("wide", "huge", "2**24", "integers"):
                yield held(terms, by)


@pytest.mark.parametrize("by", FORMATS, ids=lambda f: f.name)
def test_sum_sound_in_any_order(by: Format) -> None:
    random = np.random.default_rng(2)
    cases, worst = 0, 0.0
    for terms in drawn(by):
        bound = add_up(exact(terms), accumulate=by)
        assert bool((bound.lower <= bound.value).all() and (bound.value <= bound.upper).all())
        for add in ADDITIONS[by]:
            found = [*adv.orders(terms, add, random), *(adv.greedy(terms, add, sign) for sign in (-1.0, 1.0))]
            worst = max(worst, *(ratio(bound, result) for result in found))
        assert worst <= 1, len(terms)
        cases += terms[0].size
    assert cases >= CASES
    assert worst > 0.5


@pytest.mark.parametrize("by", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_sum_tight_for_every_number_of_terms(by: Format, sign: float) -> None:
    """1 + half a unit is a tie and goes to 1, each time."""
    for count in range(3, 65):
        terms = np.full((count, 1), sign * 2.0 ** -(by.mantissa_bits + 1), np.float32)
        terms[0] = sign
        total = terms[0]
        for term in terms[1:]:
            total = ADDITIONS[by][0](total, term)
        assert 0.5 < ratio(add_up(exact(terms), accumulate=by), total) <= 1, count


def test_sum_of_intervals_is_the_hull_of_sums() -> None:
    random = np.random.default_rng(3)
    cases = 0
    for terms in drawn(FLOAT32, (1, 2, 3, 5, 8)):
        width = np.abs(terms) * np.float32(2.0**-20)
        low, high = terms - width, terms + width
        bound = add_up(Interval(*(torch.from_numpy(end).double() for end in (terms, low, high))))
        picked = np.where(random.random(terms.shape) < 0.5, low, high)
        for chosen in (low, terms, high, picked):
            assert max(ratio(bound, result) for result in adv.orders(chosen, adv.add_float32, random)) <= 1
        cases += terms[0].size
        if len(terms) < 3:  # nothing but the ends widens these
            for end, chosen in ((bound.lower, low), (bound.upper, high)):
                assert np.array_equal(end.numpy(), chosen.sum(0).astype(np.float64))
    assert cases >= CASES


def test_flushed_sums() -> None:
    random = np.random.default_rng(4)
    cases, needed = 0, 0.0
    for count in (2, 3, 8):
        terms = adv.bits_of(random, (count, CASES), -132, -122) * (random.random((count, CASES)) < 0.8)
        terms = terms.astype(np.float32)
        bound, strict = add_up(exact(terms), may_flush=True), add_up(exact(terms))

        def add(left: Array, right: Array) -> Array:
            return adv.flush(adv.add_float32(adv.flush(left), adv.flush(right)))

        for result in (*adv.orders(terms, add, random), *adv.orders(terms, adv.add_float32, random)):
            assert ratio(bound, result) <= 1
            needed = max(needed, ratio(strict, result))
        cases += CASES
    assert cases >= CASES
    assert needed > 1
    pair = exact(np.full((2, 1), 0.75 * 2.0**-126, np.float32))
    for order in SumOrder:  # the sum is normal, the operands are not
        assert ratio(add_up(pair, order=order, may_flush=True), np.zeros(1, np.float32)) <= 1
    normal = adv.bits_of(random, (3, CASES), -70, 30)
    sums = [add_up(exact(normal), may_flush=flag) for flag in (False, True)]
    assert torch.equal(sums[0].lower, sums[1].lower)
    assert torch.equal(sums[0].upper, sums[1].upper)


def rotations(terms: Array) -> list[Array]:
    found = []
    for first in range(len(terms)):
        total = terms[first]
        for step in range(1, len(terms)):
            total = adv.add_float32(total, terms[(first + step) % len(terms)])
        found.append(total)
    return found


def test_ranks_in_a_declared_order() -> None:
    random = np.random.default_rng(5)
    cases, differ = 0, 0
    for terms in drawn(FLOAT32, (1, 2, 4, 6, 8)):
        every = rotations(terms)
        one, hull, loose = (add_up(exact(terms), order=order) for order in SumOrder)
        assert all(
            np.array_equal(end.numpy(), every[0].astype(np.float64)) for end in (one.lower, one.value, one.upper)
        )
        assert np.array_equal(hull.lower.numpy(), np.min(every, 0).astype(np.float64))
        assert np.array_equal(hull.upper.numpy(), np.max(every, 0).astype(np.float64))
        for result in every:
            assert ratio(loose, result) <= 1
        reverse = np.array(terms[::-1])
        differ += int((one.error_over_bound(torch.from_numpy(rotations(reverse)[0])) > 1).sum())
        cases += terms[0].size
    assert cases >= CASES
    assert differ > cases / 20, "another order than the declared one is told apart"
    high = random.standard_normal((3, CASES)).astype(np.float32)
    low = high - np.float32(2.0**-12)
    bound = add_up(Interval(*(torch.from_numpy(x).double() for x in (high, low, high))), order=SumOrder.RANK)
    assert np.array_equal(bound.lower.numpy(), rotations(low)[0])
    assert np.array_equal(bound.upper.numpy(), rotations(high)[0])


def factors(depth: int, random: np.random.Generator, kind: str) -> tuple[Array, Array]:
    """``[depth, 32, 1]`` and ``[depth, 1, 32]`` float32."""
    shapes = (depth, 32, 1), (depth, 1, 32)
    if kind == "normal":
        return random.standard_normal(shapes[0]).astype(np.float32), random.standard_normal(shapes[1]).astype(
            np.float32
        )
    if kind == "few bits":
        a, b = (adv.bits_of(random, shape, -8, 9) for shape in shapes)
        return a, b
    a, b = np.ones(shapes[0]), np.ones(shapes[1])
    a[1:], b[1:] = 2.0**-12, 2.0**-12 * random.choice([1.0, 1 + 2.0**-23, 1.5], b[1:].shape)
    return a.astype(np.float32), b.astype(np.float32)


def gemm(a: Array, b: Array, **options: object) -> Interval:
    return matmul(exact(a[:, :, 0].T), exact(b[:, 0]), **options)  # type: ignore[arg-type]


def test_gemm_sound_in_any_order_fused_or_not() -> None:
    random = np.random.default_rng(6)
    cases, worst = 0, dict.fromkeys(("normal", "few bits", "lost"), 0.0)
    for kind in worst:
        for depth in (1, 2, 3, 7, 16, 64):
            a, b = factors(depth, random, kind)
            bound = gemm(a, b)
            for result in adv.sums_of_products(a, b, random):
                worst[kind] = max(worst[kind], ratio(bound, result))
            if depth == 1:
                assert torch.equal(bound.lower, bound.upper)
            cases += 32 * 32
    assert cases >= CASES
    assert max(worst.values()) <= 1, worst
    assert worst["lost"] > 0.5


def test_gemm_of_intervals() -> None:
    random = np.random.default_rng(7)
    for depth in (1, 5, 24):
        ends = []
        for values in factors(depth, random, "normal"):
            width = (np.abs(values) * 2.0 ** random.integers(-20, -3, values.shape)).astype(np.float32)
            ends.append((values, values - width, values + width))
        (a, *a_ends), (b, *b_ends) = ends
        left, right = (
            Interval(*(torch.from_numpy(np.ascontiguousarray(x)).double() for x in three))
            for three in ([x[:, :, 0].T for x in (a, *a_ends)], [x[:, 0] for x in (b, *b_ends)])
        )
        bound, worst = matmul(left, right), 0.0
        for x in (*a_ends, np.where(random.random(a.shape) < 0.5, *a_ends)):
            for y in (*b_ends, np.where(random.random(b.shape) < 0.5, *b_ends)):
                worst = max(worst, *(ratio(bound, result) for result in adv.sums_of_products(x, y, random)))
        assert 0.3 < worst <= 1


@pytest.mark.parametrize("depth", [1, 16, 256])
def test_gemm_of_integers_is_a_point(depth: int) -> None:
    random = np.random.default_rng(8)
    a = random.integers(-15, 16, (depth, 32, 1)).astype(np.float32) / 4
    b = random.integers(-15, 16, (depth, 1, 32)).astype(np.float32)
    bound = gemm(a, b, grid=0.25)
    want = torch.from_numpy((a.astype(np.float64) * b).sum(0))
    for end in (bound.lower, bound.value, bound.upper):
        assert torch.equal(end, want)
    for result in adv.sums_of_products(a, b, random):
        assert ratio(bound, result) == 0
    too_long = gemm(a * 2.0**20, b, grid=0.25)
    assert bool((too_long.lower < too_long.upper).any()) is (depth > 1)


def test_tiny_products() -> None:
    """Products that are subnormal, or flushed, err by more than a factor."""
    random = np.random.default_rng(9)
    needed = 0.0
    for depth in (1, 2, 8):
        a, b = adv.bits_of(random, (depth, 64, 1), -70, -60), adv.bits_of(random, (depth, 1, 64), -70, -60)
        bound, flushing = gemm(a, b), gemm(a, b, may_flush=True)
        for result in adv.sums_of_products(a, b, random):
            assert ratio(bound, result) <= 1
            assert ratio(flushing, result) <= 1

        def add(left: Array, right: Array) -> Array:
            return adv.flush(adv.add_float32(left, right))

        for result in adv.orders(adv.flush((a * b).astype(np.float32)), add, random):
            assert ratio(flushing, result) <= 1
            needed = max(needed, ratio(bound, result))
    assert needed > 1


def mean_squares(x: Array, random: np.random.Generator) -> Iterator[Array]:
    """Legal means over dimension 0."""
    count = np.float32(len(x))
    for total in adv.sums_of_products(x, x, random):
        yield total / count
        yield total * (np.float32(1) / count)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 48, 64])
def test_mean_square(count: int) -> None:
    random = np.random.default_rng(10)
    lost = np.full((count, 512), 2.0**-12, np.float32)
    lost[0] = 1
    worst = []
    for x in (lost, random.standard_normal((count, 1024)).astype(np.float32), adv.bits_of(random, (count, 512), -5, 6)):
        bound = mean_square(exact(x), 0, keepdim=False)
        worst.append(max(ratio(bound, result) for result in mean_squares(x, random)))
    assert max(worst) <= 1, worst
    if count > 1:
        assert max(worst) > 0.5
    integers = random.integers(-15, 16, (count, 512)).astype(np.float32)
    point = mean_square(exact(integers), 0, grid=1.0)
    if count & (count - 1) == 0:
        assert torch.equal(point.lower, point.upper)
    width = np.float32(2.0**-10)
    x = random.standard_normal((count, 512)).astype(np.float32)
    bound = mean_square(Interval(*(torch.from_numpy(e).double() for e in (x, x - width, x + width))), 0, keepdim=False)
    for chosen in (x - width, x + width, np.where(random.random(x.shape) < 0.5, x - width, x + width)):
        assert max(ratio(bound, result) for result in mean_squares(chosen, random)) <= 1


def test_levels_compose() -> None:
    """Per-node sums stored in BF16, then summed and stored: forgetting the inner rounding is too narrow."""
    random = np.random.default_rng(11)
    worst, shallow = 0.0, 0.0
    for terms in drawn(BFLOAT16, (4, 8, 16)):
        nodes = terms.reshape(2, -1, *terms.shape[1:])
        levels = add_up(exact(nodes), 1, stored=BFLOAT16)
        bound = add_up(levels, stored=BFLOAT16)
        one_level = add_up(exact(terms), stored=BFLOAT16)
        per_node = [list(adv.orders(node, adv.add_float32, random)) for node in nodes]
        for pair in zip(*per_node, strict=True):
            inner = [adv.to_bfloat16(total) for total in pair]
            result = adv.to_bfloat16(adv.add_float32(*inner))
            worst, shallow = max(worst, ratio(bound, result)), max(shallow, ratio(one_level, result))
    assert 0.5 < worst <= 1
    assert shallow > 1


def test_no_bound_for_too_many_coarse_roundings() -> None:
    assert gamma(torch.tensor([-1, 0, 4]), 0.125).tolist() == [0, 0, 1]
    with pytest.raises(ValueError, match=r"^256 roundings of 0.00390625 have no bound; accumulate in a wider format$"):
        gamma(256, 2.0**-8)
