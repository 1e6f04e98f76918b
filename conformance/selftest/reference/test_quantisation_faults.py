"""Wrong quantisers, each with one defect that a real one has had, are rejected; the right one beside them is not.

Scope: which of accepted_scales, accepted_values and half_step (reference/quantisation.py) sees which defect. A fault
is the specification itself with the codec or the rows changed, judged by the codec that was declared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from reference.codecs import STANDARD, Codec, ScaleRule, ZeroScale
from reference.formats import Ties
from reference.quantisation import (
    Quantised,
    accepted_scales,
    accepted_values,
    dequantise,
    half_step,
    quantise,
    undefined,
)
from reference.rounding import decode, encode
from reference.scales import amax, expand, scales_of

Wrong = Callable[[torch.Tensor, Codec], Quantised]


def _as(**changes: object) -> Wrong:
    """Quantises by a codec with these fields changed."""
    return lambda rows, codec: quantise(rows, replace(codec, **changes))  # type: ignore[arg-type]


def _with_scales(rows: torch.Tensor, codec: Codec, scales: torch.Tensor, *, clamp: bool = True) -> Quantised:
    """Codes of ``rows`` at other scales."""
    quotient = torch.nan_to_num(rows.double() / expand(scales, codec, *rows.shape), nan=0.0)
    limit = codec.maximum if clamp else codec.payload.max
    return Quantised(encode(quotient.float().double().clamp(-limit, limit), codec.payload), scales)


def _ocp_maximum(rows: torch.Tensor, codec: Codec) -> Quantised:
    """Scales made for 448 under codes that end at 240."""
    return _with_scales(rows, codec, (amax(rows, codec) / 448).float().double())


def _from_rows(change: Callable[[torch.Tensor], torch.Tensor]) -> Wrong:
    """Takes the scales of other rows."""
    return lambda rows, codec: _with_scales(rows, codec, scales_of(amax(change(rows), codec), codec))


def _scaled(factor: float) -> Wrong:
    """Scales wrong by a factor."""
    return lambda rows, codec: _with_scales(rows, codec, scales_of(amax(rows, codec), codec) * factor)


def _by_logarithm(rows: torch.Tensor, codec: Codec) -> Quantised:
    """A power of two by the float32 logarithm."""
    scale = (amax(rows, codec) / codec.maximum).float().clamp(min=codec.amax_floor / codec.maximum)
    return _with_scales(rows, codec, torch.exp2(torch.ceil(torch.log2(scale))).double())


def _zero_over_zero(rows: torch.Tensor, codec: Codec) -> Quantised:
    """A scale of 0, and what 0 / 0 gives."""
    got = quantise(rows, replace(codec, zero_scale=ZeroScale.FORMULA))
    nan = expand(got.scales, codec, *rows.shape) == 0
    assert codec.payload.nan_code is not None
    return Quantised(torch.where(nan, codec.payload.nan_code, got.codes), got.scales)


def _without_tail(rows: torch.Tensor) -> torch.Tensor:
    cut = rows.clone()
    cut[:, rows.shape[1] // 32 * 32 :] = 0
    return cut


def _halved(rows: torch.Tensor, codec: Codec) -> Quantised:
    """FNUZ codes written with the OCP exponent bias."""
    got = quantise(rows, codec)
    return Quantised(encode(decode(got.codes, codec.payload) / 2, codec.payload), got.scales)


@dataclass(frozen=True)
class Fault:
    codec: str
    wrong: Wrong
    #: Seen by the scales, by the values at the fault's own scales, by the error of what comes back.
    seen: tuple[bool, bool, bool]


FAULTS = {
    "maximum of OCP under FNUZ codes": Fault("token_fnuz", _ocp_maximum, (True, False, False)),
    "240 for 224": Fault("token_fnuz224", _as(maximum=240.0), (True, True, False)),
    "224 for 240": Fault("token_fnuz", _as(maximum=224.0), (True, False, False)),
    "no floor of the scale": Fault("token_floor_fn", _as(scale_floor=0.0), (True, False, False)),
    "no floor of the magnitude": Fault("group128_fn", _as(amax_floor=0.0), (True, False, False)),
    "reciprocal for quotient": Fault("token_fn", _as(scale_rule=ScaleRule.RECIPROCAL), (True, False, False)),
    "ties away": Fault("mxfp4_up", _as(ties=Ties.AWAY), (False, True, False)),
    "ties away in FP8": Fault("token_fn", _as(ties=Ties.AWAY), (False, True, False)),
    "truncation": Fault("token_fn", _as(ties=Ties.TRUNCATE), (False, True, True)),
    "Even for Up": Fault("mxfp4_up", _as(scale_rule=ScaleRule.EVEN), (True, False, False)),
    "Up for Even": Fault("mxfp4_even", _as(scale_rule=ScaleRule.UP), (True, False, False)),
    "Down for Up": Fault("mxfp8_fn_up", _as(scale_rule=ScaleRule.DOWN), (True, False, False)),
    "Ceil for Up": Fault("mxfp8_fn_up", _as(scale_rule=ScaleRule.CEIL), (True, False, False)),
    "FP4's rounding constant in FP8": Fault(
        "mxfp8_fn_even", _as(scale_rule=ScaleRule.EVEN_ONE_BIT), (True, False, False)
    ),
    "exponent one too high": Fault("ue8m0_fn", _scaled(2.0), (True, False, False)),
    "exponent one too low": Fault("ue8m0_fn", _scaled(0.5), (True, False, False)),
    "power of two by logarithm": Fault("ue8m0_fn", _by_logarithm, (True, False, False)),
    "groups shifted by a column": Fault("mxfp4_up", _from_rows(lambda rows: rows.roll(1, 1)), (True, False, False)),
    "tail left out": Fault("mxfp4_up", _from_rows(_without_tail), (True, False, False)),
    "scale of the row above": Fault("token_fn", _from_rows(lambda rows: rows.roll(1, 0)), (True, False, False)),
    "magnitudes of two rows": Fault(
        "token_fn", _from_rows(lambda rows: torch.maximum(rows.abs(), rows.roll(1, 0).abs())), (True, False, False)
    ),
    "0 / 0": Fault("token_fn", _zero_over_zero, (True, True, True)),
    "half of every value": Fault("token_fnuz", _halved, (False, True, True)),
    "scales are right, of other codes": Fault(
        "group128_fn",
        lambda rows, codec: Quantised(quantise(rows.roll(1, 1), codec).codes, quantise(rows, codec).scales),
        (False, True, True),
    ),
}


def _rows() -> torch.Tensor:
    """Rows that differ in size by row and by column, with zeros, tiny ones, powers of two and midpoints, [40, 150]."""
    rows = torch.randn(24, 150, generator=torch.Generator().manual_seed(6))
    rows = rows * torch.exp2(torch.arange(24).float() % 11 - 5).unsqueeze(1) * torch.exp2(torch.arange(150) // 32 * 3.0)
    rows[3], rows[4], rows[5, :64] = 0, 2.0**-60, 0
    scaled = 448 * torch.exp2(torch.arange(-6, 7).float())
    beside = torch.nextafter(scaled, torch.tensor(torch.inf))
    powers = torch.where(torch.arange(150) % 37 == 5, beside.unsqueeze(1), 1.0)
    midpoints = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 17.0, 448.0]).repeat(15)
    return torch.cat([rows, powers, midpoints.repeat(3, 1)])


def _rejected(rows: torch.Tensor, codec: Codec, got: Quantised) -> tuple[bool, bool, bool]:
    values = decode(got.codes, codec.payload)
    error = (dequantise(got, codec) - rows.double()).abs()
    within = (error <= half_step(rows, got.scales, codec)) | undefined(rows, codec)
    return (
        bool((accepted_scales(rows, codec).error_over_bound(got.scales) > 1).any()),
        bool((accepted_values(rows, got.scales, codec).error_over_bound(values) > 1).any()),
        not bool(within.all()),
    )


@pytest.mark.parametrize("name", FAULTS)
def test_a_defect_is_seen(name: str) -> None:
    fault, rows = FAULTS[name], _rows()
    codec = STANDARD[fault.codec]
    assert _rejected(rows, codec, quantise(rows, codec)) == (False, False, False)
    assert _rejected(rows, codec, fault.wrong(rows, codec)) == fault.seen
