"""Judging one call of a row operator against the reference, given what went in and what came back.

Scope: quantised results against the modelled codec, norms against their intervals, each stage by itself. Nothing here
talks to other ranks. What it does not decide: where bits may differ between ranks; the program compares those.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from accelerated.operators import NormContract, NormResult, QuantContract, QuantResult
from accelerated.routers import RouteContract, RouteResult
from conformance.engine.protocol import Mismatch
from conformance.rank.judge_routes import judge_route
from reference import layouts, quantisation, rms_norm
from reference.codecs import Codec, Granularity, ScaleFormat
from reference.formats import Format
from reference.intervals import Interval
from reference.rounding import decode, decode_e8m0
from reference.rounding_bias import mean_signed_error
from reference.scales import amax, expand

Judgement = tuple[Mismatch | None, float]
#: Elements judged at a time.
_AT_ONCE = 1 << 26


@dataclass
class Answered:
    """One call and its result.

    Attributes:
        terms: ``[W, M, N]`` rows of every rank, in the element type.
        residual: ``[M, N]``, or None.
        weight: ``[N]`` of a norm, or a router's bias; not looked at by others.
        epsilon: of a norm.
        scale: of a static quantiser.
        num_rows: rows that exist, or -1.
        result: what came back.
        share: rows that this rank judges; the others judge the rest, for every rank holds the same bits.
    """

    terms: torch.Tensor
    residual: torch.Tensor | None
    weight: torch.Tensor
    epsilon: float
    scale: float
    num_rows: int
    result: QuantResult | NormResult | RouteResult
    share: slice = field(default_factory=lambda: slice(None))


@dataclass
class Logical:
    """A quantised result by index: ``codes`` uint8 ``[M, N]``, ``scales`` float64."""

    codes: torch.Tensor
    scales: torch.Tensor
    payload: Format

    @property
    def values(self) -> torch.Tensor:
        """The codes decoded, float64 ``[M, N]``."""
        return decode(self.codes, self.payload)


def judge_call(index: int, answered: Answered, contract: QuantContract | NormContract | RouteContract) -> Judgement:
    """First failed check of one call, or None, and the largest error/bound."""
    if isinstance(contract, RouteContract):
        return judge_route(index, answered, contract)
    if isinstance(contract, QuantContract):
        assert isinstance(answered.result, QuantResult)
        rows = answered.terms[0]
        found = read_quantised(index, answered.result, contract.codec, *rows.shape)
        if isinstance(found, Mismatch):
            return found, 0.0
        count = rows.shape[0] if answered.num_rows < 0 else answered.num_rows
        return judge_quantised(index, rows[:count], first_rows(found, contract.codec, count), contract, answered.scale)
    assert isinstance(answered.result, NormResult)
    return judge_norm(index, answered, answered.result, contract)


# ------------------------------------------------------------------------------------------------------ quantised
def read_quantised(index: int, result: QuantResult, codec: Codec, rows: int, columns: int) -> Logical | Mismatch:
    """Codes and scales by index, or what is wrong with their shape, stride or type."""
    packed = codec.payload.bits == 4
    shape = [rows, columns // 2 if packed else columns]
    if list(result.codes.shape) != shape or result.codes.dtype != torch.uint8:
        return _malformed(index, "quantise.layout", "codes", result.codes, f"{shape} torch.uint8")
    kind = torch.uint8 if codec.scale_format is ScaleFormat.E8M0 else torch.float32
    if result.scales.dtype != kind:
        return _malformed(index, "quantise.layout", "scales", result.scales, str(kind))
    per_row = codec.groups(columns)
    scale_rows = {Granularity.TENSOR: 1, Granularity.BLOCK: -(-rows // max(codec.block_rows, 1))}
    try:
        scales = layouts.logical_scales(
            result.scales, codec.scale_layout, scale_rows.get(codec.granularity, rows), per_row
        )
    except ValueError as error:
        return Mismatch("quantise.layout", index, str(error))
    codes = layouts.unpack_e2m1(result.codes).to(torch.uint8) if packed else result.codes
    exact = decode_e8m0(scales) if codec.scale_format is ScaleFormat.E8M0 else scales.double()
    return Logical(codes, exact, codec.payload)


def first_rows(found: Logical, codec: Codec, count: int) -> Logical:
    """The first rows of a result, with their scales."""
    scales = found.scales if codec.granularity is Granularity.TENSOR else found.scales[:count]
    return Logical(found.codes[:count], scales, codec.payload)


def judge_quantised(
    index: int, rows: torch.Tensor, found: Logical, contract: QuantContract, static_scale: float
) -> Judgement:
    """Scales, then codes given the scales, then the dequantised error, however the codes were derived."""
    codec = contract.codec
    if not rows.numel():
        return None, 0.0
    mismatch, worst = judge_scales(index, rows, found.scales, codec, static_scale)
    if mismatch is not None:
        return mismatch, worst
    for part in _parts(slice(None), rows.shape[0], rows.shape[1], max(codec.block_rows, 1)):
        mine = _part_of(found, codec, part)
        codes = quantisation.accepted_values(rows[part], mine.scales, codec)
        # A code that may be anything may be NaN as well; that its product with the scale is right is looked at below.
        mismatch, ratio = judge_interval("quantise.codes", index, mine.values, codes, _sure(codes))
        worst = max(worst, ratio)
        mismatch = mismatch or judge_dequantised(index, rows[part], mine, codec)
        if mismatch is not None:
            return placed(mismatch, part, rows.shape[0]), worst
    return None, worst


def judge_scales(index: int, rows: torch.Tensor, scales: torch.Tensor, codec: Codec, static_scale: float) -> Judgement:
    """Scales against the codec's rule."""
    if codec.static:
        wanted = Interval.exact(torch.full_like(scales, static_scale).float().double())
        return judge_interval("quantise.scales", index, scales, wanted, _sure(wanted))
    if codec.granularity is Granularity.TENSOR:
        # One element of each row is as good as all of them.
        accepted = quantisation.accepted_scales(rows.abs().amax(1, keepdim=True), codec)
        return judge_interval("quantise.scales", index, scales, accepted, _sure(accepted))
    worst = 0.0
    for part in _parts(slice(None), rows.shape[0], rows.shape[1], max(codec.block_rows, 1)):
        accepted = quantisation.accepted_scales(rows[part], codec)
        mine = _scales_of(scales, codec, part)
        mismatch, ratio = judge_interval("quantise.scales", index, mine, accepted, _sure(accepted))
        worst = max(worst, ratio)
        if mismatch is not None:
            mismatch.token = part.start + mismatch.token * max(codec.block_rows, 1)
            return mismatch, worst
    return None, worst


