"""Judging one call of a row operator by the oracles, which share no code with the reference.

Scope: the reference as a backend; its fused quantisers see the rounded output, which came back and can be quantised
again. What an agreement does not prove: that a declared contract is a library's.
"""

from __future__ import annotations

import torch

from accelerated.operators import NormContract, NormResult, QuantContract, QuantResult
from accelerated.routers import RouteContract
from conformance.engine.protocol import Mismatch
from conformance.rank.judge_routes import judge_route_by_oracle
from conformance.rank.judge_rows import (
    Answered,
    Judgement,
    Logical,
    first_rows,
    judge_interval,
    placed,
    read_quantised,
)
from reference import norm_oracle, quantisation_oracle
from reference.codecs import Codec
from reference.intervals import Interval


def judge_by_oracle(
    index: int, answered: Answered, contract: QuantContract | NormContract | RouteContract
) -> Judgement:
    """First failed check of one call, or None, and the largest error/bound."""
    if isinstance(contract, RouteContract):
        return judge_route_by_oracle(index, answered, contract)
    if isinstance(contract, NormContract):
        assert isinstance(answered.result, NormResult)
        return _norm(index, answered, answered.result, contract)
    assert isinstance(answered.result, QuantResult)
    rows = answered.terms[0]
    found = read_quantised(index, answered.result, contract.codec, *rows.shape)
    if isinstance(found, Mismatch):
        return found, 0.0
    count = rows.shape[0] if answered.num_rows < 0 else answered.num_rows
    scale = answered.scale if contract.codec.static else None
    return _quantised(index, rows[:count], first_rows(found, contract.codec, count), contract.codec, scale), 0.0


def _quantised(index: int, rows: torch.Tensor, found: Logical, codec: Codec, scale: float | None) -> Mismatch | None:
    if not rows.numel():
        return None
    # On the host, which is no suspect.
    values, scales = (t.to(rows.device) for t in quantisation_oracle.quantise(rows.cpu(), codec, scale))
    for check, got, wanted in (("quantise.scales", found.scales, scales), ("quantise.codes", found.values, values)):
        mismatch, _ = judge_interval(check, index, got, _point(wanted), ~wanted.isnan())
        if mismatch is not None:
            return mismatch
    return None


def _point(wanted: torch.Tensor) -> Interval:
    return Interval(wanted, wanted, wanted)


def _norm(index: int, answered: Answered, result: NormResult, contract: NormContract) -> Judgement:
    terms, dtype, share = answered.terms, answered.terms.dtype, answered.share
    if not terms.numel():
        return None, 0.0
    residual = None if answered.residual is None else answered.residual[share]
    numerics = contract.numerics(terms.shape[1])
    hosted = None if residual is None else residual.cpu()
    bounds = norm_oracle.expected(
        terms[:, share].cpu(), hosted, answered.weight.cpu(), answered.epsilon, numerics, dtype
    )
    magnitude = terms[:, share].double().abs().sum(0)
    finite = (magnitude < torch.finfo(dtype).max / 2).all(1, keepdim=True)
    worst = 0.0
    for check, got, accepted in (
        ("norm.residual", result.residual, bounds.residual),
        ("norm.output", result.output, bounds.output),
    ):
        if accepted is None:
            continue
        assert got is not None
        interval = Interval(*(end.to(terms.device) for end in (accepted.value, accepted.lower, accepted.upper)))
        mismatch, ratio = judge_interval(check, index, got[share].double(), interval, finite)
        worst = max(worst, ratio)
        if mismatch is not None:
            return placed(mismatch, share, terms.shape[1]), worst
    codec = contract.codec_at(terms.shape[1])
    if codec is None:
        return None, worst
    assert result.quantised is not None
    assert result.output is not None
    found = read_quantised(index, result.quantised, codec, *terms.shape[1:])
    if isinstance(found, Mismatch):
        return found, worst
    mine = Logical(found.codes[share], found.scales[share], codec.payload)
    mismatch = _quantised(index, result.output[share], mine, codec, None)
    return None if mismatch is None else placed(mismatch, share, terms.shape[1]), worst
