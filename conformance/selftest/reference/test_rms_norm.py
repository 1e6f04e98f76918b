"""The bounds of residual add + RMSNorm: sound for every legal kernel, tight, and too narrow for a wrong one.

Scope: the kernels and rows of norm_adversary.py, on one process. A pass proves nothing about communication, and nothing
about kernels that are legal in ways nobody thought of here.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from conformance.selftest.reference import norm_adversary as adv
from conformance.selftest.reference.adversary import Array
from reference import norm_oracle
from reference.formats import Ties
from reference.intervals import Interval
from reference.norm_numerics import NormInput, NormNumerics, SumOrder, WeightProduct
from reference.rms_norm import (
    Expected,
    expected,
    expected_given_residual,
    finite_rows,
    normalise,
    ordered_sum,
    pairwise_sum,
)
from reference.rounding_bias import mean_signed_error

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
EPSILON = 1e-5
ANYTHING = NormNumerics(sum_order=SumOrder.ANY, norm_input=NormInput.EITHER, product=WeightProduct.EITHER)


def _drawn(
    shape: tuple[int, int, int], dtype: torch.dtype, random: np.random.Generator
) -> list[tuple[str, Array, Array]]:
    """(name, addends ``[W + 1, M, N]``, weight ``[N]``), numbers of the element type."""
    return [
        (name, adv.to(dtype, addends.astype(np.float32)), adv.to(dtype, (1 + 0.3 * random.standard_normal(shape[2]))))
        for name, addends in adv.families(shape, dtype, random)
    ]


def _tensors(addends: Array, weight: Array, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    terms = torch.from_numpy(addends).to(dtype)
    return terms[:-1], terms[-1], torch.from_numpy(weight).to(dtype)


def _expected(addends: Array, weight: Array, numerics: NormNumerics, dtype: torch.dtype) -> Expected:
    terms, residual, scale = _tensors(addends, weight, dtype)
    assert bool(finite_rows(terms, residual, dtype).all())
    return expected(terms, residual, scale, EPSILON, numerics, dtype)


def _ratio(interval: Interval | None, result: Array | torch.Tensor) -> float:
    assert interval is not None
    return float(interval.error_over_bound(torch.as_tensor(result)).max())


def _worst(want: Expected, outcome: adv.Outcome) -> list[float]:
    return [_ratio(getattr(want, name), getattr(outcome, name)) for name in ("residual", "output", "unrounded")]


CHOICES = [
    NormNumerics(sum_order=order, norm_input=norm_input, product=product, gemma=gemma, round_reduced=rounded)
    for (order, norm_input), (product, (gemma, rounded)) in zip(
        itertools.cycle(itertools.product(SumOrder, NormInput)),
        itertools.product(WeightProduct, [(False, True), (True, True), (False, False)]),
        strict=False,
    )
]


def test_no_legal_kernel_is_rejected() -> None:
    random, rows, worst = np.random.default_rng(1), set(), 0.0
    for number, numerics in enumerate([*CHOICES, ANYTHING]):
        for dtype in DTYPES:
            width = (1, 2, 3, 31, 64, 96)[number % 6]
            for name, addends, weight in _drawn((4, 64, width), dtype, random):
                rows |= {addends[:, row].tobytes() for row in range(64)}
                want = _expected(addends, weight, numerics, dtype)
                for _ in range(2):
                    got = adv.kernel(addends, weight, EPSILON, numerics, dtype, random)
                    ratios = _worst(want, got)
                    worst = max(worst, *ratios)
                    assert worst <= 1, (name, numerics, dtype, ratios)
    assert len(rows) >= 10_000, len(rows)


def test_no_legal_kernel_is_rejected_given_its_residual() -> None:
    random = np.random.default_rng(2)
    for numerics, dtype in itertools.product(CHOICES, DTYPES):
        for name, addends, weight in _drawn((2, 16, 48), dtype, random):
            got = adv.kernel(addends, weight, EPSILON, numerics, dtype, random)
            residual = torch.from_numpy(got.residual).to(dtype)
            want = expected_given_residual(residual, torch.from_numpy(weight), EPSILON, numerics, dtype)
            ratios = _ratio(want.output, got.output), _ratio(want.unrounded, got.unrounded)
            assert max(ratios) <= 1, (name, numerics, dtype, ratios)


def test_declared_depth_of_the_sum_of_squares() -> None:
    random = np.random.default_rng(3)
    deep = replace(CHOICES[0], square_additions=10)
    for name, addends, weight in _drawn((1, 16, 1024), torch.float32, random):
        terms, residual, scale = _tensors(addends, weight, torch.float32)
        want = expected(terms, residual, scale, EPSILON, deep, torch.float32)
        wide = expected(terms, residual, scale, EPSILON, CHOICES[0], torch.float32)
        if name in ("normal", "positive"):  # elsewhere epsilon, or one element, is most of the mean square
            narrower = (want.output.upper - want.output.lower) < 0.1 * (wide.output.upper - wide.output.lower)
            assert bool(narrower.all()), name
        for _ in range(4):
            got = adv.kernel(addends, weight, EPSILON, deep, torch.float32, random)
            assert max(_worst(want, got)) <= 1, name


def test_ends_are_reached() -> None:
    """A legal kernel that is as far off as it may: 2 units in the division, 2 in the root, all the same way."""
    random = np.random.default_rng(4)
    numerics = NormNumerics(norm_input=NormInput.ROUNDED)
    addends = random.integers(-255, 256, (2, 4096, 2)) / np.float32(16)
    weight = np.ones(2, np.float32)
    want = _expected(addends.astype(np.float32), weight, numerics, torch.float32)
    x = (addends[0] + addends[1]).astype(np.float32)
    low, high = np.full((4096, 1), -1), np.full((4096, 1), 1)
    mean = adv.furthest((x.astype(np.float64) ** 2).sum(1, keepdims=True) / 2, low)
    root = adv.furthest(1 / np.sqrt((mean + np.float32(EPSILON)).astype(np.float64)), high)
    ratio = want.unrounded.error_over_bound(torch.from_numpy(x * root))
    assert 0.5 < float(ratio.max()) <= 1


def test_a_sum_that_drifts_is_accepted() -> None:
    """From 2,048 on, adding 1.0078125**2 one by one rounds down every time."""
    rows = np.full((1, 4096), 1.0078125, np.float32)
    squares = adv.sum_of_squares(rows, "as it is", np.random.default_rng(10))
    root = adv.furthest(1 / np.sqrt(squares.astype(np.float64) / 4096 + EPSILON), np.zeros((1, 1)))
    terms, weight = torch.from_numpy(rows)[None], torch.ones(4096)
    want = expected(terms, None, weight, EPSILON, NormNumerics(), torch.float32)
    oracle = norm_oracle.expected(terms, None, weight, EPSILON, NormNumerics(), torch.float32)
    for interval in (want.unrounded, Interval(**vars(oracle.unrounded))):
        assert 0.05 < _ratio(interval, rows * root) <= 1
    deep = expected(terms, None, weight, EPSILON, NormNumerics(square_additions=12), torch.float32)
    assert _ratio(deep.unrounded, rows * root) > 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_declared_order_leaves_one_residual(dtype: torch.dtype) -> None:
    random = np.random.default_rng(5)
    for name, addends, weight in _drawn((4, 8, 32), dtype, random):
        want = _expected(addends, weight, NormNumerics(), dtype).residual
        assert want is not None
        assert torch.equal(want.lower, want.upper), name
        got = adv.kernel(addends, weight, EPSILON, NormNumerics(), dtype, random)
        assert np.array_equal(want.value.numpy(), got.residual.astype(np.float64)), name


def test_one_step_outside_is_rejected() -> None:
    random = np.random.default_rng(6)
    for numerics, dtype in itertools.product((NormNumerics(), ANYTHING), DTYPES):
        for _, addends, weight in _drawn((4, 8, 32), dtype, random):
            want = _expected(addends, weight, numerics, dtype)
            for interval in (want.output, want.residual):
                assert interval is not None
                for end, away in ((interval.lower, -torch.inf), (interval.upper, torch.inf)):
                    assert bool((interval.error_over_bound(end) <= 1).all())
                    outside = torch.nextafter(end.to(dtype), torch.full_like(end, away).to(dtype))
                    assert bool((interval.error_over_bound(outside) > 1).all())


def _wrong(name: str, addends: Array, weight: Array, random: np.random.Generator) -> adv.Outcome:
    """A kernel with one defect, in bfloat16, declared as ``NormNumerics()`` or with Gemma's weight."""
    dtype, numerics, epsilon = torch.bfloat16, NormNumerics(gemma=name == "gemma", square_additions=64), EPSILON
    if name == "unrounded sum":
        numerics = replace(numerics, round_reduced=False)
    elif name == "a rank is missing":
        addends = np.delete(addends, 1, axis=0)
    elif name == "ranks backwards":
        addends = np.concatenate([addends[-2::-1], addends[-1:]])
    elif name == "norm of the other input":
        numerics = replace(numerics, norm_input=NormInput.ROUNDED)
    elif name == "gemma":
        numerics = replace(numerics, gemma=False)
    elif name == "residual twice":
        addends = np.concatenate([addends, addends[-1:]])
    elif name == "no residual":
        addends = np.concatenate([addends[:-1], 0 * addends[-1:]])
    good = adv.kernel(addends, weight, epsilon, numerics, dtype, random)
    x, n = good.unrounded * 0, addends.shape[2]
    if name in ("epsilon outside", "over N - 1"):
        x = adv.to(dtype, adv.sum_over_ranks(addends[:-1], SumOrder.RANK, random)) + addends[-1]
        square = (x.astype(np.float64) ** 2).sum(1, keepdims=True)
        root = (
            1 / (np.sqrt(square / n) + EPSILON)
            if name == "epsilon outside"
            else 1 / np.sqrt(square / (n - 1) + EPSILON)
        )
        return adv.Outcome(good.residual, adv.to(dtype, (x * root * weight).astype(np.float32)), good.unrounded)
    if name == "truncation":
        cut = (good.unrounded.view(np.int32) & -0x10000).view(np.float32)
        return adv.Outcome(good.residual, cut, good.unrounded)
    return good


