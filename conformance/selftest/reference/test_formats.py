"""Every code and every 16-bit input of every format, bit for bit against definitions.py; exhaustive, in seconds.

Scope: encode, decode, round_to_format and decode_e8m0 of reference/rounding.py, the table of reference/formats.py.
Inputs are all 65,536 bfloat16 and float16 patterns, the midpoints of all neighbouring codes with the float64 and
float32 numbers next to them (a second rounding on the way would show), and the ends of float64. float32 as a target has
too many codes for a table: sampled, against fractions. A pass proves nothing about a device's casts.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cache

import pytest
import torch

from conformance.selftest.reference.definitions import DEFINITIONS, LANDMARKS, Definition, with_neighbours
from reference.formats import E2M1, E4M3FN, E4M3FNUZ, FLOAT32, FORMATS, Overflow, Ties
from reference.rounding import decode, decode_e8m0, encode, format_of, round_to_format

PATTERNS = torch.arange(65536)
NAMES = list(DEFINITIONS)
#: Ends of float64, and NaNs with either sign and with payloads.
_ENDS = torch.tensor([0, 1, 2, 2**52 - 1, 2**52, 2047 * 2**52 - 1, 2047 * 2**52])
_NANS = torch.tensor([2047 * 2**52 + 1, 4095 * 2**51, 2**63 - 1])
EXTREMES = torch.cat([_ENDS, _NANS, _ENDS - 2**63, _NANS - 2**63]).view(torch.float64)


def _every(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All patterns of a 16-bit type: the tensor, its values by definition, its sign bits."""
    tensor = (PATTERNS - 65536 * (PATTERNS >= 32768)).to(torch.int16).view(dtype)
    return tensor, DEFINITIONS[str(dtype).removeprefix("torch.")].values, PATTERNS >= 32768


@cache
def _inputs(definition: Definition) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """What is encoded, its exact value in float64 and its sign bits."""
    near = with_neighbours(definition.midpoints)
    on = with_neighbours(definition.steps)
    single = with_neighbours(definition.midpoints[definition.midpoints <= torch.finfo(torch.float32).max].float())
    inputs = {"bfloat16": _every(torch.bfloat16), "float16": _every(torch.float16)}
    for name, tensor in {"midpoints": near, "codes": on, "midpoints, float32": single, "extremes": EXTREMES}.items():
        inputs[name] = tensor, tensor.double(), tensor.signbit()
    return inputs


