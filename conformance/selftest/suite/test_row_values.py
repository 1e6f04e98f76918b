"""Rows made from patterns: what the element type holds, each row by itself, the same everywhere, worth judging.

Scope: conformance/row_values.py against torch's casts and reference/rounding.py. A pass does not prove that the rows
find anything; the seeded faults do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import msgspec
import numpy as np
import pytest
import torch

from accelerated.operators import Family
from conformance.row_cases import BIASES, KINDS, LOGIT_KINDS, NONFINITE, Call, Kind, Pattern, RowCaseError
from conformance.row_values import (
    DISTINCT,
    NORM_TOP,
    Array,
    Shape,
    bias_of,
    poison,
    round_values,
    row_of,
    rows_of,
    shape_of,
)
from conformance.row_values import weight_of as weights
from conformance.selftest.suite.row_cells import NORMAL, contract_of, row_cell
from reference.codecs import STANDARD, Codec
from reference.formats import E2M1, E4M3FN, E4M3FNUZ, FORMATS, Format, Overflow, Ties
from reference.quantisation import quantise
from reference.rounding import decode, encode, round_to_format

DTYPES = ("bfloat16", "float16", "float32")
#: blake2b of rows 2 to 4 of two ranks: a change of numpy or of this module that alters draws must be noticed.
DIGESTS: dict[Kind, str] = {
    "zero": "295c6a5beca2",
    "one_hot": "8ee1a3ec970e",
    "ones": "b4e2d3a9256c",
    "integers": "112a34abe368",
    "normal": "95b24e79b828",
    "row_scaled": "7b7a3ee74fd1",
    "block_scaled": "f73e17b115f4",
    "zero_group": "5937908b132a",
    "powers": "cf15dddb0601",
    "ties": "68ad6704ffb6",
    "wide": "aad2692425ae",
    "huge": "c2be1732740a",
    "subnormal": "91a7eb837d5e",
    "nan": "3837c0e5fe64",
    "infinity": "71ce61bb9f1e",
    "every_code": "eb996084bba3",
    "masked": "2bfcf991b5af",
    "few_left": "a70e0710f094",
    "all_masked": "e8a9ac999b0f",
    "all_nan": "ab0db81a5e57",
}


def shape(dtype: str = "bfloat16", operator: str = "group128_fn", hidden: int = 256) -> Shape:
    cell = row_cell(operator, dtype=dtype, hidden=hidden)
    return shape_of(cell, contract_of(cell))


def held_by(values: Array, dtype: str) -> Array:
    """Values after a trip through torch's element type."""
    back: Array = torch.from_numpy(values).to(getattr(torch, dtype)).float().numpy()
    return back


def same(left: Array, right: Array) -> bool:
    return left.shape == right.shape and left.tobytes() == right.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operator", ["token_fnuz", "mxfp4_even", "fused", "rms_norm_add_token"])
def test_every_row_is_held_exactly(operator: str, dtype: str) -> None:
    what = shape(dtype, operator, 200)
    for kind in KINDS:
        for exponent in (0, 20, -12, 100, -100):
            for index, rank in ((0, 0), (3, 1)):
                row = row_of(Pattern(kind, exponent, position=5, seed=9), index, what, rank)
                assert row.shape == (200,)
                assert row.dtype == np.float32
                nan = np.isnan(row)
                assert same(held_by(row, dtype)[~nan], row[~nan]), kind
                assert np.isfinite(row).all() or kind in (*NONFINITE, *LOGIT_KINDS), kind


