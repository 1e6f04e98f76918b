"""The acceptance of the experts: no legal implementation is outside, and every fault is, on every row it touches.

Scope: implementations from expert_adversary.py under declarations at random, on rows of eight kinds; faults under the
schemes in use at H = 256, I = 128. A pass proves nothing about numerics that are not declared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from random import Random

import pytest
import torch

from conformance.selftest.reference.expert_adversary import Data, Legal, data_of, numerics_of, rounded, stored
from reference.codecs import STANDARD, Granularity
from reference.expert_gemm import Dense, dot
from reference.expert_hulls import add_parts, quantised_in_any_group, split
from reference.expert_numerics import Activation, ExpertNumerics, SlotSum
from reference.expert_weights import ExpertWeights
from reference.experts import accepted, forward
from reference.formats import BFLOAT16, FLOAT32
from reference.intervals import Interval
from reference.quantisation import dequantise, quantise

_BF16 = ExpertNumerics(intermediate_store=BFLOAT16, slot_sum=SlotSum.ATOMIC)


def _coded(codec: str, weights: str) -> ExpertNumerics:
    between = STANDARD[codec]
    return replace(_BF16, input_codec=between, intermediate_codec=between, weight_codec=STANDARD[weights])


SCHEMES = {
    "bf16": _BF16,
    "bf16 one stage": ExpertNumerics(),
    "bf16 gelu": replace(_BF16, activation=Activation.GELU),
    "rounded terms": replace(_BF16, gemm1_store=BFLOAT16, slot_sum=SlotSum.ROUNDED_TERMS),
    "fp8 token": _coded("token_fn", "token_fn"),
    "fp8 block": _coded("group128_hip_fn", "block128_fn"),
    "fp8 block one stage": replace(_coded("group128_hip_fn", "block128_fn"), intermediate_store=None),
    "mxfp4": _coded("mxfp4_even", "mxfp4_up"),
    "swiglu": replace(_BF16, activation=Activation.SWIGLU, limit=7.0, weight_codec=STANDARD["mxfp4_up"]),
}
HIDDEN, INTER, ROWS, EXPERTS, TOP_K = 256, 128, 64, 8, 4


def _acceptance(data: Data, numerics: ExpertNumerics, dtype: torch.dtype) -> Interval:
    rows = Interval.exact(data.rows)
    return accepted(rows, data.ids, data.weights, data.local, data.slot_of, numerics, dtype)


def _result(data: Data, numerics: ExpertNumerics, dtype: torch.dtype) -> torch.Tensor:
    return forward(data.rows, data.ids, data.weights, data.local, data.slot_of, numerics, dtype)


@pytest.mark.parametrize("block", range(6))
def test_no_legal_implementation_is_outside(block: int) -> None:
    for seed in range(35 * block, 35 * block + 35):
        random = Random(seed)
        torch.manual_seed(seed)
        numerics = numerics_of(random)
        dtype = random.choice((torch.bfloat16, torch.float16, torch.float32, torch.float32))
        data = data_of(random, numerics, dtype)
        found = _acceptance(data, numerics, dtype)
        results = [_result(data, numerics, dtype), *(Legal(numerics, dtype, random).run(data) for _ in range(3))]
        for number, result in enumerate(results):
            worst = found.error_over_bound(result)
            assert float(worst.max()) <= 1, (seed, number, float(worst.max()), int(worst.argmax()), numerics)


def _reached(numerics: ExpertNumerics, seeds: range) -> float:
    """The largest error/bound of float32 results."""
    largest = 0.0
    for seed in seeds:
        random = Random(seed)
        torch.manual_seed(seed)
        data = data_of(random, numerics, torch.float32)
        found = _acceptance(data, numerics, torch.float32)
        for _ in range(3):
            # Numbers next to zero have a bound of their own, which everything reaches.
            ratio = found.error_over_bound(Legal(numerics, torch.float32, random).run(data))
            largest = max(largest, float(ratio[found.value.abs() > 2.0**-20].max()))
    return largest


@pytest.mark.parametrize("terms", [2, 16, 256])
@pytest.mark.parametrize(("ulps", "direction", "small"), [(1.0, "up", 2.0**-40), (0.5, "nearest", 2.0**-24 * 1.0001)])
def test_the_bound_of_a_dot_product_is_reached(ulps: float, direction: str, small: float, terms: int) -> None:
    """One, and numbers that are each rounded to a unit of one: all additions err as much as they may."""
    x = torch.full((1, terms), small, dtype=torch.float64).float().double()
    x[0, 0] = 1.0
    ones = torch.ones(1, 1, terms)
    dense = Dense(ExpertWeights(ones, ones.transpose(1, 2)))
    numerics = ExpertNumerics(accumulator_ulps=ulps, scale_roundings=0)
    total = torch.ones((), dtype=torch.float64)
    for term in x[0, 1:]:
        total = rounded(total + term, direction)
    found = dot(Interval.exact(x), None, [(0, 0, 1)], dense, 0, None, numerics).total
    assert 0.99 < float(found.error_over_bound(total.reshape(1, 1))) <= 1


@pytest.mark.parametrize(
    "numerics",
    [
        ExpertNumerics(accumulator_ulps=0.5, function_ulps=1024.0),
        ExpertNumerics(slot_sum=SlotSum.ROUNDED_TERMS, gemm1_store=BFLOAT16, store_ulps=1.0),
    ],
    ids=["function", "stores"],
)
def test_other_bounds_are_half_reached(numerics: ExpertNumerics) -> None:
    assert 0.5 < _reached(numerics, range(12)) <= 1


def test_the_hulls_of_parts_are_reached() -> None:
    """Every part rounds down by almost a unit; the sum, in float32, does not round."""
    parts = torch.full((4, 1, 1), 1 + 2.0**-7 - 2.0**-20, dtype=torch.float64)
    total, size = Interval.exact(parts.sum(0)), parts.sum(0)
    numerics = ExpertNumerics(gemm1_partial=BFLOAT16, gemm1_parts=4, store_ulps=1.0)
    cut = rounded(parts, "down", BFLOAT16).sum(0)
    assert 0.95 < float(split(total, size, None, numerics).error_over_bound(cut)) <= 1
    inner = ExpertNumerics(slot_sum=SlotSum.ROUNDED_TERMS, inner_parts=4, store_ulps=1.0)
    one = torch.ones(1, 1)
    found = add_parts(Interval.exact(parts.sum(0)[None]), size[None], one, FLOAT32, inner)
    assert float(found.error_over_bound(parts.sum(0))) <= 1
    found = add_parts(Interval.exact(parts.sum(0)[None]), size[None], one, BFLOAT16, inner)
    assert 0.5 < float(found.error_over_bound(cut)) <= 1


@pytest.mark.parametrize(
    "codec", ["token_fn", "group128_hip_fn", "mxfp4_down", "mxfp4_even", "mxfp8_fn_up", "mxfp8_fn_down"]
)
def test_any_groups_are_covered_and_half_reached(codec: str) -> None:
    declared = STANDARD[codec]
    rows = torch.randn(40, 256, generator=torch.Generator().manual_seed(1)).float()
    rows[1::2] *= torch.exp2(torch.arange(256) % 24 - 12.0)
    found = quantised_in_any_group(Interval.exact(rows), declared)
    token = replace(declared, granularity=Granularity.TOKEN, group=0)
    largest = 0.0
    for width in (1, 4, 32, 256):
        if width <= (declared.group or 256):
            parts = rows.reshape(-1, width)
            values = dequantise(quantise(parts, token), token).reshape(rows.shape)
            largest = max(largest, float(found.error_over_bound(values).max()))
    assert 0.5 < largest <= 1


@dataclass
class _Fault:
    """A faulty result, and the rows on which it is one."""

    result: torch.Tensor
    rows: torch.Tensor


@cache
def _case(scheme: str) -> tuple[Data, Interval]:
    numerics = SCHEMES[scheme]
    generator = torch.Generator().manual_seed(len(scheme))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    matrices = normal(EXPERTS, 2 * INTER, HIDDEN) / 16, normal(EXPERTS, HIDDEN, INTER) / 12
    biases = (normal(EXPERTS, 2 * INTER), normal(EXPERTS, HIDDEN)) if scheme == "swiglu" else (None, None)
    local = stored(matrices[0], matrices[1], numerics.weight_codec, torch.bfloat16, *biases)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(ROWS)]).int()
    weights = torch.rand(ROWS, TOP_K, generator=generator) + 0.25
    data = Data(normal(ROWS, HIDDEN).bfloat16(), ids, weights, local, torch.arange(EXPERTS))
    return data, _acceptance(data, numerics, torch.bfloat16)


def _all(data: Data) -> torch.Tensor:
    return torch.ones(len(data.rows), dtype=torch.bool)


def _run(data: Data, scheme: str) -> torch.Tensor:
    return _result(data, SCHEMES[scheme], torch.bfloat16)


def _wrong_expert(data: Data, scheme: str) -> _Fault:
    """The last slot of every row goes to the next expert."""
    ids = data.ids.clone()
    ids[:, -1] = (ids[:, -1] + 1) % EXPERTS
    return _Fault(_run(replace(data, ids=ids), scheme), _all(data))


def _dropped(data: Data, scheme: str) -> _Fault:
    """The slot of least weight of every row."""
    ids = data.ids.clone()
    ids.scatter_(1, data.weights.argmin(1, keepdim=True), -1)
    return _Fault(_run(replace(data, ids=ids), scheme), _all(data))


def _weights_one(data: Data, scheme: str) -> _Fault:
    return _Fault(_run(replace(data, weights=torch.ones_like(data.weights)), scheme), _all(data))


def _last_weight_of_first(data: Data, scheme: str) -> _Fault:
    weights = data.weights.clone()
    weights[:, -1] = weights[:, 0]
    return _Fault(_run(replace(data, weights=weights), scheme), (data.weights[:, -1] / weights[:, 0] - 1).abs() > 0.25)


def _doubled(data: Data, scheme: str) -> _Fault:
    """One expert's W1 is read with twice its scale."""
    local = replace(data.local)
    if local.w1_scales is None:
        local.w1 = local.w1.clone()
        local.w1[3] *= 2
    else:
        local.w1_scales = local.w1_scales.clone()
        local.w1_scales[3] *= 2
    return _Fault(_run(replace(data, local=local), scheme), (data.ids == 3).any(1))


