"""Scale rules against the oracle's rational arithmetic and against what their names say, at every power of two.

Scope: reference/scales.py and the validation in reference/codecs.py.
"""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from conformance.selftest.reference import quantiser_adversary as adv
from reference.codecs import STANDARD, Codec, Granularity, ScaleFormat, ScaleRule, ZeroScale
from reference.formats import E2M1, E4M3FN, E4M3FNUZ
from reference.problem import ProblemError
from reference.quantisation_oracle import quantise as oracle
from reference.scales import amax, expand, scales_of, to_float32, unrounded

RULES = {name: codec for name, codec in {**STANDARD, **adv.UNUSUAL}.items() if not codec.static}
#: The same with one codec for each scale rule and its constants.
DISTINCT = {
    (c.scale_rule, c.maximum, c.payload.mantissa_bits, c.amax_floor, c.scale_floor, c.zero_scale, c.scale_format): name
    for name, c in RULES.items()
}
BITWISE = {name: codec for name, codec in RULES.items() if codec.scale_format is ScaleFormat.E8M0}
LARGEST = torch.finfo(torch.float32).max


def _magnitudes(codec: Codec) -> torch.Tensor:
    """Magnitudes on and beside every threshold of a rule, over float32's range, float64."""
    turns = torch.tensor([1.0, 1.25, 1.5, 1.75, 1.9375, codec.maximum / 2.0**codec.power])
    exponents = torch.cat([torch.arange(-148, -117, 4), torch.arange(-116, 100, 19), torch.arange(122, 128)])
    edges = (turns.double() * torch.exp2(exponents.double()).unsqueeze(1)).flatten().float()
    edges = edges[edges.isfinite()]
    infinity = torch.tensor(torch.inf)
    beside = [edges, torch.nextafter(edges, infinity), torch.nextafter(edges, -infinity)]
    floors = torch.tensor([codec.amax_floor, codec.scale_floor * codec.maximum, LARGEST, 0.0])
    drawn = torch.randint(0, 0x7F800000, (64,), generator=torch.Generator().manual_seed(4)).int().view(torch.float32)
    every = torch.cat([*beside, floors, drawn]).double()
    return torch.where(every.isfinite(), every, 0.0)


def _by_fractions(largest: torch.Tensor, codec: Codec) -> torch.Tensor:
    """The oracle's scale of each magnitude."""
    one_each = replace(
        codec, granularity=Granularity.TOKEN, group=0, block_rows=0, payload_rule=RULES["token_fn"].payload_rule
    )
    return oracle(largest.float().unsqueeze(1), one_each)[1].squeeze(1)


@pytest.mark.parametrize("name", DISTINCT.values())
def test_rules_agree_with_rational_arithmetic(name: str) -> None:
    codec = RULES[name]
    largest = _magnitudes(codec)
    assert torch.equal(scales_of(largest, codec), _by_fractions(largest, codec))


@pytest.mark.parametrize("name", BITWISE)
def test_powers_of_two_are_what_they_are_called(name: str) -> None:
    codec = BITWISE[name]
    largest = _magnitudes(codec)
    # Quotients that are float32 subnormals, or round to the least normal number, follow the bits and not the name.
    largest = largest[largest >= 2.0 ** (codec.power - 124)]
    for value, scale in zip(largest.tolist(), scales_of(largest, codec).tolist(), strict=True):
        amount, found, power = Fraction(value), Fraction(scale), Fraction(2) ** codec.power
        assert found.numerator == 1 or found.denominator == 1
        if codec.scale_rule is ScaleRule.DOWN:
            assert found <= amount / power < 2 * found
        elif codec.scale_rule is ScaleRule.CEIL:
            assert found / 2 < amount / power <= found
        elif codec.scale_rule is ScaleRule.UP:
            assert found / 2 < amount / Fraction(codec.maximum) <= found
        else:
            bits = 1 if codec.scale_rule is ScaleRule.EVEN_ONE_BIT else codec.payload.mantissa_bits
            turn = 2 - Fraction(1, 2 ** (bits + 1))
            assert turn * found / 2 <= amount / power < turn * found


