"""Scenarios of AllReduce + residual add + RMSNorm on gloo ranks: fused, split, quantised, refusals.

Scope: every rank builds the rows of all ranks, so that it can judge its own results by the oracle, by the bounds, and
residual out by float32 additions written out in numpy. A pass proves nothing about NCCL or RCCL, or about devices.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from conformance.selftest.reference.norm_adversary import to
from conformance.selftest.reference.ranks import World
from reference import norm_oracle
from reference.allreduce_rms_norm import Result, all_reduce, all_reduce_rms_norm, local_rms_norm, split
from reference.codecs import STANDARD
from reference.formats import Ties
from reference.intervals import Interval
from reference.norm_numerics import NormInput, NormNumerics, QuantisedFrom, SumOrder, WeightProduct
from reference.rms_norm import expected, quantised_acceptance
from reference.rounding import decode

#: Row counts on both sides of AITER's and vLLM's path changes.
LADDER = (0, 1, 2, 3, 10, 11, 17, 18, 19, 79, 80, 81)
EPSILON = 1e-6
_HIDDEN = 32


def _inputs(
    world: World, rows: int, hidden: int = _HIDDEN, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(rows of all ranks ``[W, M, N]``, residual, weight), the same on every rank, different for each."""
    generator = torch.Generator().manual_seed(1000 * rows + hidden + world.size)
    terms = torch.randn(world.size, rows, hidden, generator=generator)
    residual = 3 * torch.randn(rows, hidden, generator=generator)
    return terms.to(dtype), residual.to(dtype), (1 + 0.3 * torch.randn(hidden, generator=generator)).to(dtype)


def _same_everywhere(world: World, result: Result) -> None:
    """Every rank has the same bits."""
    quantised = [] if result.quantised is None else [result.quantised.codes, result.quantised.scales]
    parts = [part.contiguous() for part in (result.output, result.residual, *quantised) if part is not None]
    mine = torch.cat([part.view(-1).view(torch.uint8) for part in parts])
    if mine.numel():
        everyone = [torch.empty_like(mine) for _ in range(world.size)]
        dist.all_gather(everyone, mine, group=world.group)
        assert all(torch.equal(other, mine) for other in everyone)


def _judge(
    world: World,
    result: Result,
    terms: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    numerics: NormNumerics,
) -> None:
    """Every rank has the same bits, and those of rank 0 are acceptable."""
    _same_everywhere(world, result)
    if world.rank:
        return
    dtype = terms.dtype
    assert (result.output.dtype, result.output.shape) == (dtype, terms.shape[1:])
    want = expected(terms, residual, weight, EPSILON, numerics, dtype)
    oracle = norm_oracle.expected(terms, residual, weight, EPSILON, numerics, dtype)
    for name, got in (("output", result.output), ("residual", result.residual)):
        if got is None:
            assert residual is None
            continue
        for interval in (getattr(want, name), Interval(**vars(getattr(oracle, name)))):
            assert bool((interval.error_over_bound(got) <= 1).all()), (name, numerics)


def ladder(world: World) -> None:
    for rows in LADDER:
        terms, residual, weight = _inputs(world, rows)
        mine, numerics = terms[world.rank], NormNumerics()
        fused = all_reduce_rms_norm(mine, residual, weight, EPSILON, numerics=numerics, group=world.group)
        apart = split(mine, residual, weight, EPSILON, numerics=numerics, group=world.group)
        for result in (fused, apart):
            _judge(world, result, terms, residual, weight, numerics)
        # Both forms round at the same points here.
        assert torch.equal(fused.output, apart.output)
        assert fused.residual is not None
        assert apart.residual is not None
        assert torch.equal(fused.residual, apart.residual)


def residual_is_bit_exact(world: World) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for rounded in (True, False):
            terms, residual, weight = _inputs(world, 18, 96, dtype)
            numerics = NormNumerics(round_reduced=rounded)
            got = all_reduce_rms_norm(
                terms[world.rank], residual, weight, EPSILON, numerics=numerics, group=world.group
            ).residual
            total = np.zeros((18, 96), np.float32)
            for term in terms.float().numpy():
                total = total + term
            total = (to(dtype, total) if rounded else total) + residual.float().numpy()
            assert got is not None
            assert np.array_equal(got.float().numpy(), to(dtype, total)), (dtype, rounded)


def every_rounding_point(world: World) -> None:
    choices = itertools.product(NormInput, WeightProduct, (False, True), (Ties.EVEN, Ties.TRUNCATE))
    orders = itertools.cycle(SumOrder)
    for norm_input, product, gemma, ties in choices:
        numerics = NormNumerics(next(orders), norm_input=norm_input, product=product, gemma=gemma, store=ties)
        terms, residual, weight = _inputs(world, 3)
        result = all_reduce_rms_norm(terms[world.rank], residual, weight, EPSILON, numerics=numerics, group=world.group)
        _judge(world, result, terms, residual, weight, numerics)


def settings_can_be_told_apart(world: World) -> None:
    terms, residual, weight = _inputs(world, 64, 128)
    settings = [
        NormNumerics(),
        NormNumerics(norm_input=NormInput.ROUNDED),
        NormNumerics(product=WeightProduct.ROUNDED_NORM),
        NormNumerics(gemma=True),
        NormNumerics(store=Ties.TRUNCATE),
        *([NormNumerics(round_reduced=False)] if world.size > 1 else []),
    ]
    for dtype, compared in (
        (torch.bfloat16, settings),
        # The order of the two products seldom shows after a store to bfloat16.
        (torch.float32, [NormNumerics(), NormNumerics(product=WeightProduct.WEIGHT_FIRST)]),
    ):
        rows, addend, scale = terms[world.rank].to(dtype), residual.to(dtype), weight.to(dtype)
        outputs = [
            all_reduce_rms_norm(rows, addend, scale, EPSILON, numerics=numerics, group=world.group).output
            for numerics in compared
        ]
        for one, other in itertools.combinations(outputs, 2):
            assert not torch.equal(one, other)


