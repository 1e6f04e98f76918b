"""E4M3FN checkpoints as E4M3FNUZ: every byte, and scales over all of float32's exponents, as exact fractions.

Scope: reference/conversion.py, by the values that definitions.py gives both formats. A pass proves nothing about a
loader.
"""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from conformance.selftest.reference.definitions import DEFINITIONS
from reference.conversion import codes_to_fnuz, doubled, weight_to_fnuz

EVERY = torch.arange(256, dtype=torch.uint8)
FN, FNUZ = (DEFINITIONS[name].values.tolist() for name in ("float8_e4m3fn", "float8_e4m3fnuz"))
NANS = (0x7F, 0xFF)


def test_every_byte_keeps_its_value_under_the_doubled_scale() -> None:
    converted = codes_to_fnuz(EVERY).tolist()
    for scale in (1.0, 2.0**-149, 2.0**-126, 0.1, 3e-5, 448.0):
        twice = doubled(torch.tensor([scale])).double().item()
        exact = torch.tensor([scale]).double().item()
        for code in set(range(256)) - set(NANS):
            assert Fraction(FNUZ[converted[code]]) * Fraction(twice) == Fraction(FN[code]) * Fraction(exact), hex(code)


def test_bytes_change_only_where_the_formats_disagree() -> None:
    changed = {code: new for code, new in enumerate(codes_to_fnuz(EVERY).tolist()) if code != new}
    assert changed == {0x80: 0x00, 0x7F: 0x80, 0xFF: 0x80}


def test_nans_stay_nans_and_are_counted() -> None:
    weight = weight_to_fnuz(EVERY, torch.ones(1))
    assert weight.nans == len(NANS)
    for code in NANS:
        assert math.isnan(FN[code])
        assert math.isnan(FNUZ[int(weight.codes[code])])
    assert weight_to_fnuz(EVERY[:0x7F], torch.ones(1)).nans == 0
    assert weight_to_fnuz(EVERY[0x80:0xFF], torch.ones(1)).nans == 0, "minus zero is no NaN"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_double_exactly(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    scale = torch.tensor([0.0, info.tiny * info.eps, info.tiny, 1.0, 1.5, info.max / 2, math.inf], dtype=dtype)
    assert doubled(scale).dtype == dtype
    assert doubled(scale).double().tolist() == [2 * value for value in scale.double().tolist()]
    with pytest.raises(ValueError, match=rf"^scale .* doubles beyond {dtype}; give it in a wider type$"):
        doubled(torch.tensor([1.0, -info.max], dtype=dtype))
    assert doubled(torch.empty(0, 4, dtype=dtype)).shape == (0, 4)


def test_nothing_is_written_in_place() -> None:
    codes, scale, input_scale = EVERY.reshape(16, 16).clone(), torch.rand(16, 1), torch.ones(1)
    before = codes.clone(), scale.clone(), input_scale.clone()
    weight = weight_to_fnuz(codes, scale, input_scale)
    assert all(torch.equal(now, then) for now, then in zip((codes, scale, input_scale), before, strict=True))
    assert weight.codes.shape == (16, 16)
    assert torch.equal(weight.scale, scale + scale)
    assert weight.input_scale is not None
    assert weight.input_scale.item() == 2
    assert weight_to_fnuz(codes, scale).input_scale is None


def test_other_types_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^codes are torch.float8_e4m3fn; give the uint8 view of float8_e4m3fn$"):
        codes_to_fnuz(EVERY.view(torch.float8_e4m3fn))
    with pytest.raises(ValueError, match=r"^scale is torch.uint8; give the floating type of the checkpoint$"):
        weight_to_fnuz(EVERY, EVERY)