@pytest.mark.parametrize("kind", NONFINITE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_exactly_one_element_is_not_finite(kind: Kind, dtype: str) -> None:
    for position in (0, 1, 255, 256 + 7):
        row = row_of(Pattern(kind, exponent=-12, position=position), 2, shape(dtype), 0)
        (found,) = np.flatnonzero(~np.isfinite(row))
        assert found == position % 256
        assert np.isnan(row[found]) == (kind == "nan")
        assert kind == "nan" or np.sign(row[found]) == (-1 if position % 2 else 1)


def patterns_of_bits() -> Array:
    """Float32 values around every bfloat16 and float16: each bit pattern of the upper half, with five lower halves."""
    high = np.arange(1 << 16, dtype=np.uint32) << 16
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001], dtype=np.uint32)
    values: Array = (high[:, None] | low).reshape(-1).view(np.float32)
    return values[np.isfinite(values)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_is_torchs_and_the_references(dtype: str) -> None:
    values = patterns_of_bits()
    # Around float16's own midpoints, too.
    codes = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middles = np.concatenate([(codes[:-1] + codes[1:]) / 2, codes])
    values = np.concatenate([values, middles, np.nextafter(middles, np.float32(np.inf), dtype=np.float32)])
    rounded = round_values(values, dtype)
    assert same(rounded, held_by(values, dtype))
    reference = round_to_format(torch.from_numpy(values), FORMATS[dtype], overflow=Overflow.IEEE)
    assert same(rounded, reference.float().numpy())
    assert same(round_values(values, "float32"), values)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_its_own(kind: Kind) -> None:
    """It does not depend on how many rows there are, nor on the patterns of other rows."""
    cell, what = row_cell(capacity=64), shape()
    palette = (NORMAL, Pattern(kind, 1, 2, 3))
    few, many = (rows_of(Call(m, palette), cell, what, 0) for m in (4, 33))
    assert same(few, many[:4])
    assert same(many[5], row_of(palette[1], 5, what, 0))
    other = rows_of(Call(8, (Pattern("zero"), palette[1])), cell, what, 0)
    assert same(other[1::2], many[1:8:2])


def test_rows_repeat_after_many() -> None:
    cell = row_cell(capacity=5000, hidden=32)
    rows = rows_of(Call(5000, (Pattern("ones"),)), cell, shape(hidden=32), 0)
    assert rows.shape == (DISTINCT, 32)


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("zero", "ties", "every_code", *LOGIT_KINDS)])
def test_ranks_differ(kind: Kind) -> None:
    rows = [row_of(Pattern(kind, seed=4), 1, shape(), rank).tobytes() for rank in range(8)]
    assert len(set(rows)) == 8


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("zero", "ones", "all_masked", "all_nan")])
def test_rows_and_seeds_differ(kind: Kind) -> None:
    rows = [row_of(Pattern(kind, seed=4), index, shape(), 0).tobytes() for index in range(3)]
    assert len(set(rows)) == 3
    seeded = kind not in ("one_hot", "every_code", "few_left")
    assert (rows[0] != row_of(Pattern(kind, seed=5), 0, shape(), 0).tobytes()) == seeded


def test_the_residual_is_no_ranks_rows() -> None:
    cell = row_cell("fused")
    call = Call(3, (NORMAL,), residual=(NORMAL,))
    residual = rows_of(call, cell, shape(), 0, residual=True)
    assert not any(same(residual, rows_of(call, cell, shape(), rank)) for rank in range(8))


TIED = {E2M1: ("mxfp4_up",), E4M3FN: ("token_fn", "group128_fn"), E4M3FNUZ: ("token_fnuz224", "token_fnuz")}


@pytest.mark.parametrize("payload", TIED, ids=lambda f: f.name)
@pytest.mark.parametrize("hidden", [128, 200])
def test_ties_are_midpoints(payload: Format, hidden: int) -> None:
    """In every group the scale is 1, and each element but one lies halfway between two codes."""
    for name in TIED[payload]:
        codec, what = STANDARD[name], shape("bfloat16", name, hidden)
        row = torch.from_numpy(row_of(Pattern("ties", position=3), 1, what, 0)).double()
        scales = quantise(row[None], codec).scales[0]
        assert torch.equal(scales, torch.ones_like(scales)), "the largest of each group is mapped to itself"
        lone = (row == codec.maximum).sum()
        assert lone == codec.groups(hidden)
        others = row[row != codec.maximum].abs()
        down, away = (decode(encode(others, payload, ties=t), payload) for t in (Ties.TRUNCATE, Ties.AWAY))
        assert torch.equal((down + away) / 2, others)
        assert others.unique().numel() >= min(len(what.midpoints), others.numel()) - 1


def test_all_midpoints_below_the_maximum_are_known() -> None:
    for name, count in (("mxfp4_up", 7), ("token_fn", 126), ("token_fnuz", 127), ("token_fnuz224", 126)):
        found = shape("bfloat16", name).midpoints
        assert len(set(found)) == count, name
        assert max(found) < STANDARD[name].maximum


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_rows_of_every_code_hold_every_code(dtype: str) -> None:
    of, what = FORMATS[dtype], shape(dtype, "tensor_static_fn")
    rows = np.stack([row_of(Pattern("every_code"), index, what, 0) for index in range(256)])
    seen = encode(torch.from_numpy(rows.reshape(-1)), of).unique()
    finite = [c for c in range(1 << 16) if (c & 0x7FFF) <= of.max_code]
    assert seen.tolist() == finite


@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormal_and_huge_are_what_they_say(dtype: str) -> None:
    least_normal = 2.0 ** FORMATS[dtype].min_exponent
    row = row_of(Pattern("subnormal", seed=1), 0, shape(dtype), 0)
    assert 0 < np.abs(row).max() < least_normal
    largest = FORMATS[dtype].max
    assert np.abs(row_of(Pattern("huge", seed=1), 0, shape(dtype), 0)).max() > largest / 2
    norm = np.abs(row_of(Pattern("huge", seed=1), 0, shape(dtype, "fused"), 0)).max()
    assert min(2.0**NORM_TOP, largest) / 2 < norm <= min(2.0 ** (NORM_TOP + 1), largest)