@pytest.mark.parametrize("name", ["ue8m0_fn", "ue8m0_fnuz", "ue8m0_fnuz224", "ue8m0_reciprocal_fn"])
def test_ue8m0_at_every_power_of_two(name: str) -> None:
    """A scale of 2**n stays, its upper neighbour becomes 2**(n + 1); logarithms get some of these wrong."""
    codec = replace(STANDARD[name], amax_floor=0.0)
    powers = torch.exp2(torch.arange(-124, 127 - codec.power).double())
    exact = (powers * codec.maximum).float()
    above = torch.nextafter(exact, torch.tensor(torch.inf)).double()
    below = torch.nextafter(exact, torch.tensor(0.0)).double()
    assert torch.equal(scales_of(exact.double(), codec), powers)
    assert torch.equal(scales_of(above, codec), 2 * powers)
    assert torch.equal(scales_of(below, codec), powers)


@pytest.mark.parametrize("maximum", [6.0, 448.0, 240.0, 224.0])
def test_round_up_by_division_and_by_reciprocal_are_one_rule(maximum: float) -> None:
    """Of normal quotients: near a power of two, where the two could part, they do not."""
    payload = {6.0: E2M1, 448.0: E4M3FN}.get(maximum, E4M3FNUZ)
    codec = Codec(payload, Granularity.GROUP, maximum, ScaleRule.UP, group=32, scale_format=ScaleFormat.E8M0)
    other = replace(codec, scale_rule=ScaleRule.CEIL_OF_RECIPROCAL)
    steps = torch.arange(-4096, 4096)
    near = (torch.tensor(maximum).view(torch.int32) + steps).int().view(torch.float32).double()
    drawn = torch.randint(0x3F800000, 0x40000000, (50_000,), generator=torch.Generator().manual_seed(1)).int()
    every = torch.cat([near, drawn.view(torch.float32).double()])
    assert torch.equal(scales_of(every, codec), scales_of(every, other))


def test_even_of_fp4_and_of_fp8_turn_at_different_places() -> None:
    largest = torch.tensor([1.0, 1.25, 1.5, 1.749, 1.75, 1.9374, 1.9375], dtype=torch.float64)
    exponents = {
        "mxfp4_even": [-2, -2, -2, -2, -1, -1, -1],
        "mxfp8_fn_even": [-8, -8, -8, -8, -8, -8, -7],
        "mxfp8_fn_even_one_bit": [-8, -8, -8, -8, -7, -7, -7],
        "mxfp8_fnuz_even": [-7, -7, -7, -7, -7, -7, -6],
        "mxfp4_up": [-2, -2, -2, -1, -1, -1, -1],
        "mxfp8_fn_up": [-8, -8, -8, -8, -8, -7, -7],
        "mxfp4_down": [-2] * 7,
        "mxfp4_ceil": [-2, -1, -1, -1, -1, -1, -1],
    }
    for name, want in exponents.items():
        assert scales_of(largest, STANDARD[name]).log2().tolist() == want, name


def test_ends_of_the_range() -> None:
    ends = torch.tensor([0.0, 2.0**-149, 2.0**-127, LARGEST], dtype=torch.float64)
    exponents = {
        "mxfp4_down": [-127, -127, -127, 125],
        "mxfp4_up": [-127, -127, -126, 126],
        "mxfp4_even": [-127, -127, -127, 126],
        "mxfp4_ceil": [-127, -127, -126, 126],
    }
    for name, want in exponents.items():
        assert scales_of(ends, STANDARD[name]).log2().tolist() == want, name
    spoilt = torch.tensor([torch.nan, torch.inf], dtype=torch.float64)
    for name, codec in RULES.items():
        scale = scales_of(spoilt, codec)
        assert scale[0].isnan(), name
        assert scale[1].isnan() if codec.scale_format is not ScaleFormat.FLOAT32 else scale[1].isinf(), name


def test_floors_and_zero_scales() -> None:
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    want = {
        "token_fn": 1.0,
        "tensor_fn": 0.0,
        "token_hip_fn": 0.0,
        "token_floor_fn": 1 / (448 * 512),
        "token_floor_fnuz224": 1 / (224 * 512),
        "group128_fnuz": 1e-10 / 240,
        "block128_fn": 1.0,
        "ue8m0_fn": 2.0**-42,
        "mxfp8_fn_up": 2.0**-127,
    }
    for name, scale in want.items():
        found = scales_of(zero, STANDARD[name])
        # Rounded: a floor, a reciprocal and their product.
        assert found.item() == pytest.approx(scale, rel=3 * 2.0**-24, abs=0), name
        assert torch.equal(found, to_float32(found)), name
        assert scales_of(one, STANDARD[name]).item() >= 1 / 448, name
    # The floor of the scale comes before its power of two: 1e-10 becomes 2**-33.
    floored = replace(STANDARD["ue8m0_fn"], scale_floor=1e-10)
    assert scales_of(zero, floored).item() == 2.0**-33
    assert scales_of(zero, replace(floored, amax_floor=0.0, scale_floor=0.0)).item() == 0
    # AITER tests the scale, not the magnitude, for zero.
    underflow = torch.tensor([2.0**-149], dtype=torch.float64)
    assert scales_of(underflow, STANDARD["token_fn"]).item() == 1


