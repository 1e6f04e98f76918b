"""Quantise-dequantise of intervals: sound against a quantiser that takes every legal choice, and tight.

Scope: quantise_dequantise of reference/bounds.py. At least 10,000 distinct groups per codec, as points and as
intervals from which the adversary takes ends, inner values and subnormals flushed. Not covered: NaN and infinities.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from conformance.selftest.reference import quantiser_adversary as adv
from conformance.selftest.reference.quantiser_adversary import Array
from reference.bounds import quantise_dequantise
from reference.codecs import STANDARD, Codec, Granularity, PayloadRule, ScaleFormat
from reference.intervals import Interval
from reference.scales import amax, expand

CASES = 10_000
KINDS = {**STANDARD, **adv.UNUSUAL}
DYNAMIC = [name for name, codec in KINDS.items() if not codec.static]


def leaves_no_choice(codec: Codec) -> bool:
    """One legal quantiser."""
    inexact = codec.payload_rule is PayloadRule.APPROXIMATE_RECIPROCAL
    return not (codec.may_flush or inexact) and codec.zero_codes_defined


def dequantised(rows: Array, codec: Codec, choice: adv.Choice, scale: float | None = None) -> torch.Tensor:
    """The adversary's codes times its scales, exact."""
    if scale is None:
        scales = adv.scale_of(amax(torch.from_numpy(rows), codec).numpy().astype(np.float32), codec, choice)
    else:
        scales = np.array([[scale]], np.float32)
    per_element = expand(torch.from_numpy(scales), codec, *rows.shape).numpy()
    return torch.from_numpy(adv.values_of(rows, per_element, codec, choice) * per_element.astype(np.float64))


def drawn(name: str) -> tuple[Codec, list[Array]]:
    """A codec and its tensors: one, or several where a tensor has one scale."""
    codec = adv.narrowed(KINDS[name])
    rows = adv.groups(codec, CASES + 600, np.random.default_rng(len(name)))
    if codec.granularity is Granularity.BLOCK:
        return codec, [rows[: len(rows) // 2 * 2].reshape(-1, 2, 2).reshape(-1, 2)]
    if codec.granularity is Granularity.TENSOR:
        return codec, np.array_split(rows[np.argsort(np.abs(rows).max(1))], 20)
    return codec, [rows]


def around(rows: Array, random: np.random.Generator) -> Interval:
    """Float32 intervals around ``rows``: none, a few units, or a good part of the value."""
    width = np.abs(rows) * np.exp2(random.integers(-24, 0, rows.shape)) * random.integers(0, 2, rows.shape)
    limit = np.finfo(np.float32).max
    ends = [np.clip(rows.astype(np.float64) + sign * width, -limit, limit).astype(np.float32) for sign in (-1, 1)]
    return Interval(*(torch.from_numpy(x).double() for x in (rows, *ends)))


@pytest.mark.parametrize("name", DYNAMIC)
def test_sound_for_every_legal_quantiser(name: str) -> None:
    random = np.random.default_rng(1)
    codec, tensors = drawn(name)
    cases, worst, of_point = 0, 0.0, 0.0
    for rows in tensors:
        point, wide = Interval.exact(torch.from_numpy(rows)), around(rows, random)
        bounds = quantise_dequantise(point, codec), quantise_dequantise(wide, codec)
        low, high = wide.lower.numpy().astype(np.float32), wide.upper.numpy().astype(np.float32)
        for bound in bounds:
            assert bool((bound.lower <= bound.value).all() and (bound.value <= bound.upper).all())
        for choice in adv.choices(codec):
            of_point = max(of_point, float(bounds[0].error_over_bound(dequantised(rows, codec, choice)).max()))
            for x in (low, high, np.where(random.random(rows.shape) < 0.5, low, high), rows):
                worst = max(worst, float(bounds[1].error_over_bound(dequantised(x, codec, choice)).max()))
        cases += rows.size // adv.WIDTH
    assert cases >= CASES
    assert of_point <= 1
    assert 0.5 < worst <= 1


@pytest.mark.parametrize("name", [name for name, codec in KINDS.items() if codec.static])
def test_static_scale(name: str) -> None:
    random = np.random.default_rng(2)
    codec, tensors = drawn(name)
    cases = 0
    for rows in tensors:
        wide, scale = around(rows, random), float(np.abs(rows).max().astype(np.float64) / 300 + 2.0**-140)
        bound = quantise_dequantise(wide, codec, scale=scale)
        for choice in adv.choices(codec):
            for x in (wide.lower, wide.value, wide.upper):
                result = dequantised(x.numpy().astype(np.float32), codec, choice, scale)
                assert float(bound.error_over_bound(result).max()) <= 1
        cases += rows.size // adv.WIDTH
    assert cases >= CASES
    with pytest.raises(ValueError, match=r"a static codec needs one, a dynamic one none$"):
        quantise_dequantise(wide, codec)


@pytest.mark.parametrize("name", [name for name in DYNAMIC if leaves_no_choice(KINDS[name])])
def test_points_have_one_result_where_nothing_is_open(name: str) -> None:
    codec, tensors = drawn(name)
    for rows in tensors:
        ordinary = rows[(np.abs(rows).max(1) > 2.0**-90) & (np.abs(rows).max(1) < 2.0**100)]
        ordinary = ordinary[: len(ordinary) // 2 * 2]
        bound = quantise_dequantise(Interval.exact(torch.from_numpy(ordinary)), codec)
        assert torch.equal(bound.lower, bound.upper)
        assert torch.equal(bound.value, dequantised(ordinary, codec, next(adv.choices(codec))))


def test_a_scale_that_may_double_costs_half_a_step_not_more() -> None:
    """Where amax may pass a power of two, codes of both scales are legal, and nothing further off than half a step."""
    random = np.random.default_rng(3)
    for name in DYNAMIC:
        codec = adv.narrowed(KINDS[name])
        if codec.scale_format is not ScaleFormat.E8M0 or codec.granularity is not Granularity.GROUP or codec.may_flush:
            continue
        rows = random.uniform(-1, 1, (4096, adv.WIDTH)).astype(np.float32)
        rows[:, 0] = codec.maximum / 2.0 ** np.floor(np.log2(codec.maximum))
        wide = Interval(*(torch.from_numpy(rows * np.float32(1 + d)).double() for d in (0.0, 0.0, 0.0)))
        wide.lower[:, 0] *= 1 - 2.0**-3
        wide.upper[:, 0] *= 1 + 2.0**-3
        bound = quantise_dequantise(wide, codec)
        spread = (bound.upper - bound.lower)[:, 1:]
        largest = codec.payload.smallest * 2.0**-codec.power
        relative = 2.0**-codec.payload.mantissa_bits
        assert bool((spread <= torch.maximum(2 * wide.value[:, 1:].abs() * relative, torch.tensor(4 * largest))).all())


def test_unknown_groups_are_unbounded() -> None:
    codec = adv.narrowed(STANDARD["mxfp4_up"])
    rows = torch.ones(2, 2 * adv.WIDTH)
    rows[0, 1] = torch.nan
    bound = quantise_dequantise(Interval.exact(rows), codec)
    assert bool((bound.upper[0, : adv.WIDTH] == torch.inf).all())
    assert bool(bound.upper[1].isfinite().all() and bound.upper[0, adv.WIDTH :].isfinite().all())
