"""AllReduce + residual add + RMSNorm on 1, 2, 4 and 8 gloo ranks; its local part compiled; its quantised bounds.

Scope: scenarios_allreduce.py in one spawn per number of ranks, and what one process can say about quantised outputs and
torch.compile. A pass proves nothing about NCCL or RCCL, about devices, or about a compiler for one.
"""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from conformance.selftest.reference import norm_adversary as adv
from conformance.selftest.reference import ranks, scenarios_allreduce
from reference.allreduce_rms_norm import local_rms_norm
from reference.codecs import STANDARD, Codec, ZeroScale
from reference.norm_numerics import NormInput, NormNumerics, QuantisedFrom, WeightProduct
from reference.quantisation import Quantised, quantise
from reference.rms_norm import Expected, expected, quantised_acceptance
from reference.rounding import decode

MODULES = (scenarios_allreduce.__name__,)
EPSILON = 1e-5


@pytest.mark.parametrize("size", [8, 4, 2, 1])
def test_scenarios(size: int, tmp_path: Path) -> None:
    problems = ranks.failures(ranks.run(size, MODULES, tmp_path), MODULES)
    assert not problems, problems


def test_inventory_is_complete() -> None:
    assert len(ranks.scenarios_of(MODULES[0])) == 12


def _ratios(want: Expected, codec: Codec, numerics: NormNumerics, got: Quantised) -> tuple[float, float]:
    accepted = quantised_acceptance(want, codec, numerics, got.scales)
    values = accepted.values.error_over_bound(decode(got.codes, codec.payload))
    return float(accepted.scales.error_over_bound(got.scales).max()), float(values.max())


def test_no_legal_quantised_output_is_rejected() -> None:
    random, rows = np.random.default_rng(1), 0
    for name, source in itertools.product(("token_fn", "group128_fnuz", "mxfp4_even", "ue8m0_fn"), QuantisedFrom):
        codec = STANDARD[name]
        numerics = NormNumerics(
            norm_input=NormInput.EITHER, product=WeightProduct.EITHER, quantised_from=source, round_reduced=True
        )
        for family, drawn in adv.families((2, 64, 128), torch.bfloat16, random):
            addends = adv.to(torch.bfloat16, drawn.astype(np.float32))
            weight = adv.to(torch.bfloat16, 1 + 0.3 * random.standard_normal(128))
            terms = torch.from_numpy(addends).bfloat16()
            want = expected(
                *(terms[:-1], terms[-1], torch.from_numpy(weight).bfloat16(), EPSILON), numerics, torch.bfloat16
            )
            for _ in range(2):
                got = adv.kernel(addends, weight, EPSILON, numerics, torch.bfloat16, random)
                seen = got.unrounded if source is QuantisedFrom.FLOAT32 else got.output
                ratios = _ratios(want, codec, numerics, quantise(torch.from_numpy(seen), codec))
                assert max(ratios) <= 1, (name, source, family, ratios)
            rows += 64
    assert rows == 4608


def test_wrong_quantised_outputs_are_rejected() -> None:
    generator = torch.Generator().manual_seed(5)
    rows, weight = torch.randn(32, 256, generator=generator).bfloat16(), torch.ones(256).bfloat16()
    rows[4] = 0
    codec, numerics = STANDARD["token_fn"], NormNumerics()
    want = expected(rows[None], None, weight, EPSILON, numerics, rows.dtype)
    good = local_rms_norm(rows, None, weight, EPSILON, numerics=numerics, codec=codec).quantised
    assert good is not None
    assert max(_ratios(want, codec, numerics, good)) <= 1
    after_store = local_rms_norm(
        *(rows, None, weight, EPSILON), numerics=replace(numerics, quantised_from=QuantisedFrom.ROUNDED), codec=codec
    ).quantised
    assert after_store is not None
    zero = good.scales.clone()
    zero[4] = 0
    far = good.codes.clone()
    far[7, 9] ^= 2
    for wrong in (after_store, Quantised(good.codes, zero), Quantised(good.codes, good.scales * (1 + 2.0**-10))):
        assert _ratios(want, codec, numerics, wrong)[0] > 1
    assert _ratios(want, codec, numerics, Quantised(far, good.scales))[1] > 1
    largest = good.codes.clone()
    largest[0, rows[0].float().abs().argmax()] -= 1
    assert _ratios(want, codec, numerics, Quantised(largest, good.scales))[1] > 1


def test_scale_of_a_row_that_may_be_flushed() -> None:
    rows, weight = torch.full((1, 16), 2.0**-127).bfloat16(), torch.ones(16).bfloat16()
    codec = replace(STANDARD["token_fn"], zero_scale=ZeroScale.ONE)
    for flush in (False, True):
        numerics = NormNumerics(may_flush=flush)
        want = expected(rows[None], None, weight, EPSILON, numerics, rows.dtype)
        got = quantise(torch.zeros(1, 16), codec)
        assert got.scales.item() == 1
        exact = quantise(want.unrounded.value, codec)
        assert max(_ratios(want, codec, numerics, exact)) <= 1
        for result in (got, quantise(want.unrounded.value / 2, codec)):
            assert (_ratios(want, codec, numerics, result)[0] <= 1) is flush


def _compiled(backend: str, codec: Codec | None, *shapes: tuple[int, int]) -> None:
    """Compiled and eager results of the split form's local part: the same kind of tensors, both acceptable."""
    generator = torch.Generator().manual_seed(6)
    numerics = NormNumerics(quantised_from=QuantisedFrom.ROUNDED)
    torch.compiler.reset()
    compiled = torch.compile(local_rms_norm, backend=backend, fullgraph=codec is None)
    for shape in shapes:  # from the second on, sizes that changed are dynamic
        x, residual = (torch.randn(shape, generator=generator).bfloat16() for _ in range(2))
        weight = torch.randn(shape[1], generator=generator).bfloat16()
        eager, other = (
            form(x, residual, weight, EPSILON, numerics=numerics, codec=codec) for form in (local_rms_norm, compiled)
        )
        want = expected(x[None], residual, weight, EPSILON, numerics, x.dtype)
        for name in ("output", "residual"):
            mine, theirs = getattr(eager, name), getattr(other, name)
            assert bool((getattr(want, name).error_over_bound(theirs) <= 1).all())
            assert (mine.dtype, mine.shape, mine.stride()) == (theirs.dtype, theirs.shape, theirs.stride())
        assert eager.residual is not None
        assert other.residual is not None
        assert torch.equal(eager.residual, other.residual)
        if codec is not None:
            assert other.quantised is not None
            assert max(_ratios(want, codec, numerics, other.quantised)) <= 1


@pytest.mark.parametrize("name", [None, "token_fn"])
def test_compiled_equals_eager(name: str | None) -> None:
    _compiled("aot_eager", STANDARD[name] if name else None, (3, 48), *([] if name else [(5, 48), (4, 97)]))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's inductor needs g++, which is not installed")
def test_compiled_by_inductor_equals_eager() -> None:
    _compiled("inductor", None, (3, 48))
