"""The judge of quantised rows: correct results pass, each corruption is named by its check and placed.

Scope: the quantiser's half of conformance/rank/judge_rows.py on tensors built here. A pass proves nothing about how the
tensors came to be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from accelerated.operators import QuantContract, QuantResult
from conformance.engine.protocol import Mismatch
from conformance.rank import judge_rows
from conformance.rank.judge_rows import Answered, judge_call
from conformance.selftest.rank.row_answers import NAN_ROW, ZERO_ROW, change_code, codes_of, quantised, some_rows
from reference import quantisation
from reference.codecs import STANDARD, Codec, PayloadRule, ScaleFormat, ScaleLayout
from reference.formats import E2M1
from reference.intervals import Interval
from reference.layouts import unpack_e2m1

#: One codec of every granularity, scale format, payload and payload rule.
VARIED = (
    *("tensor_static_fnuz", "tensor_fn", "token_fn", "token_floor_fnuz224", "token_hip_fnuz", "group128_fn"),
    *("group128_reciprocal_fnuz", "block128_fn", "ue8m0_fn", "mxfp4_even", "mxfp8_fn_down"),
)
ROWS = 6


def call(name: str, rows: torch.Tensor | None = None, num_rows: int = -1) -> tuple[Answered, QuantContract]:
    contract = QuantContract(STANDARD[name])
    return quantised(some_rows(ROWS) if rows is None else rows, contract, num_rows=num_rows), contract


def judged(answered: Answered, contract: QuantContract, check: str) -> Mismatch:
    mismatch, _ = judge_call(5, answered, contract)
    assert mismatch is not None, "the corruption passed"
    assert mismatch.check == check, mismatch.text()
    assert mismatch.round == 5
    return mismatch


def codes(answered: Answered, codec: Codec) -> torch.Tensor:
    found = codes_of(answered).codes
    return unpack_e2m1(found) if codec.payload is E2M1 else found.long()


def ordinary(answered: Answered, codec: Codec, row: int) -> int:
    """An element of the row whose code has neighbours on both sides."""
    magnitude = codes(answered, codec)[row] & (codec.payload.sign_bit - 1)
    return int(((magnitude > codec.payload.max_code // 3) & (magnitude < codec.payload.max_code - 2)).nonzero()[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", STANDARD)
def test_the_specification_passes(name: str, dtype: torch.dtype) -> None:
    for rows in (some_rows(ROWS, 256, dtype), some_rows(1, 200, dtype), some_rows(0, 256, dtype)):
        answered, contract = call(name, rows)
        mismatch, ratio = judge_call(0, answered, contract)
        assert mismatch is None, mismatch.text()
        assert ratio <= 1
        assert ratio == 0 or contract.codec.payload_rule is PayloadRule.APPROXIMATE_RECIPROCAL


@pytest.mark.parametrize("name", VARIED)
@pytest.mark.parametrize("row", [1, ROWS - 1], ids=["second", "last"])
@pytest.mark.parametrize("by", [1, -1])
def test_one_code_off_by_one(name: str, row: int, by: int) -> None:
    answered, contract = call(name)
    element = ordinary(answered, contract.codec, row)
    change_code(codes_of(answered), contract.codec, row, element, by)
    mismatch = judged(answered, contract, "quantise.codes")
    assert (mismatch.token, mismatch.element) == (row, element)
    assert mismatch.got != mismatch.wanted


@pytest.mark.parametrize("name", [name for name in VARIED if "mxfp4" not in name])
def test_a_nan_code(name: str) -> None:
    answered, contract = call(name)
    assert contract.codec.payload.nan_code is not None
    codes_of(answered).codes[2, 100] = contract.codec.payload.nan_code
    mismatch = judged(answered, contract, "quantise.codes")
    assert (mismatch.token, mismatch.element, mismatch.got) == (2, 100, "nan")


@pytest.mark.parametrize("name", ["group128_fn", "token_hip_fn", "token_triton_fnuz"])
def test_a_nan_code_in_a_group_of_zeros(name: str) -> None:
    """Garbage codes of a zero scale are still finite: 0 times NaN is not zero."""
    answered, contract = call(name)
    codes_of(answered).codes[ZERO_ROW, 9] = contract.codec.payload.nan_code or 0
    mismatch = judged(answered, contract, "quantise.codes")
    assert (mismatch.token, mismatch.element) == (ZERO_ROW, 9)


@pytest.mark.parametrize("name", VARIED)
def test_a_scale_off_by_one_unit(name: str) -> None:
    for by in (1, -1):
        answered, contract = call(name)
        result = codes_of(answered)
        row = min(4, result.scales.shape[0] - 1)
        place = (row, result.scales.shape[1] - 1) if result.scales.dim() == 2 else (row,)
        whole = result.scales if contract.codec.scale_format is ScaleFormat.E8M0 else result.scales.view(torch.int32)
        whole[place] += by
        mismatch = judged(answered, contract, "quantise.scales")
        assert (mismatch.token, mismatch.element) == (place if len(place) == 2 else (0, 0))


@pytest.mark.parametrize("name", ["token_fn", "mxfp8_fn_up", "tensor_static_fn"])
def test_a_scale_that_is_no_number(name: str) -> None:
    answered, contract = call(name)
    scales = codes_of(answered).scales
    scales.view(-1)[0] = 255 if contract.codec.scale_format is ScaleFormat.E8M0 else torch.nan
    assert judged(answered, contract, "quantise.scales").got == "nan"


def test_swapped_nibbles() -> None:
    answered, contract = call("mxfp4_even")
    result = codes_of(answered)
    result.codes = (result.codes << 4) | (result.codes >> 4)
    judged(answered, contract, "quantise.codes")


def columns_first(scales: torch.Tensor) -> torch.Tensor:
    return scales.T.contiguous().T


LAYOUTS: list[tuple[str, Callable[[QuantResult], None], str]] = [
    ("group128_fn", lambda r: setattr(r, "scales", columns_first(r.scales)), "strides (1, 6)"),
    ("mxfp4_up", lambda r: setattr(r, "scales", columns_first(r.scales)), "strides (1, 6)"),
    ("group128_fn", lambda r: setattr(r, "scales", r.scales.T.contiguous()), "shape (2, 6)"),
    ("token_fn", lambda r: setattr(r, "scales", r.scales.flatten()), "shape (6,)"),
    ("token_fn", lambda r: setattr(r, "scales", r.scales.double()), "torch.float64"),
    ("mxfp4_up", lambda r: setattr(r, "scales", r.scales.float()), "torch.float32"),
    ("token_fn", lambda r: setattr(r, "codes", r.codes.view(torch.int8)), "torch.int8"),
    ("token_fn", lambda r: setattr(r, "codes", r.codes[:-1]), "[5, 256]"),
    ("mxfp4_up", lambda r: setattr(r, "codes", unpack_e2m1(r.codes).to(torch.uint8)), "[6, 256]"),
    ("block128_fn", lambda r: setattr(r, "scales", r.scales.repeat(6, 1)), "shape (6, 2)"),
]


@pytest.mark.parametrize(("name", "corrupt", "told"), LAYOUTS)
def test_a_layout_that_is_not_the_contracts(name: str, corrupt: Callable[[QuantResult], None], told: str) -> None:
    answered, contract = call(name)
    corrupt(codes_of(answered))
    assert told in judged(answered, contract, "quantise.layout").text()


@pytest.mark.parametrize("layout", ScaleLayout, ids=lambda layout: layout.name)
def test_every_layout_is_read(layout: ScaleLayout) -> None:
    """As declared it passes; read as any other one it fails, by its shape, its stride or its values."""
    codec = replace(STANDARD["group128_fn"], scale_layout=layout)
    answered = quantised(some_rows(33, 384), QuantContract(codec))
    assert judge_call(0, answered, QuantContract(codec))[0] is None
    for other in ScaleLayout:
        if other is not layout:
            mismatch, _ = judge_call(0, answered, QuantContract(replace(codec, scale_layout=other)))
            assert mismatch is not None, other
            assert mismatch.check in ("quantise.layout", "quantise.scales")


def test_square_scales_transposed() -> None:
    """Two rows of two groups: neither shape nor stride tells."""
    answered, contract = call("group128_fn", some_rows(2))
    result = codes_of(answered)
    result.scales = result.scales.T.contiguous()
    mismatch = judged(answered, contract, "quantise.scales")
    assert {mismatch.token, mismatch.element} == {0, 1}


@pytest.mark.parametrize("name", ["token_fn", "group128_fnuz", "mxfp4_even"])
def test_rows_beyond_the_count_are_nobodys_business(name: str) -> None:
    rows = some_rows(ROWS)
    for row, wrong in ((3, True), (4, False), (5, False)):
        answered, contract = call(name, rows, num_rows=4)
        if row == 3:
            element = 17
            codes_of(answered).codes[row, element] ^= 0x11
        else:
            codes_of(answered).codes[row], codes_of(answered).scales[row] = 0x7F, 1
        mismatch, _ = judge_call(0, answered, contract)
        assert (mismatch is not None) == wrong
    nothing, contract = call(name, rows, num_rows=0)
    codes_of(nothing).codes.fill_(0x7F)
    assert judge_call(0, nothing, contract)[0] is None


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["token_fn", "group128_fnuz", "mxfp4_even", "mxfp8_fn_up", "tensor_static_fnuz"])
def test_a_spoilt_row_is_free_and_its_neighbours_are_not(name: str, value: float) -> None:
    rows = some_rows(ROWS)
    rows[NAN_ROW, 200] = value
    answered, contract = call(name, rows)
    codes_of(answered).codes[NAN_ROW, 100 if "mxfp4" in name else 200] = 0x7F
    assert judge_call(0, answered, contract)[0] is None
    for row in (NAN_ROW - 1, NAN_ROW + 1):
        answered, contract = call(name, rows)
        codes_of(answered).codes[row, 100] ^= 0x11
        assert judged(answered, contract, "quantise.codes").token == row
    if name.startswith(("group128", "mx")):
        answered, contract = call(name, rows)
        codes_of(answered).codes[NAN_ROW, 10] ^= 0x11
        assert judged(answered, contract, "quantise.codes").token == NAN_ROW, "another group of that row"


def test_a_static_scale_is_the_one_that_was_given() -> None:
    answered, contract = call("tensor_static_fn")
    codes_of(answered).scales.fill_(0.0625 * (1 + 2.0**-23))
    judged(answered, contract, "quantise.scales")
    codes_of(answered).scales.fill_(0.0625)
    assert judge_call(0, answered, contract)[0] is None
    answered.scale = 0.125
    judged(answered, contract, "quantise.scales")


def anything(rows: torch.Tensor, scales: torch.Tensor, codec: Codec) -> Interval:
    wide = torch.full(rows.shape, codec.maximum, dtype=torch.float64)
    return Interval(torch.zeros_like(wide), -wide, wide)


@pytest.mark.parametrize("name", ["token_fn", "group128_hip_fnuz", "mxfp4_even"])
def test_the_dequantised_value_is_judged_without_the_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an acceptance that lets everything through, a wrong code is still further off than half a step."""
    monkeypatch.setattr(quantisation, "accepted_values", anything)
    answered, contract = call(name)
    assert judge_call(0, answered, contract)[0] is None
    row = ROWS - 1
    element = ordinary(answered, contract.codec, row)
    change_code(codes_of(answered), contract.codec, row, element, 2)
    mismatch = judged(answered, contract, "quantise.dequantised")
    assert (mismatch.token, mismatch.element) == (row, element)
    assert "code 0x" in mismatch.got


def test_a_group_of_zeros_comes_back_as_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantisation, "accepted_values", anything)
    monkeypatch.setattr(quantisation, "half_step", lambda rows, scales, codec: torch.full(rows.shape, 1e9).double())
    answered, contract = call("group128_fn")
    assert judge_call(0, answered, contract)[0] is None
    codes_of(answered).codes[ZERO_ROW, 130] = 1
    mismatch = judged(answered, contract, "quantise.dequantised")
    assert (mismatch.token, mismatch.element, mismatch.wanted) == (ZERO_ROW, 130, "0.0")


@pytest.mark.parametrize("name", VARIED)
@pytest.mark.parametrize("row", [0, 129])
def test_rows_are_judged_in_parts_and_placed_as_a_whole(name: str, row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_rows, "_AT_ONCE", 256 * 7)
    answered, contract = call(name, some_rows(130))
    assert judge_call(0, answered, contract)[0] is None
    element = ordinary(answered, contract.codec, row)
    change_code(codes_of(answered), contract.codec, row, element, 1)
    mismatch = judged(answered, contract, "quantise.codes")
    assert (mismatch.token, mismatch.element) == (row, element)
