"""What a codec accepts: sound against a quantiser that takes every legal choice, exact where it can be, and tight.

Scope: accepted_scales, accepted_values, half_step and undefined of reference/quantisation.py. At least 10,000 distinct
groups per codec. That no legal choice is missing in the adversary is not proven by this.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from conformance.selftest.reference import quantiser_adversary as adv
from conformance.selftest.reference.quantiser_adversary import Array
from reference.codecs import STANDARD, Codec, Granularity, PayloadRule
from reference.formats import Ties
from reference.quantisation import accepted_scales, accepted_values, half_step, undefined, undefined_groups
from reference.quantisation_oracle import magnitudes
from reference.scales import amax, expand

KINDS = {**STANDARD, **adv.UNUSUAL}
CASES = 10_000


def _drawn(name: str) -> tuple[Codec, list[Array]]:
    """A codec and the tensors to try: one, or several where one tensor has one scale."""
    codec = adv.narrowed(KINDS[name])
    rows = adv.groups(codec, CASES + 64, np.random.default_rng(len(name)))
    if codec.granularity is Granularity.BLOCK:
        return codec, [rows.reshape(-1, 1)]
    if codec.granularity is Granularity.TENSOR:
        order = np.argsort(np.abs(rows).max(1))
        return codec, np.array_split(rows[order], 16)
    return codec, [rows]


def _cases(codec: Codec, tensors: list[Array]) -> int:
    """Distinct groups; where one tensor has one scale, distinct elements with their scale."""
    if codec.granularity is Granularity.TENSOR:
        return sum(len(np.unique(rows)) for rows in tensors)
    return len(np.unique(tensors[0].reshape(-1, adv.WIDTH), axis=0))


def _result(rows: Array, codec: Codec, choice: adv.Choice) -> tuple[torch.Tensor, torch.Tensor]:
    """The adversary's payload values and scales."""
    largest = amax(torch.from_numpy(rows), codec).numpy().astype(np.float32)
    scales = _static_scale(rows) if codec.static else adv.scale_of(largest, codec, choice)
    per_element = expand(torch.from_numpy(scales), codec, *rows.shape).numpy()
    values = adv.values_of(rows, per_element, codec, choice)
    return torch.from_numpy(values).double(), torch.from_numpy(scales).double()


def _static_scale(rows: Array) -> Array:
    """Some saturation; and a subnormal reciprocal for huge rows."""
    largest = np.abs(rows).max().astype(np.float64)
    return np.array([[largest if largest > 2.0**126 else largest / 300 + 2.0**-140]], np.float32)


def _worst(rows: Array, codec: Codec, choice: adv.Choice) -> tuple[float, float, float]:
    """Largest error over bound of scales, values and dequantised values."""
    x = torch.from_numpy(rows)
    values, scales = _result(rows, codec, choice)
    by_scale = torch.zeros(1) if codec.static else accepted_scales(x, codec).error_over_bound(scales)
    by_value = accepted_values(x, scales, codec).error_over_bound(values)
    error = (values * expand(scales, codec, *rows.shape) - x.double()).abs()
    bound = half_step(x, scales, codec)
    over = torch.where(error == 0, 0.0, error / bound)
    assert not bool(undefined(x, codec).any())
    return float(by_scale.max()), float(by_value.max()), float(over.max())


@pytest.mark.parametrize("name", KINDS)
def test_sound_for_every_legal_choice(name: str) -> None:
    codec, tensors = _drawn(name)
    assert _cases(codec, tensors) >= CASES
    worst = 0.0
    for choice in adv.choices(codec):
        for rows in tensors:
            ratios = _worst(rows, codec, choice)
            assert max(ratios) <= 1, (choice, ratios)
            worst = max(worst, ratios[2])
    assert worst > 0.99, "the adversary has midpoints: it reaches the bound"