def test_scaled_and_zero_groups_lie_where_the_scales_do() -> None:
    what = shape(hidden=300)
    row = row_of(Pattern("zero_group", position=5, seed=1), 0, what, 0)
    assert [bool(part.any()) for part in (row[:128], row[128:256], row[256:])] == [True, True, False]
    scaled = row_of(Pattern("block_scaled", seed=1), 0, what, 0)
    levels = [np.log2(np.abs(part).max()) for part in (scaled[:128], scaled[128:256], scaled[256:])]
    assert np.abs(np.diff(levels)).min() > 4
    over_rows = [np.log2(np.abs(row_of(Pattern("row_scaled", seed=1), i, what, 0)).max()) for i in range(25)]
    assert np.ptp(over_rows) > 20


def test_an_exponent_is_a_power_of_two() -> None:
    for kind in ("normal", "integers", "ties", "powers"):
        plain, scaled = (row_of(Pattern(kind, e, 3, 4), 1, shape(), 0) for e in (0, 7))
        assert same(np.ldexp(plain, 7), scaled)


def test_poison_lies_beyond_the_count() -> None:
    rows = np.ones((5, 8), dtype=np.float32)
    poison(Call(5, (NORMAL,), num_rows=2), rows)
    assert (rows[:2] == 1).all()
    assert np.isnan(rows[2::2]).all()
    assert (rows[3] == np.float32(1e30)).all()
    untouched = torch.ones(5, 8)
    poison(Call(5, (NORMAL,)), untouched)
    assert bool((untouched == 1).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights(dtype: str) -> None:
    cell = row_cell("rms_norm", dtype=dtype)
    made: Callable[[str], Array] = lambda kind: weights(  # noqa: E731
        msgspec.structs.replace(Call(1, (NORMAL,)), weight=kind), cell
    )
    assert (made("ones") == 1).all()
    assert (made("twos") == 2).all()
    drawn = made("normal")
    assert same(drawn, held_by(drawn, dtype))
    assert np.unique(drawn).size > 50


@pytest.mark.parametrize("dtype", DTYPES)
def test_biases(dtype: str) -> None:
    cell = row_cell("route.grouped_g8t4k8")
    zeros, small, large, negative = (
        bias_of(msgspec.structs.replace(Call(1, (NORMAL,)), weight=kind), cell, dtype) for kind in BIASES
    )
    for made in (zeros, small, large, negative):
        assert same(made, held_by(made, dtype))
    assert not zeros.any()
    assert 0 < np.abs(small).max() < 0.5, "a fraction of a score"
    assert np.abs(large).max() > 64
    assert negative.max() <= -1, "no score lifts a choice above zero"
    assert not same(small, bias_of(Call(1, (NORMAL, NORMAL), weight="small"), cell, dtype))
    with pytest.raises(RowCaseError, match="weight is 'twos' for a router with a bias; give one of zeros"):
        bias_of(Call(1, (NORMAL,), weight="twos"), cell, dtype)


def test_logits_leave_some_or_none_to_choose() -> None:
    what = shape_of(row_cell("route.grouped_g8t4k8"), contract_of(row_cell("route.grouped_g8t4k8")))
    assert what.group == 32, "what lies by group lies by group of experts"
    finite = {k: int(np.isfinite(row_of(Pattern(k, 3, 1), 2, what, 0)).sum()) for k in LOGIT_KINDS}
    assert finite == {"masked": 128, "few_left": 1, "all_masked": 0, "all_nan": 0}
    assert np.isnan(row_of(Pattern("all_nan"), 0, what, 0)).all()
    assert (row_of(Pattern("all_masked"), 0, what, 0) == -np.inf).all()
    tied = row_of(Pattern("ties"), 0, what, 0)
    assert np.unique(tied).size <= 2 * 7 + 1, "most logits are equal to others"


def test_a_norm_with_a_quantiser_gets_its_ties() -> None:
    cell = row_cell("fused_group128")
    assert cell.family is Family.ALLREDUCE_NORM
    assert shape_of(cell, contract_of(cell)).group == 128
    codec: Codec = STANDARD["group128_fnuz"]
    assert shape_of(cell, contract_of(cell)).maximum == codec.maximum


def digest(kind: Kind) -> str:
    rows = [row_of(Pattern(kind, 1, 2, 3), index, shape(), rank) for index in (2, 3, 4) for rank in (0, 1)]
    return hashlib.blake2b(np.nan_to_num(np.stack(rows), nan=-7.0).tobytes(), digest_size=6).hexdigest()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_the_same_everywhere(kind: Kind) -> None:
    assert digest(kind) == DIGESTS[kind], f"{kind} rows changed: recorded cases mean other inputs now"