@pytest.mark.parametrize(
    "name",
    [
        *("unrounded sum", "a rank is missing", "ranks backwards", "norm of the other input", "gemma"),
        *("residual twice", "no residual", "epsilon outside", "over N - 1", "truncation"),
    ],
)
def test_a_wrong_kernel_is_rejected(name: str) -> None:
    random = np.random.default_rng(7)
    declared = NormNumerics(gemma=name == "gemma", square_additions=64)
    found = {"residual": 0.0, "output": 0.0}
    # As wide as a model: a variance over N - 1 is off by 2**-14 there. Epsilon shows in rows of its size.
    size = 2.0**-4 if name == "epsilon outside" else 1.0
    addends = adv.to(torch.bfloat16, (random.standard_normal((5, 4, 7168)) * size).astype(np.float32))
    if name == "ranks backwards":
        addends[:4, :, ::8] = np.array([2.0**24, 1, 1, -(2.0**24)], np.float32).reshape(4, 1, 1)
    weight = adv.to(torch.bfloat16, 1 + 0.3 * random.standard_normal(7168))
    want = _expected(addends, weight, declared, torch.bfloat16)
    good = adv.kernel(addends, weight, EPSILON, declared, torch.bfloat16, random)
    for got, caught in ((good, False), (_wrong(name, addends, weight, random), True)):
        for part in found:
            outside = getattr(want, part).error_over_bound(torch.from_numpy(getattr(got, part))) > 1
            found[part] = float(outside.double().mean())
        assert (max(found.values()) > 0) is caught, (name, found)