@pytest.mark.parametrize("name", ["group128_fn", "mxfp4_up", "block128_fn", "token_fn", "tensor_fn"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (130, 200), (128, 128)])
def test_each_element_counts_in_its_own_group_only(name: str, shape: tuple[int, int]) -> None:
    codec, (rows, columns) = STANDARD[name], shape
    tall = {Granularity.TENSOR: rows, Granularity.BLOCK: codec.block_rows}.get(codec.granularity, 1)
    wide = codec.group or columns
    background = amax(torch.full(shape, 0.5), codec)
    assert bool((background == 0.5).all())
    corners = {0, columns - 1, min(wide, columns) - 1, min(wide, columns - 1)}
    for i in {0, rows - 1, min(tall, rows) - 1, min(tall, rows - 1)}:
        for j in corners:
            single = torch.full(shape, 0.5)
            single[i, j] = -2.0
            want = background.clone()
            want[i // tall, j // wide] = 2
            largest = amax(single, codec)
            assert torch.equal(largest, want), (i, j)
            assert expand(largest, codec, *shape)[i, j] == 2
            inside = expand(largest, codec, *shape) == 2
            top, left = i // tall * tall, j // wide * wide
            assert int(inside.sum()) == (min(top + tall, rows) - top) * (min(left + wide, columns) - left)


def test_empty_rows() -> None:
    shapes = {"tensor_fn": (1, 1), "token_fn": (0, 1), "group128_fn": (0, 2), "block128_fn": (0, 2)}
    for name, shape in shapes.items():
        assert tuple(amax(torch.zeros(0, 256), STANDARD[name]).shape) == shape
        assert tuple(expand(torch.zeros(shape), STANDARD[name], 0, 256).shape) == (0, 256)
    assert amax(torch.zeros(2, 0), STANDARD["token_fn"]).tolist() == [[0], [0]]


def test_unrounded_is_the_operation() -> None:
    largest = torch.tensor([3.0], dtype=torch.float64)
    assert unrounded(largest, STANDARD["token_fn"]).item() == 3 / 448
    assert unrounded(largest, STANDARD["mxfp4_down"]).item() == 0.75
    assert unrounded(largest, STANDARD["mxfp4_even"]).item() == 3
    reciprocal = torch.tensor(1 / 448, dtype=torch.float32).item()
    for name in ("token_hip_fn", "ue8m0_reciprocal_fn"):
        assert unrounded(largest, STANDARD[name]).item() == 3 * reciprocal != 3 / 448


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^the codec is static: its scale is given by the caller, not computed$"):
        scales_of(torch.ones(1), STANDARD["tensor_static_fn"])
    with pytest.raises(ValueError, match=r"^scales are \(2, 1\); group scales of 2 x 256 are \(2, 2\)$"):
        expand(torch.ones(2, 1), STANDARD["group128_fn"], 2, 256)
    with pytest.raises(ProblemError, match=r"^maximum is 448.0; float8_e4m3fnuz holds at most 240.0$"):
        replace(STANDARD["token_fn"], payload=E4M3FNUZ)
    with pytest.raises(
        ProblemError, match=r"^scale_floor is 0.5 with scale rule UP, which has no float32 scale; give am"
    ):
        replace(STANDARD["mxfp4_up"], scale_floor=0.5)


def test_standard_codecs() -> None:
    assert [
        codec.power for codec in map(STANDARD.get, ("token_fn", "token_fnuz", "token_fnuz224", "mxfp4_up")) if codec
    ] == [8, 7, 7, 2]
    assert {codec.maximum for codec in STANDARD.values()} == {448.0, 240.0, 224.0, 6.0}
    assert {codec.scale_rule for codec in STANDARD.values()} == set(ScaleRule)
    assert {codec.granularity for codec in STANDARD.values()} == set(Granularity)
    assert {codec.zero_scale for codec in STANDARD.values()} == set(ZeroScale)
    assert all(math.frexp(codec.maximum)[1] - 1 == codec.power for codec in STANDARD.values())