@pytest.mark.parametrize("name", [n for n in KINDS if ("hip" in n or n in adv.UNUSUAL) and not KINDS[n].static])
def test_both_ends_of_accepted_values_are_results(name: str) -> None:
    codec, (rows,) = _drawn(name)
    x = torch.from_numpy(rows)
    scales = torch.from_numpy(adv.scale_of(amax(x, codec).numpy().astype(np.float32), codec, adv.Choice())).double()
    accepted = accepted_values(x, scales, codec)
    per_element = expand(scales, codec, *rows.shape).numpy().astype(np.float32)
    found = np.stack([adv.values_of(rows, per_element, codec, choice) for choice in adv.choices(codec)])
    # Where any code is allowed, the adversary tries a few only.
    fixed = (accepted.upper < codec.maximum) | (accepted.lower > -codec.maximum)
    assert bool((torch.from_numpy(found.min(0)) == accepted.lower)[fixed].all())
    assert bool((torch.from_numpy(found.max(0)) == accepted.upper)[fixed].all())
    assert float(fixed.double().mean()) > 0.7


@pytest.mark.parametrize("name", [n for n, codec in KINDS.items() if not codec.may_flush])
def test_without_a_choice_one_result_is_accepted(name: str) -> None:
    codec, tensors = _drawn(name)
    x = torch.from_numpy(tensors[-1])
    scales = _result(tensors[-1], codec, adv.Choice())[1]
    if not codec.static:
        accepted = accepted_scales(x, codec)
        assert torch.equal(accepted.lower, accepted.upper)
    values = accepted_values(x, scales, codec)
    if codec.payload_rule is not PayloadRule.APPROXIMATE_RECIPROCAL:
        one = values.lower == values.upper
        assert bool((one | (expand(scales, codec, *x.shape) <= 2.0**-128)).all())