def test_ranks_backwards_make_no_difference_on_exact_data() -> None:
    random = np.random.default_rng(8)
    addends = random.integers(-32, 33, (5, 8, 64)).astype(np.float32)
    weight = np.ones(64, np.float32)
    want = _expected(addends, weight, NormNumerics(), torch.bfloat16)
    got = _wrong("ranks backwards", addends, weight, random)
    assert max(_worst(want, got)) <= 1


def test_oracle_and_specification_agree() -> None:
    random, worst = np.random.default_rng(9), 0.0
    stores = itertools.cycle([Ties.EVEN, Ties.TRUNCATE])
    for numerics, dtype in itertools.product(CHOICES, DTYPES):
        declared = replace(numerics, store=next(stores))
        for name, addends, weight in _drawn((4, 8, 48), dtype, random):
            terms, residual, scale = _tensors(addends, weight, dtype)
            got = normalise(ordered_sum(terms), residual, scale, EPSILON, declared, dtype)
            legal = adv.kernel(addends, weight, EPSILON, declared, dtype, random)
            oracle = norm_oracle.expected(terms, residual, scale, EPSILON, declared, dtype)
            want = expected(terms, residual, scale, EPSILON, declared, dtype)
            for part in ("residual", "output", "unrounded"):
                bounds, mine, result = getattr(oracle, part), getattr(want, part), getattr(got, part)
                assert bool(((bounds.lower <= bounds.value) & (bounds.value <= bounds.upper)).all()), (name, declared)
                assert bool(((bounds.lower <= mine.upper) & (mine.lower <= bounds.upper)).all()), (name, declared)
                worst = max(worst, _ratio(Interval(**vars(bounds)), result), _ratio(mine, result))
                if declared.store is Ties.EVEN and declared.norm_input is not NormInput.EITHER:
                    worst = max(worst, _ratio(Interval(**vars(bounds)), getattr(legal, part)))
                assert worst <= 1, (name, declared, dtype, part)