def _part_of(found: Logical, codec: Codec, part: slice) -> Logical:
    """Some rows, beginning with a whole block, and their scales."""
    return Logical(found.codes[part], _scales_of(found.scales, codec, part), codec.payload)


def _scales_of(scales: torch.Tensor, codec: Codec, part: slice) -> torch.Tensor:
    if codec.granularity is Granularity.BLOCK:
        return scales[part.start // codec.block_rows : -(-part.stop // codec.block_rows)]
    return scales if codec.granularity is Granularity.TENSOR else scales[part]


def _parts(share: slice, rows: int, columns: int, multiple: int = 1) -> Iterator[slice]:
    """The rows of ``share``, so many at a time that float64 copies of them fit beside the tensors themselves."""
    start, stop, step = share.indices(rows)
    length = max(_AT_ONCE // max(columns, 1) // multiple, 1) * multiple * step
    for begin in range(start, stop, length):
        yield slice(begin, min(begin + length, stop), step)


def _sure(accepted: Interval) -> torch.Tensor:
    """Where something is promised."""
    return accepted.lower.isfinite() & accepted.upper.isfinite()


def judge_dequantised(index: int, rows: torch.Tensor, found: Logical, codec: Codec) -> Mismatch | None:
    """Half a step of the payload, and exact zeros where a whole group is zero."""
    per_element = expand(found.scales, codec, *rows.shape)
    back = found.values * per_element
    bound = quantisation.half_step(rows, found.scales, codec)
    error = (back - rows.double()).abs()
    promised = ~quantisation.undefined(rows, codec)
    # Codes of a group with scale 0 are finite, so that what is made of them is zero.
    zero = expand(amax(rows, codec), codec, *rows.shape) == 0 if not codec.static else rows == 0
    bad = promised & (~(error <= bound) | (zero & (back != 0)))
    if not bool(bad.any()):
        return None
    row, element = bad.nonzero()[0].tolist()
    return Mismatch(
        "quantise.dequantised",
        index,
        f"{int(bad.sum())} of {bad.numel()} elements are off by more than half a step",
        token=row,
        element=element,
        got=f"{float(back[row, element])} (code {int(found.codes[row, element]):#x}, scale "
        f"{float(per_element[row, element])})",
        wanted=str(float(rows[row, element])),
        bound=f"within {float(bound[row, element])}",
    )


# ----------------------------------------------------------------------------------------------------------- norm
def judge_norm(index: int, answered: Answered, result: NormResult, contract: NormContract) -> Judgement:
    """Residual out, then the norm, then a quantised output."""
    terms, dtype = answered.terms, answered.terms.dtype
    shape = terms.shape[1:]
    for name, tensor, promised in (
        ("residual", result.residual, contract.residual),
        ("output", result.output, contract.element_output),
    ):
        if promised and (tensor is None or tensor.shape != shape or tensor.dtype != dtype):
            return _malformed(index, f"norm.{name}", name, tensor, f"{list(shape)} {dtype}"), 0.0
    codec = contract.codec_at(shape[0])
    found: Logical | None = None
    if codec is not None:
        if result.quantised is None:
            return Mismatch("quantise.layout", index, "the contract promises a quantised output, none came back"), 0.0
        read = read_quantised(index, result.quantised, codec, *shape)
        if isinstance(read, Mismatch):
            return read, 0.0
        found = read
    worst = 0.0
    for part in _parts(answered.share, *shape) if terms.numel() else ():
        mismatch, ratio = _judge_norm_rows(index, answered, result, contract, found, part)
        worst = max(worst, ratio)
        if mismatch is not None:
            return placed(mismatch, part, shape[0]), worst
    return None, worst


def _judge_norm_rows(
    index: int, answered: Answered, result: NormResult, contract: NormContract, found: Logical | None, share: slice
) -> Judgement:
    terms, dtype = answered.terms, answered.terms.dtype
    shape = terms.shape[1:]
    residual = None if answered.residual is None else answered.residual[share]
    numerics = contract.numerics(shape[0])
    finite = rms_norm.finite_rows(terms[:, share], residual, dtype)
    expected = rms_norm.expected(terms[:, share], residual, answered.weight, answered.epsilon, numerics, dtype)
    worst = 0.0
    stages: list[tuple[str, torch.Tensor, Interval]] = []
    if contract.residual and expected.residual is not None:
        assert result.residual is not None
        stages.append(("norm.residual", result.residual[share].double(), expected.residual))
    if contract.element_output:
        assert result.output is not None
        stages.append(("norm.output", result.output[share].double(), expected.output))
    for check, got, accepted in stages:
        mismatch, ratio = judge_interval(check, index, got, accepted, finite.unsqueeze(1))
        worst = max(worst, ratio)
        if mismatch is not None:
            if check == "norm.residual":
                mismatch.message += mean_error(terms[:, share], residual, got, finite)
            return mismatch, worst
    codec = contract.codec_at(shape[0])
    if codec is None or found is None:
        return None, worst
    mine = Logical(found.codes[share], found.scales[share], codec.payload)
    fused = rms_norm.quantised_acceptance(expected, codec, numerics, mine.scales)
    for check, got, interval in (
        ("norm.scales", mine.scales, fused.scales),
        ("norm.codes", mine.values, fused.values),
    ):
        mismatch, ratio = judge_interval(check, index, got, interval, finite.unsqueeze(1) & _sure(interval))
        worst = max(worst, ratio)
        if mismatch is not None:
            return mismatch, worst
    return None, worst


def mean_error(terms: torch.Tensor, residual: torch.Tensor | None, result: torch.Tensor, finite: torch.Tensor) -> str:
    """The mean signed error of a wrong residual out, in words: it tells a truncation from a wrong row.

    No verdict follows from it. Where the order of a sum is declared every element is known bit for bit; where it is
    open, legal partial sums of addends that cancel are off to one side by more than any rounding of the result.
    """
    exact = terms.double().sum(0)
    if residual is not None:
        exact = exact + residual.double()
    seen = mean_signed_error(result[finite].to(terms.dtype), exact[finite])
    if not seen.count or not seen.biased:
        return ""
    return (
        f"; over {seen.count} inexact elements it is off by {seen.outward:+.2f} of a spacing away from zero and by "
        f"{seen.upward:+.2f} upwards on average"
    )


# --------------------------------------------------------------------------------------------------------- shared
def judge_interval(check: str, index: int, got: torch.Tensor, accepted: Interval, promised: torch.Tensor) -> Judgement:
    """Elements outside their interval, where something is promised of them."""
    promised = promised.expand_as(got)
    ratio = torch.where(promised, accepted.error_over_bound(got), 0.0)
    worst = float(ratio.max()) if ratio.numel() else 0.0
    if worst <= 1.0:
        return None, worst
    row, element = divmod(int(ratio.argmax()), ratio.shape[1])
    low, high = float(accepted.lower[row, element]), float(accepted.upper[row, element])
    mismatch = Mismatch(
        check,
        index,
        f"{int((ratio > 1).sum())} of {ratio.numel()} elements are outside their interval",
        token=row,
        element=element,
        got=str(float(got[row, element])),
        wanted=str(float(accepted.value[row, element])),
        bound=f"[{low}, {high}]",
    )
    return mismatch, worst


def placed(mismatch: Mismatch, share: slice, rows: int) -> Mismatch:
    """A mismatch in a share of the rows, with the number of the row among all of them."""
    if mismatch.token >= 0:
        mismatch.token = range(rows)[share][mismatch.token]
    return mismatch


def _malformed(index: int, check: str, name: str, tensor: torch.Tensor | None, wanted: str) -> Mismatch:
    got = "nothing" if tensor is None else f"{list(tensor.shape)} {tensor.dtype}"
    return Mismatch(check, index, f"{name} came back as {got}", got=got, wanted=wanted)