def _same(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Equal with the sign of zeros; NaN equals NaN."""
    nan = got.isnan() & want.isnan()
    return bool((nan | (got == want) & (got.signbit() == want.signbit())).all())


@pytest.mark.parametrize("name", NAMES)
def test_definitions_have_the_printed_landmarks(name: str) -> None:
    definition, (largest, normal) = DEFINITIONS[name], LANDMARKS[name]
    assert definition.steps[-2] == largest
    assert definition.magnitude(2**definition.mantissa) == normal
    assert definition.sign == 2 ** (definition.exponent + definition.mantissa)
    assert int(definition.values.isnan().sum()) == len(definition.nan_codes)
    assert definition.values.isinf().sum() == (2 if definition.infinity is not None else 0)


def test_the_expectation_on_values_anyone_can_check() -> None:
    value = torch.tensor([0.25, 0.75, 2.5, 5.0, 7.0, 6.99, -0.25, -1.75], dtype=torch.float64)
    e2m1 = DEFINITIONS["float4_e2m1fn"]
    assert e2m1.codes(value, value < 0, Ties.EVEN, True).tolist() == [0, 2, 4, 6, 7, 7, 8, 12]
    assert e2m1.codes(value, value < 0, Ties.AWAY, True).tolist() == [1, 2, 5, 7, 7, 7, 9, 12]
    assert e2m1.codes(value, value < 0, Ties.TRUNCATE, True).tolist() == [0, 1, 4, 6, 7, 7, 8, 11]
    value = torch.tensor([448.0, 464.0, 464.5, math.inf, -(2.0**-10), -0.0], dtype=torch.float64)
    e4m3 = DEFINITIONS["float8_e4m3fn"]
    assert e4m3.codes(value, value.signbit(), Ties.EVEN, True).tolist() == [0x7E, 0x7E, 0x7E, 0x7E, 0x80, 0x80]
    assert e4m3.codes(value, value.signbit(), Ties.EVEN, False).tolist() == [0x7E, 0x7E, 0x7F, 0x7F, 0x80, 0x80]


@pytest.mark.parametrize("name", NAMES)
def test_the_table_of_formats(name: str) -> None:
    form, definition = FORMATS[name], DEFINITIONS[name]
    assert form.max == LANDMARKS[name][0]
    assert form.smallest == definition.smallest
    assert form.sign_bit == definition.sign
    assert 2.0**form.min_exponent == LANDMARKS[name][1]
    assert 2**form.bits == len(definition.values)


@pytest.mark.parametrize("name", NAMES)
def test_every_code_decodes(name: str) -> None:
    form, want = FORMATS[name], DEFINITIONS[name].values
    codes = torch.arange(2**form.bits)
    assert _same(decode(codes, form), want)
    assert decode(codes, form).isnan().nonzero().flatten().tolist() == sorted(DEFINITIONS[name].nan_codes)
    assert _same(decode(codes - 2**form.bits, form), want), "bits above the format's width count"
    if form.bits == 8:
        assert _same(decode(codes.to(torch.uint8), form), want)


@pytest.mark.parametrize("name", NAMES)
def test_every_code_encodes_to_itself(name: str) -> None:
    form, values = FORMATS[name], DEFINITIONS[name].values
    codes = torch.arange(2**form.bits)[~values.isnan()]
    for ties in Ties:
        if not values.isinf().any():
            assert torch.equal(encode(values[codes], form, ties=ties), codes)
        assert torch.equal(encode(values[codes], form, overflow=Overflow.IEEE, ties=ties), codes)


@pytest.mark.parametrize("ties", Ties)
@pytest.mark.parametrize("overflow", Overflow)
@pytest.mark.parametrize("name", NAMES)
def test_every_input_encodes(name: str, overflow: Overflow, ties: Ties) -> None:
    form, definition = FORMATS[name], DEFINITIONS[name]
    for kind, (tensor, value, negative) in _inputs(definition).items():
        want = definition.codes(value, negative, ties, overflow is Overflow.SATURATE)
        answered = want >= 0
        got = encode(tensor[answered], form, overflow=overflow, ties=ties)
        wrong = (got != want[answered]).nonzero().flatten()[:3].tolist()
        assert wrong == [], [(kind, value[answered][i].item(), hex(got[i]), hex(want[answered][i])) for i in wrong]
        if kind == "codes":
            rounded = round_to_format(tensor[answered], form, overflow=overflow, ties=ties)
            assert _same(rounded, definition.values[want[answered]])


def test_a_store_overflows_to_infinity_unless_told_otherwise() -> None:
    assert round_to_format(torch.tensor([-7e4, 448.0]), FORMATS["float16"]).tolist() == [-math.inf, 448.0]
    assert round_to_format(torch.tensor([465.0]), E4M3FN).isnan().all()
    assert decode(encode(torch.tensor([465.0]), E4M3FN), E4M3FN).tolist() == [448.0]


def test_what_e2m1_cannot_hold_is_refused() -> None:
    message = r"^value holds NaN, which float4_e2m1fn cannot represent; encode finite values, or saturate$"
    with pytest.raises(ValueError, match=message):
        encode(torch.tensor([1.0, math.nan]), E2M1)
    for value in (7.0, -8.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"^value holds NaN or overflow, which float4_e2m1fn cannot"):
            encode(torch.tensor([value]), E2M1, overflow=Overflow.IEEE)
    for value in (6.99, -7.99, 1e9):
        assert int(encode(torch.tensor([value]), E2M1, overflow=Overflow.IEEE, ties=Ties.TRUNCATE)) & 7 == 7
    with pytest.raises(ValueError, match=r"^value is torch.int64; encode floating tensors only$"):
        encode(torch.tensor([1]), E2M1)


def test_shapes_and_strides_do_not_matter() -> None:
    value = torch.linspace(-500, 500, 60, dtype=torch.float64).reshape(3, 4, 5)
    codes = encode(value, E4M3FN)
    assert codes.dtype == torch.int64
    assert torch.equal(encode(value.permute(2, 0, 1), E4M3FN), codes.permute(2, 0, 1))
    assert torch.equal(decode(codes.permute(2, 0, 1), E4M3FN), decode(codes, E4M3FN).permute(2, 0, 1))
    assert encode(value[0, 0, 0], E4M3FN).shape == ()
    assert encode(value[:0], E4M3FNUZ).shape == (0, 4, 5)
    assert decode(codes[:0], E4M3FNUZ).shape == (0, 4, 5)


def test_every_e8m0_code_decodes() -> None:
    codes = torch.arange(256)
    got = decode_e8m0(codes.to(torch.uint8)).tolist()
    assert [Fraction(value) for value in got[:255]] == [Fraction(2) ** (code - 127) for code in range(255)]
    assert math.isnan(got[255])
    assert _same(decode_e8m0(codes - 256), decode_e8m0(codes))


@pytest.mark.parametrize("ties", Ties)
def test_float32_by_fractions(ties: Ties) -> None:
    """float64 to float32: near midpoints of float32 in every binade, subnormals, overflow."""
    generator = torch.Generator().manual_seed(3)
    mantissa = 2**24 + torch.randint(0, 2**24, (1200,), generator=generator)
    exponent = torch.arange(1200) % 284 - 155
    middle = torch.ldexp(mantissa.double(), exponent - 24)  # 25 bits: every other one is a midpoint
    value = torch.cat([with_neighbours(middle[:600]), middle[600:], EXTREMES[~EXTREMES.isnan()]])
    got = round_to_format(value, FLOAT32, ties=ties)
    for x, y in zip(value.tolist(), got.tolist(), strict=True):
        assert math.copysign(1, x) == math.copysign(1, y), x
        if math.isinf(x):
            assert x == y
            continue
        unit = Fraction(2) ** (max(math.frexp(x)[1], -125) - 24)
        quotient = Fraction(abs(x)) / unit
        # Python rounds fractions half to even.
        steps = {Ties.EVEN: round(quotient), Ties.AWAY: math.floor(quotient + Fraction(1, 2))}.get(ties, int(quotient))
        want = min(steps * unit, Fraction(2**128 - 2**104)) if ties is Ties.TRUNCATE else steps * unit
        assert abs(y) == (math.inf if want >= 2**128 else want), x


def test_float32_codes() -> None:
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=torch.Generator().manual_seed(4)).int()
    value = bits.view(torch.float32)
    codes = bits.long() & 0xFFFFFFFF
    number = ~value.isnan()
    assert torch.equal(encode(value[number], FLOAT32, overflow=Overflow.IEEE), codes[number])
    assert (encode(value[~number], FLOAT32) == 0x7FC00000 + (codes[~number] & 0x80000000)).all()
    assert _same(decode(codes, FLOAT32), value.double())


def test_formats_of_torch_types() -> None:
    for name in FORMATS:
        if hasattr(torch, name):
            assert format_of(getattr(torch, name)) is FORMATS[name]
    with pytest.raises(ValueError, match=r"^no format is modelled for torch.float8_e8m0fnu; use one of bfloat16, "):
        format_of(torch.float8_e8m0fnu)
