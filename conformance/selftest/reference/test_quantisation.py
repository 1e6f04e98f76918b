"""The executable specification against the oracle, on rows made to hurt, and its policies one by one.

Scope: quantise and dequantise of reference/quantisation.py, and the oracle itself. Choices are in
test_quantisation_bounds.py, wrong quantisers in test_quantisation_faults.py.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from conformance.selftest.reference import quantiser_adversary as adv
from reference import quantisation_oracle
from reference.codecs import STANDARD, Codec, Granularity, PayloadRule
from reference.formats import E2M1, E4M3FN, E4M3FNUZ, E5M2, E5M2FNUZ, FORMATS, Ties
from reference.quantisation import dequantise, quantise, undefined, undefined_groups
from reference.rounding import decode, encode

KINDS = {**STANDARD, **adv.UNUSUAL}
SINGLE = {n: codec for n, codec in KINDS.items() if codec.payload_rule is not PayloadRule.APPROXIMATE_RECIPROCAL}
MIDPOINTS = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]


def hostile_rows(columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows ``[about 60, columns]``: zeros, subnormals, extremes, midpoints, powers of two, NaN, infinities."""
    generator = torch.Generator().manual_seed(columns)
    normal = torch.randn(24, columns, generator=generator)
    # Magnitudes that differ by row, and by group of 32.
    normal[:12] *= torch.exp2(torch.randint(-120, 120, (12, 1), generator=generator).float())
    normal[12:] *= torch.exp2((torch.arange(columns) // 32 % 40 * 6 - 120).float())
    normal[0, 5 % columns], normal[1, columns - 1], normal[13, columns // 2] = torch.nan, torch.inf, -torch.inf
    normal[14, : columns // 2] = 0
    midpoints = torch.tensor(MIDPOINTS).repeat(columns)[:columns]
    on_midpoints = midpoints * torch.exp2(torch.arange(-126, 120, 20).float()).unsqueeze(1)
    powers = torch.exp2(torch.arange(columns).float() % 200 - 100)
    up, down = (torch.nextafter(powers, torch.tensor(end)) for end in (torch.inf, 0.0))
    largest = torch.finfo(torch.float32).max
    flat = torch.tensor([0.0, -0.0, 2.0**-149, 2.0**-133, 2.0**-126, largest, -1.0]).unsqueeze(1).expand(-1, columns)
    subnormal = torch.randint(0, 2**23, (3, columns), generator=generator).int().view(torch.float32)
    return torch.cat([normal, on_midpoints, torch.stack([powers, up, -down]), flat, subnormal]).to(dtype)


def _pieces(rows: torch.Tensor, codec: Codec) -> list[torch.Tensor]:
    """Where all rows share a scale, some rows at a time, so that NaN does not hide everything."""
    together = codec.granularity in (Granularity.TENSOR, Granularity.BLOCK)
    return [rows[i : i + 5] for i in range(0, len(rows), 5)] if together else [rows]


@pytest.mark.parametrize("name", SINGLE)
def test_agrees_with_the_oracle(name: str) -> None:
    codec = SINGLE[name]
    scale = 0.013 if codec.static else None
    for columns, dtype in ((1, torch.float32), (200, torch.float32), (256, torch.bfloat16)):
        for rows in _pieces(hostile_rows(columns, dtype), codec):
            got = quantise(rows, codec, scale=scale)
            values, scales = quantisation_oracle.quantise(rows, codec, scale)
            groups, elements = undefined_groups(rows, codec), undefined(rows, codec)
            assert torch.equal(got.scales.masked_fill(groups, 0), scales.masked_fill(groups, 0))
            found = decode(got.codes, codec.payload).masked_fill(elements, 0)
            assert torch.equal(found, values.masked_fill(elements, 0))
            assert bool(values.isnan().eq(elements).all())


@pytest.mark.parametrize("name", KINDS)
def test_a_spoilt_group_spoils_no_other(name: str) -> None:
    codec = KINDS[name]
    scale = 0.5 if codec.static else None
    clean = torch.randn(130, 200, generator=torch.Generator().manual_seed(2))
    before = dequantise(quantise(clean, codec, scale=scale), codec)
    for bad in (torch.nan, -torch.inf):
        spoilt = clean.clone()
        spoilt[128, 199] = bad
        elements = undefined(spoilt, codec)
        after = dequantise(quantise(spoilt, codec, scale=scale), codec)
        assert torch.equal(before[~elements], after[~elements])
        assert codec.static or not after[128, 199].isfinite()
        ragged = 200 % codec.group if codec.group else 0
        size = {Granularity.TENSOR: 130 * 200, Granularity.TOKEN: 200, Granularity.BLOCK: 2 * ragged}
        assert int(elements.sum()) == (1 if codec.static else size.get(codec.granularity, ragged))


@pytest.mark.parametrize("name", KINDS)
def test_rows_from_num_rows_on_take_no_part(name: str) -> None:
    codec = KINDS[name]
    scale = 0.5 if codec.static else None
    rows = torch.randn(131, 160, generator=torch.Generator().manual_seed(3))
    rows[100:] = torch.nan
    for count in (0, 1, 100):
        got = quantise(rows, codec, scale=scale, num_rows=count)
        alone = quantise(rows[:count].clone(), codec, scale=scale)
        assert got.codes.shape == (count, 160)
        assert torch.equal(got.codes, alone.codes)
        assert torch.equal(got.scales, alone.scales)


@pytest.mark.parametrize("name", KINDS)
def test_ragged_tails_are_quantised_as_if_filled_with_zeros(name: str) -> None:
    codec = KINDS[name]
    scale = 0.5 if codec.static else None
    rows = torch.randn(70, 145, generator=torch.Generator().manual_seed(4))
    rows[:, 128:] *= 1000  # a tail that no other group's scale fits
    filled = torch.zeros(100, 256)
    filled[:70, :145] = rows
    got, whole = quantise(rows, codec, scale=scale), quantise(filled, codec, scale=scale)
    assert torch.equal(got.codes, whole.codes[:70, :145])
    assert torch.equal(got.scales, whole.scales[: got.scales.shape[0], : got.scales.shape[1]])
    error = (dequantise(got, codec) - rows.double()).abs()
    if not codec.static:
        # E2M1 rounded down is off by up to a quarter: 8 becomes 6.
        assert bool((error <= 0.25 * rows.abs().amax(1, keepdim=True)).all())


@pytest.mark.parametrize("name", KINDS)
def test_zeros_become_zeros(name: str) -> None:
    codec = KINDS[name]
    scale = 0.5 if codec.static else None
    rows = torch.randn(130, 250, generator=torch.Generator().manual_seed(5))
    rows[7] = 0
    rows[8, 128:] = -0.0
    got = dequantise(quantise(rows, codec, scale=scale), codec)
    assert bool((got[rows == 0] == 0).all())
    nothing = quantise(torch.zeros(3, 256), codec, scale=scale)
    assert bool((decode(nothing.codes, codec.payload) == 0).all())
    assert bool((dequantise(nothing, codec) == 0).all())


@pytest.mark.parametrize(
    ("name", "element", "value", "scale"),
    [
        ("token_fn", 448.0, 448.0, 1.0),
        ("token_fnuz", 240.0, 240.0, 1.0),
        ("token_fnuz224", 224.0, 224.0, 1.0),
        ("token_fnuz224", 240.0, 224.0, 240 / 224),
        ("mxfp4_up", 6.0, 6.0, 1.0),
        ("mxfp4_up", 7.0, 4.0, 2.0),  # 3.5 is a tie
        ("mxfp4_even", 7.0, 4.0, 2.0),
        ("mxfp4_down", 7.9, 6.0, 1.0),
        ("mxfp8_fn_up", 449.0, 224.0, 2.0),
        ("mxfp8_fn_down", 511.0, 448.0, 1.0),
        ("mxfp8_fnuz_down", 255.0, 240.0, 1.0),
        ("group128_hip_fn", 448.0, 448.0, 1.0),
    ],
)
def test_named_values(name: str, element: float, value: float, scale: float) -> None:
    codec = KINDS[name]
    got = quantise(torch.tensor([[element, 0.0]]), codec)
    assert decode(got.codes, codec.payload).tolist() == [[value, 0.0]]
    assert got.scales.item() == torch.tensor(scale).item()


def test_ties_of_e2m1() -> None:
    rows = torch.tensor([MIDPOINTS])
    codec = STANDARD["mxfp4_up"]
    want = {Ties.EVEN: [0, 1, 1, 2, 2, 4, 4, 6], Ties.AWAY: [0.5, 1, 1.5, 2, 3, 4, 6, 6]}
    for ties, values in want.items():
        got = dequantise(quantise(rows, replace(codec, ties=ties)), codec)
        assert got.tolist() == [values]
    truncated = dequantise(quantise(rows, replace(codec, ties=Ties.TRUNCATE)), codec)
    assert truncated.tolist() == [[0, 0.5, 1, 1.5, 2, 3, 4, 6]]


def test_the_quotient_is_rounded_to_float32_first() -> None:
    """x / s just above a midpoint of two codes, but the midpoint in float32: the even code, not the nearest."""
    scales = 1 + torch.arange(1, 4000) * 2.0**-23
    x = scales * 17  # 17 is midway between 16 and 18; float32 rounds the product
    pairs = zip(x.tolist(), scales.tolist(), strict=True)
    beyond = torch.tensor([Fraction(a) / Fraction(b) > 17 for a, b in pairs])
    assert int(beyond.sum()) > 1000
    # The maximum beside it makes the group's scale.
    rows = torch.stack([x, 448 * scales], 1)[beyond]
    got = quantise(rows, STANDARD["token_fn"])
    exact = got.scales.squeeze(1) == scales[beyond]
    assert int(exact.sum()) > 1000
    assert bool((decode(got.codes, E4M3FN)[exact, 0] == 16).all())
    assert bool((quantisation_oracle.quantise(rows, STANDARD["token_fn"])[0][exact, 0] == 16).all())


def test_static_scales() -> None:
    codec = STANDARD["tensor_static_fnuz"]
    rows = torch.tensor([[1.0, 1e6, -1e6, torch.inf, torch.nan]])
    got = quantise(rows, codec, scale=0.1)
    assert got.scales.item() == torch.tensor(0.1).double().item()
    assert decode(got.codes, E4M3FNUZ)[0, :4].tolist() == [10, 240, -240, 240]
    assert got.codes[0, 4] == 0x80
    assert undefined(rows, codec).tolist() == [[False] * 3 + [True] * 2]


def test_what_cannot_be_quantised_is_refused() -> None:
    rows = torch.ones(2, 4)
    static, dynamic = STANDARD["tensor_static_fn"], STANDARD["token_fn"]
    with pytest.raises(
        ValueError, match=r"^scale is None with static=True; a static codec needs one, a dynamic one no"
    ):
        quantise(rows, static)
    with pytest.raises(ValueError, match=r"^scale is 1.0 with static=False; a static codec needs one, a dynamic one"):
        quantise(rows, dynamic, scale=1.0)
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"^scale is .*; a static scale must be positive$"):
            quantise(rows, static, scale=bad)
    for count in (-1, 3):
        with pytest.raises(ValueError, match=rf"^num_rows is {count}; it must be from 0 to the 2 rows given$"):
            quantise(rows, dynamic, num_rows=count)
    with pytest.raises(ValueError, match=r"^payload rule APPROXIMATE_RECIPROCAL has no single result; judge it by its"):
        quantisation_oracle.quantise(rows, STANDARD["token_hip_fn"])
    with pytest.raises(ValueError, match=r"^maximum is 250.0, which is no value of float8_e4m3fn$"):
        quantisation_oracle.quantise(rows, replace(dynamic, maximum=250.0))


@pytest.mark.parametrize("payload", [E4M3FN, E4M3FNUZ, E5M2, E5M2FNUZ, E2M1])
def test_the_oracle_knows_every_value(payload: object) -> None:
    found = next(form for form in FORMATS.values() if form is payload)
    table = quantisation_oracle.magnitudes(found.name)
    codes = torch.arange(found.max_code + 1)
    assert decode(codes, found).tolist() == [float(value) for value in table]
    assert encode(torch.tensor([float(v) for v in table], dtype=torch.float64), found).tolist() == codes.tolist()