@pytest.mark.parametrize("ties", list(Ties))
@pytest.mark.parametrize("name", ["token_fn", "token_fnuz", "token_fnuz224", "mxfp4_up", "e5m2", "e5m2fnuz"])
def test_half_step_is_tight_at_every_code(name: str, ties: Ties) -> None:
    """The code furthest from its element that the rounding allows, between every two codes."""
    codec = replace(KINDS[name], ties=ties)
    table = np.array([float(m) for m in magnitudes(codec.payload.name) if m <= codec.maximum])
    share = {Ties.EVEN: 0.5, Ties.AWAY: 0.5, Ties.TRUNCATE: 1 - 2.0**-10}[ties]
    inexact = table[:-1] + share * (table[1:] - table[:-1])
    # With the maximum in it, the scale of each group of 32 is 1.
    columns = -(-len(inexact) // 31) * 31
    padded = np.pad(inexact, (0, columns - len(inexact))).reshape(-1, 31)
    rows = np.concatenate([padded, np.full((len(padded), 1), codec.maximum)], 1).astype(np.float32)
    values, scales = _result(rows, codec, adv.Choice())
    assert bool((scales == 1).all())
    error = (values - torch.from_numpy(rows).double()).abs()
    ratio = error / half_step(torch.from_numpy(rows), scales, codec)
    assert float(ratio.max()) <= 1
    assert float(ratio[:, :31].flatten()[: len(inexact)].min()) > 0.99


def test_beyond_the_maximum_what_is_cut_is_the_error() -> None:
    codec = STANDARD["tensor_static_fnuz224"]
    x, scales = torch.tensor([[230.0, 1000.0, -1e30]]), torch.ones(1, 1, dtype=torch.float64)
    accepted = accepted_values(x, scales, codec)
    assert accepted.lower.tolist() == accepted.upper.tolist() == [[224, 224, -224]]
    ratio = (accepted.value - x.double()).abs() / half_step(x, scales, codec)
    assert bool((ratio <= 1).all())
    assert bool((ratio > 0.7).all())


@pytest.mark.parametrize("rule", [PayloadRule.RECIPROCAL, PayloadRule.APPROXIMATE_RECIPROCAL])
def test_reciprocals_that_are_subnormal_have_few_bits(rule: PayloadRule) -> None:
    """Scales above 2**126, and elements whose quotient lies beside a midpoint as the rounded reciprocal has it."""
    codec = replace(STANDARD["tensor_static_fn"], payload_rule=rule)
    table = np.array([float(m) for m in magnitudes(codec.payload.name)])
    middles = ((table[1:] + table[:-1]) / 2)[:32]
    past_a_float32_error = False
    for scale in np.random.default_rng(8).uniform(2.0**126, 2.0**127.9, 60).astype(np.float32):
        beside = (middles * scale).astype(np.float32)
        steps = np.arange(-12, 13)[:, None] * np.spacing(beside)
        rows = (beside + steps).astype(np.float32)
        scales = torch.full((1, 1), float(scale), dtype=torch.float64)
        bound = half_step(torch.from_numpy(rows), scales, codec)
        for choice in adv.choices(codec):
            values = torch.from_numpy(adv.values_of(rows, np.full_like(rows, scale), codec, choice))
            error = (values * scales - torch.from_numpy(rows).double()).abs()
            assert bool((error <= bound).all())
            division = half_step(torch.from_numpy(rows), scales, STANDARD["tensor_static_fn"])
            past_a_float32_error |= bool((error > division * (1 + 2.0**-22)).any())
    assert past_a_float32_error


def test_nothing_is_promised_where_the_input_is_not_finite() -> None:
    rows = torch.ones(4, 64)
    rows[1, 40], rows[2, 3] = torch.nan, -torch.inf
    group = replace(STANDARD["mxfp4_up"], may_flush=True)
    assert undefined_groups(rows, group).tolist() == [[False] * 2, [False, True], [True, False], [False] * 2]
    assert undefined(rows, group).sum() == 64
    assert undefined(rows, STANDARD["tensor_fn"]).all()
    assert undefined(rows, STANDARD["token_fn"]).sum(1).tolist() == [0, 64, 64, 0]
    assert undefined(rows, STANDARD["block128_fn"]).all()
    static = STANDARD["tensor_static_fn"]
    assert undefined(rows, static).sum() == 2
    assert not undefined_groups(rows, static).any()
    scales = torch.ones(4, 2, dtype=torch.float64)
    accepted, spoilt = accepted_values(rows, scales, group), undefined(rows, group)
    assert bool((accepted.lower[spoilt] == -torch.inf).all())
    assert bool((accepted.upper[~spoilt] == 1).all())
    assert accepted_scales(rows, group).upper.isinf().sum() == 2
    assert half_step(rows, scales, group).isinf().sum() == 64


@pytest.mark.parametrize("scale", [torch.nan, torch.inf, -1.0])
def test_codes_of_an_impossible_scale_are_left_to_the_check_of_scales(scale: float) -> None:
    codec, rows = STANDARD["token_fn"], torch.ones(1, 4)
    scales = torch.full((1, 1), scale, dtype=torch.float64)
    assert accepted_values(rows, scales, codec).upper.isinf().all()
    assert half_step(rows, scales, codec).isinf().all()
    assert bool((accepted_scales(rows, codec).error_over_bound(scales) > 1).all())


def test_zero_groups_whose_codes_are_garbage_still_mean_zero() -> None:
    rows, scales = torch.zeros(1, 8), torch.zeros(1, 1, dtype=torch.float64)
    garbage, defined = KINDS["flushing division, garbage"], KINDS["flushing division"]
    assert accepted_values(rows, scales, garbage).upper.tolist() == [[448] * 8]
    assert accepted_values(rows, scales, defined).upper.tolist() == [[0] * 8]
    assert half_step(rows, scales, garbage).tolist() == [[0] * 8]
    assert accepted_scales(rows, garbage).upper.tolist() == [[0]]


def test_flushing_adds_zero_and_nothing_else() -> None:
    codec = replace(STANDARD["mxfp8_fn_up"], may_flush=True, payload_rule=PayloadRule.RECIPROCAL)
    rows = torch.tensor([[448 * 2.0**-126, 2.0**-127, 0.0], [448 * 2.0**-130, 0.0, 0.0], [1.0, 2.0**-140, 0.0]])
    accepted = accepted_scales(rows, codec)
    assert accepted.lower.log2().tolist() == [[-126], [-127], [-8]]
    assert accepted.upper.log2().tolist() == [[-126], [-126], [-8]]
    values = accepted_values(rows, accepted.upper, codec)
    assert values.lower[0].tolist() == [448, 0, 0]
    assert values.upper[0].tolist() == [448, 0.5, 0]
    # 2**127 has a subnormal reciprocal: what it multiplies may be lost.
    large = torch.tensor([[2.0**127]])
    values = accepted_values(large, torch.full((1, 1), 2.0**127, dtype=torch.float64), codec)
    assert (values.lower.item(), values.upper.item()) == (0, 1)
