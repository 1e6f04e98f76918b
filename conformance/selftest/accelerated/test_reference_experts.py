"""The specification's experts as operators: every result within both acceptances, the wire, the row count.

A pass does not prove anything about an accelerated library.
"""

from __future__ import annotations

import dataclasses
from typing import cast

import pytest
import torch

from accelerated.contract import ContractError, Standing
from accelerated.experts import ExpertContract, ExpertProblem
from accelerated.interface import RankContext
from accelerated.operators import Family
from accelerated.reference_backend import ReferenceBackend
from accelerated.reference_experts import FORMS, ReferenceExperts
from conformance.rank.expert_weights import weights_of
from conformance.rank.oracle_experts import expected_by_oracle
from reference.expert_numerics import SlotSum
from reference.expert_weights import ExpertWeights
from reference.experts import accepted
from reference.formats import BFLOAT16, FLOAT32
from reference.intervals import Interval

SIZES = ExpertProblem(shards=2, hidden=128, intermediate=128, experts=4, top_k=2, capacity=16)
OWNED = [2, 3]
WIRED = [name for name, form in FORMS.items() if form.wired]


def built(name: str, sizes: ExpertProblem = SIZES) -> tuple[ReferenceExperts, ExpertContract]:
    library = ReferenceBackend()
    declared = library.contract(sizes, name)
    assert isinstance(declared, ExpertContract)
    context = RankContext(0, 1, torch.device("cpu"), cast("torch.distributed.ProcessGroup", None), "gfx942")
    operation = library.open(context).build(sizes, name)
    assert isinstance(operation, ReferenceExperts)
    return operation, declared


def local(declared: ExpertContract, dtype: torch.dtype = torch.bfloat16) -> ExpertWeights:
    return weights_of(
        OWNED,
        hidden=SIZES.hidden,
        intermediate=SIZES.intermediate,
        codec=declared.weight_codec,
        dtype=dtype,
        biased=declared.biased,
        device=torch.device("cpu"),
    )


def inputs(dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([[2, 3], [3, 0], [-1, 2], [0, 1], [9, 3]], dtype=torch.int32)
    rows = torch.randn(5, SIZES.hidden, generator=generator).to(dtype)
    return rows, ids, torch.randn(5, 2, generator=generator)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", FORMS)
def test_results_are_legal(name: str, dtype: str) -> None:
    operation, declared = built(name, dataclasses.replace(SIZES, dtype=dtype))
    element = getattr(torch, dtype)
    weights = local(declared, element)
    operation.load(weights, OWNED)
    rows, ids, routing = inputs(element)
    found = operation.experts(rows, ids, routing)
    assert found.dtype == element
    assert not found[3].any()
    slot_of = torch.tensor([-1, -1, 0, 1])
    exact = Interval.exact(rows.double())
    for judge in (accepted, expected_by_oracle):
        legal = judge(exact, ids, routing, weights, slot_of, declared.numerics(5), element)
        assert float(legal.error_over_bound(found).max()) <= 1


@pytest.mark.parametrize("name", FORMS)
def test_rows_beyond_the_count_do_not_matter(name: str) -> None:
    operation, declared = built(name)
    operation.load(local(declared), OWNED)
    rows, ids, routing = inputs()
    wanted = operation.experts(rows, ids, routing)
    poison = torch.full((3, SIZES.hidden), torch.nan, dtype=rows.dtype)
    longer = operation.experts(
        torch.cat([rows, poison]),
        torch.cat([ids, torch.full((3, 2), 2, dtype=torch.int32)]),
        torch.cat([routing, torch.full((3, 2), torch.nan)]),
        num_rows=torch.tensor([5], dtype=torch.int32),
    )
    assert torch.equal(longer[:5], wanted)
    assert not longer[5:].any()


@pytest.mark.parametrize("name", WIRED)
def test_quantised_rows_are_what_the_experts_would_make(name: str) -> None:
    operation, declared = built(name)
    operation.load(local(declared), OWNED)
    rows, ids, routing = inputs()
    codes, scales = operation.quantise(rows)
    assert scales is not None
    assert codes.dtype == torch.uint8
    assert torch.equal(operation.experts(codes, ids, routing, scales=scales), operation.experts(rows, ids, routing))
    none, no_scales = operation.quantise(rows[:0])
    assert no_scales is not None
    assert (none.shape[0], no_scales.shape) == (0, (0, scales.shape[1]))


def test_what_is_declared() -> None:
    library = ReferenceBackend()
    assert library.operators[Family.EXPERTS.value] == tuple(FORMS)
    _, plain = built("experts.bf16")
    assert (plain.numerics(1).intermediate_store, plain.wire, plain.biased) == (BFLOAT16, None, False)
    _, stored = built("experts.stored_terms", dataclasses.replace(SIZES, dtype="float32"))
    assert (stored.numerics(1).gemm1_store, stored.numerics(1).slot_sum) == (FLOAT32, SlotSum.ROUNDED_TERMS)
    assert built("experts.swiglu_mxfp4")[1].biased
    refused = library.support(dataclasses.replace(SIZES, hidden=192), "experts.fp8_block")
    assert refused.standing is Standing.REFUSED
    assert "hidden is 192" in refused.reason
    assert library.support(SIZES, "experts.int4").standing is Standing.REFUSED
    with pytest.raises(ContractError, match="unknown experts operator"):
        library.contract(SIZES, "experts.int4")
    operation, _ = built("experts.bf16")
    with pytest.raises(RuntimeError, match="call load first"):
        operation.experts(*inputs())