def _one_block_doubled(data: Data, scheme: str) -> _Fault:
    """The first scale of each of 32 output channels, or the first two rows of blocks, of every expert's W2."""
    local = replace(data.local)
    if local.w2_scales is None:
        local.w2 = local.w2.clone()
        local.w2[:, :32, :32] *= 2
    else:
        local.w2_scales = local.w2_scales.clone()
        local.w2_scales[:, :32, 0] *= 2
    return _Fault(_run(replace(data, local=local), scheme), _all(data))


def _swapped_halves(data: Data, scheme: str) -> _Fault:
    def swap(rows: torch.Tensor | None) -> torch.Tensor | None:
        return None if rows is None else torch.cat([rows[:, rows.shape[1] // 2 :], rows[:, : rows.shape[1] // 2]], 1)

    first = swap(data.local.w1)
    assert first is not None
    local = replace(data.local, w1=first, w1_scales=swap(data.local.w1_scales), bias1=swap(data.local.bias1))
    return _Fault(_run(replace(data, local=local), scheme), _all(data))


def _interleaved(data: Data, scheme: str) -> _Fault:
    """Gate and up rows are taken in turn, which they are not."""
    order = torch.arange(2 * INTER).reshape(2, INTER).T.flatten()
    if data.local.w1_scales is not None and data.local.w1_scales.shape[1] != 2 * INTER:
        local = ExpertWeights(*data.local.dequantised(), bias1=data.local.bias1, bias2=data.local.bias2)
    else:
        local = replace(data.local)
    local.w1 = local.w1[:, order]
    local.w1_scales = None if local.w1_scales is None else local.w1_scales[:, order]
    return _Fault(_run(replace(data, local=local), scheme), _all(data))


def _swapped_tokens(data: Data, scheme: str) -> _Fault:
    result = _run(data, scheme)
    order = torch.arange(ROWS)
    order[[10, 11]] = order[[11, 10]]
    return _Fault(result[order], order != torch.arange(ROWS))


def _no_activation(data: Data, scheme: str) -> _Fault:
    other = {Activation.SILU: Activation.GELU, Activation.GELU: Activation.SILU, Activation.SWIGLU: Activation.SILU}
    numerics = SCHEMES[scheme]
    return _Fault(_result(data, replace(numerics, activation=other[numerics.activation]), torch.bfloat16), _all(data))


def _zeros(data: Data, scheme: str) -> _Fault:
    del scheme
    return _Fault(torch.zeros_like(data.rows), _all(data))


FAULTS: tuple[Callable[[Data, str], _Fault], ...] = (
    _wrong_expert,
    _dropped,
    _weights_one,
    _last_weight_of_first,
    _doubled,
    _one_block_doubled,
    _swapped_halves,
    _interleaved,
    _swapped_tokens,
    _no_activation,
    _zeros,
)


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.__name__[1:] for fault in FAULTS])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_affected_row_is_outside(scheme: str, fault: Callable[[Data, str], _Fault]) -> None:
    data, found = _case(scheme)
    assert float(found.error_over_bound(_run(data, scheme)).max()) <= 1
    made = fault(data, scheme)
    outside = (found.error_over_bound(made.result) > 1).any(1)
    assert int(made.rows.sum()) > 0
    missed = made.rows & ~outside
    assert not bool(missed.any()), missed.nonzero().flatten().tolist()
    assert not bool((outside & ~made.rows).any()) or fault is _last_weight_of_first


@pytest.mark.parametrize(
    ("scheme", "other"),
    [
        ("fp8 block", replace(SCHEMES["fp8 block"], intermediate_codec=None)),
        ("fp8 token", replace(SCHEMES["fp8 token"], input_codec=None)),
        ("mxfp4", replace(SCHEMES["mxfp4"], intermediate_codec=None)),
        ("bf16 one stage", replace(ExpertNumerics(), gemm1_store=BFLOAT16, intermediate_store=BFLOAT16)),
    ],
    ids=["not requantised", "rows not quantised", "FP4 not requantised", "two stages for one"],
)
def test_other_rounding_points_are_told_apart_on_most_rows(scheme: str, other: ExpertNumerics) -> None:
    data, found = _case(scheme)
    outside = (found.error_over_bound(_result(data, other, torch.bfloat16)) > 1).any(1)
    assert float(outside.double().mean()) > 0.5