def without_residual(world: World) -> None:
    terms, residual, weight = _inputs(world, 17)
    for numerics in (NormNumerics(), NormNumerics(norm_input=NormInput.ROUNDED, gemma=True)):
        for form in (all_reduce_rms_norm, split):
            none, zeros = (
                form(terms[world.rank], addend, weight, EPSILON, numerics=numerics, group=world.group)
                for addend in (None, torch.zeros_like(residual))
            )
            assert none.residual is None
            assert torch.equal(none.output, zeros.output)
            _judge(world, none, terms, None, weight, numerics)


def quantised(world: World) -> None:
    names = ("token_fn", "token_hip_fnuz", "group128_fnuz", "group128_hip_fn", "mxfp4_even")
    for name, source in itertools.product(names, QuantisedFrom):
        codec, declared = STANDARD[name], NormNumerics(quantised_from=source)
        terms, residual, weight = _inputs(world, 5, 160)
        terms[:, 3], residual[3] = 0, 0
        for form in (all_reduce_rms_norm, split):
            numerics = (
                declared if form is all_reduce_rms_norm else replace(declared, quantised_from=QuantisedFrom.ROUNDED)
            )
            result = form(
                terms[world.rank], residual, weight, EPSILON, numerics=declared, group=world.group, codec=codec
            )
            got = result.quantised
            assert got is not None
            _same_everywhere(world, result)
            want = expected(terms, residual, weight, EPSILON, numerics, terms.dtype)
            accepted = quantised_acceptance(want, codec, numerics, got.scales)
            assert bool((accepted.scales.error_over_bound(got.scales) <= 1).all()), (name, source)
            values = decode(got.codes, codec.payload)
            assert bool((accepted.values.error_over_bound(values) <= 1).all()), (name, source)


def local_form_is_the_collective_one_on_one_rank(world: World) -> None:
    terms, residual, weight = _inputs(world, 19)
    numerics = NormNumerics(product=WeightProduct.WEIGHT_FIRST)
    total = all_reduce(terms[world.rank], numerics=numerics, group=world.group)
    local = local_rms_norm(total, residual, weight, EPSILON, numerics=numerics)
    apart = split(terms[world.rank], residual, weight, EPSILON, numerics=numerics, group=world.group)
    assert torch.equal(local.output, apart.output)
    _judge(world, local, total[None], residual, weight, numerics)


def strided_rows(world: World) -> None:
    terms, residual, weight = _inputs(world, 4, 64)
    numerics = NormNumerics()
    wide = torch.cat([terms[world.rank], terms[world.rank]], dim=1)[:, :64]
    got = all_reduce_rms_norm(wide, residual, weight, EPSILON, numerics=numerics, group=world.group)
    _judge(world, got, terms, residual, weight, numerics)


def inputs_stay_as_they_are(world: World) -> None:
    terms, residual, weight = _inputs(world, 6)
    before = [tensor.clone() for tensor in (terms, residual, weight)]
    all_reduce_rms_norm(terms[world.rank], residual, weight, EPSILON, numerics=NormNumerics(), group=world.group)
    assert all(torch.equal(a, b) for a, b in zip(before, (terms, residual, weight), strict=True))


def poisoned_rows_stay_apart(world: World) -> None:
    terms, residual, weight = _inputs(world, 9)
    clean = all_reduce_rms_norm(
        terms[world.rank], residual, weight, EPSILON, numerics=NormNumerics(), group=world.group
    )
    terms[0, 4, 0] = torch.nan
    got = all_reduce_rms_norm(terms[world.rank], residual, weight, EPSILON, numerics=NormNumerics(), group=world.group)
    others = torch.arange(9) != 4
    assert torch.equal(got.output[others], clean.output[others])
    assert bool(got.output[4].isnan().all())


def sums_start_at_rank_zero(world: World) -> None:
    # 2**24 + 1 is a tie, to 2**24; 1 + 1 + 2**24 is exact.
    rows = torch.full((1, 8), 2.0**24 if world.rank == 0 else 1.0)
    weight = torch.ones(8)
    for numerics in (NormNumerics(), NormNumerics(SumOrder.ANY), NormNumerics(SumOrder.ROTATED)):
        total = all_reduce(rows, numerics=numerics, group=world.group)
        forms = [
            form(rows, torch.zeros_like(rows), weight, EPSILON, numerics=numerics, group=world.group).residual
            for form in (all_reduce_rms_norm, split)
        ]
        assert all(got is not None and got.tolist() == [[2.0**24] * 8] for got in (total, *forms))


def refusals_come_before_collectives(world: World) -> None:
    if world.rank:
        return  # a rank that waited for the others would hang
    terms, residual, weight = _inputs(world, 2)
    rows, static = terms[0], STANDARD["tensor_static_fn"]
    for form in (all_reduce_rms_norm, split):
        with pytest.raises(ValueError, match=r"^residual has shape \[1, 32\]; give \[2, 32\], as the rows have$"):
            form(rows, residual[:1], weight, EPSILON, numerics=NormNumerics(), group=world.group)
        with pytest.raises(ValueError, match=r"^weight has shape \[31\]; give \[32\]$"):
            form(rows, residual, weight[1:], EPSILON, numerics=NormNumerics(), group=world.group)
        with pytest.raises(ValueError, match=r"^the codec is static and a norm has no scale to give it; use a dynamic"):
            form(rows, residual, weight, EPSILON, numerics=NormNumerics(), group=world.group, codec=static)