def test_no_residual_adds_nothing() -> None:
    rows, weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(1)).bfloat16(), torch.ones(40).bfloat16()
    for numerics in CHOICES:
        results = [
            normalise(rows.float(), residual, weight, EPSILON, numerics, rows.dtype)
            for residual in (None, torch.zeros_like(rows))
        ]
        wants = [
            expected(rows[None], residual, weight, EPSILON, numerics, rows.dtype)
            for residual in (None, torch.zeros_like(rows))
        ]
        assert torch.equal(results[0].output, results[1].output)
        assert wants[0].residual is None
        assert torch.equal(wants[0].output.lower, wants[1].output.lower)
        assert torch.equal(wants[0].output.upper, wants[1].output.upper)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_stays_in_its_row(poison: float) -> None:
    terms = torch.randn(2, 5, 33, generator=torch.Generator().manual_seed(2)).bfloat16()
    residual, weight = terms[1] / 2, torch.ones(33).bfloat16()
    clean = expected(terms, residual, weight, EPSILON, NormNumerics(), terms.dtype)
    good = normalise(ordered_sum(terms), residual, weight, EPSILON, NormNumerics(), terms.dtype)
    terms[0, 2, 7] = poison
    rows = torch.tensor([True, True, False, True, True])
    assert torch.equal(finite_rows(terms, residual, terms.dtype), rows)
    want = expected(terms, residual, weight, EPSILON, NormNumerics(), terms.dtype)
    got = normalise(ordered_sum(terms), residual, weight, EPSILON, NormNumerics(), terms.dtype)
    assert torch.equal(got.output[rows], good.output[rows])
    assert not bool(got.output[2].isfinite().all())
    for name in ("lower", "value", "upper"):
        assert torch.equal(getattr(want.output, name)[rows], getattr(clean.output, name)[rows])
    assert not bool(finite_rows(torch.full((2, 1, 3), 3e38).bfloat16(), None, torch.bfloat16).any())


def test_flushed_subnormals_are_accepted_where_declared() -> None:
    rows = torch.tensor([[2.0**-127, 1.0], [2.0**-130, -(2.0**-128)]]).bfloat16()
    weight = torch.ones(2).bfloat16()
    for flush in (False, True):
        want = expected(rows[None], torch.zeros_like(rows), weight, EPSILON, NormNumerics(may_flush=flush), rows.dtype)
        zeros = torch.where(rows.abs() < 2.0**-126, 0.0, rows)
        assert want.residual is not None
        assert bool((want.residual.error_over_bound(zeros) <= 1).all()) is flush
        assert bool((want.output.error_over_bound(torch.zeros(2, 2))[rows.abs() < 1] <= 1).all()) is flush


def test_a_flushed_weight_is_accepted_where_declared() -> None:
    rows, weight = torch.zeros(1, 64).bfloat16(), torch.full((64,), 2.0**-128).bfloat16()
    rows[0, 0] = 1  # its norm is 8, and 8 * 2**-128 is normal
    for flush in (False, True):
        want = expected(rows[None], None, weight, EPSILON, NormNumerics(may_flush=flush), rows.dtype)
        assert bool(want.output.error_over_bound(torch.zeros(1, 64))[0, 0] <= 1) is flush


def test_truncation_shows_in_the_mean_signed_error() -> None:
    generator = torch.Generator().manual_seed(3)
    for count in (100, 10_000):
        exact = torch.randn(count, generator=generator).float().double() * 3 + 0.01
        nearest = exact.float().bfloat16()
        bits = exact.float().view(torch.int32)
        towards_zero = (bits & -0x10000).view(torch.float32).bfloat16()
        down = torch.where(nearest.double() > exact, (exact - exact.abs() * 2.0**-8).float().bfloat16(), nearest)
        good, cut, floor = (mean_signed_error(result, exact) for result in (nearest, towards_zero, down))
        # Errors spread evenly over a unit deviate by 12**-0.5 of it: four deviations of their mean.
        spread = 4 * (12 * count) ** -0.5
        assert not good.biased
        assert abs(good.outward) < spread
        assert cut.biased
        assert abs(cut.outward + 0.5) < spread
        assert floor.biased
        assert good.count == count
    nothing = mean_signed_error(torch.ones(3).bfloat16(), torch.ones(3).double())
    assert (nothing.count, nothing.biased) == (0, False)
    assert mean_signed_error(torch.full((64,), torch.nan).bfloat16(), exact[:64]).biased


def test_pairwise_sum() -> None:
    for width in (1, 2, 3, 7, 64, 100):
        value = torch.arange(1.0, width + 1).expand(3, width)
        assert pairwise_sum(value).tolist() == [[width * (width + 1) / 2]] * 3
    assert pairwise_sum(torch.tensor([2.0**24, 1.0, 0.0, 1.0])).item() == 2**24 + 2  # one by one: 2**24


def test_refusals() -> None:
    rows, weight = torch.ones(2, 4), torch.ones(4)
    for message, total, residual, scale, epsilon in (
        (r"^rows have shape \[2\]; give \[M, N\]", rows[:, 0], None, weight, EPSILON),
        (r"^residual has shape \[1, 4\]; give \[2, 4\]", rows, rows[:1], weight, EPSILON),
        (r"^weight has shape \[3\]; give \[4\]$", rows, None, weight[:3], EPSILON),
        (r"^epsilon is 0.0; give at least 2\*\*-126", rows, None, weight, 0.0),
    ):
        with pytest.raises(ValueError, match=message):
            normalise(total, residual, scale, epsilon, NormNumerics(), torch.float32)
    with pytest.raises(ValueError, match=r"^dtype is torch.float64; the oracle knows torch.float32, "):
        norm_oracle.expected(rows[None], None, weight, EPSILON, NormNumerics(), torch.float64)
    with pytest.raises(ValueError, match=r"^result has shape \[2\] and exact \[3\]; give the same$"):
        mean_signed_error(torch.ones(2), torch.ones(3).double())
    with pytest.raises(ValueError, match=r"^exact holds NaN or infinities"):
        mean_signed_error(torch.ones(1), torch.tensor([torch.inf]).double())
