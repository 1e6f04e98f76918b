"""What is declared about AITER's AllReduce + RMSNorm: standing, numerics of each path, quantisers.

Scope: the declaration against values read off the kernels. A pass does not prove that AITER keeps it.
"""

from __future__ import annotations

import re

import pytest

from accelerated.aiter_ops.allreduce_contract import OPERATORS, contract, support
from accelerated.contract import ContractError, Standing
from accelerated.operators import Family, RowProblem
from reference.codecs import Codec, PayloadRule, ScaleLayout, ScaleRule, ZeroScale
from reference.formats import E2M1, E4M3FN, E4M3FNUZ, Ties
from reference.norm_numerics import NormInput, NormNumerics, QuantisedFrom, SumOrder, WeightProduct

ROUNDED, UNROUNDED = NormInput.ROUNDED, NormInput.UNROUNDED
NORM_FIRST, WEIGHT_FIRST = WeightProduct.NORM_FIRST, WeightProduct.WEIGHT_FIRST
EVEN, TRUNCATE = Ties.EVEN, Ties.TRUNCATE


def problem(ranks: int = 8, hidden: int = 4096, capacity: int = 600, dtype: str = "bfloat16") -> RowProblem:
    return RowProblem(Family.ALLREDUCE_NORM, ranks, hidden, capacity, dtype)


def numerics(operator: str, rows: int, arch: str = "gfx942", **changes: object) -> NormNumerics:
    return contract(problem(**changes), operator, arch).numerics(rows)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("operator", "rows", "norm_input", "product", "residual_store"),
    [
        ("fused", 28, UNROUNDED, NORM_FIRST, None),
        ("fused", 29, UNROUNDED, WEIGHT_FIRST, None),
        ("fused_per_token", 16, UNROUNDED, NORM_FIRST, None),
        ("fused_per_token", 17, ROUNDED, NORM_FIRST, EVEN),
        ("fused_per_token", 65, ROUNDED, NORM_FIRST, EVEN),
        ("fused_per_token", 513, UNROUNDED, WEIGHT_FIRST, None),  # quantised by the HIP kernel after the split path
        ("fused_per_group", 16, UNROUNDED, NORM_FIRST, None),
        ("fused_per_group", 600, ROUNDED, NORM_FIRST, EVEN),
        ("fused_mxfp4", 15, ROUNDED, NORM_FIRST, None),
        ("fused_mxfp4", 16, ROUNDED, NORM_FIRST, EVEN),
        ("fused_mxfp4", 65, UNROUNDED, WEIGHT_FIRST, None),
        ("split", 9, UNROUNDED, NORM_FIRST, None),
    ],
)
def test_rounding_points(
    operator: str, rows: int, norm_input: NormInput, product: WeightProduct, residual_store: Ties | None
) -> None:
    declared = numerics(operator, rows)
    assert (declared.norm_input, declared.product, declared.residual_store) == (norm_input, product, residual_store)
    assert declared.round_reduced
    assert declared.may_flush
    assert declared.store is TRUNCATE
    elsewhere = numerics(operator, rows, "gfx950")
    assert (elsewhere.store, elsewhere.residual_store) == (EVEN, None)
    assert numerics(operator, rows, dtype="float16").store is EVEN


def test_order_of_ranks() -> None:
    assert {numerics("fused", rows).sum_order for rows in (1, 28, 29, 600)} == {SumOrder.RANK}
    assert [numerics("split", rows).sum_order for rows in (9, 10, 512, 513)] == [
        *(SumOrder.RANK, SumOrder.ROTATED, SumOrder.ROTATED, SumOrder.RANK)
    ]
    assert numerics("split", 513, "gfx950").sum_order is SumOrder.ROTATED
    assert numerics("split", 600, ranks=2).sum_order is SumOrder.RANK
    assert contract(problem(4), "split", "gfx942").ranks_identical
    assert not contract(problem(4), "split", "gfx1250").ranks_identical
    assert contract(problem(2), "split", "gfx1250").ranks_identical


def test_what_the_quantiser_sees() -> None:
    assert [numerics("fused_per_token", rows).quantised_from for rows in (512, 513)] == [
        *(QuantisedFrom.FLOAT32, QuantisedFrom.ROUNDED)
    ]


def test_codecs() -> None:
    def codec(operator: str, rows: int, arch: str = "gfx942", hidden: int = 4096) -> Codec:
        found = contract(problem(hidden=hidden), operator, arch).codec_at(rows)
        assert found is not None
        return found

    fused = codec("fused_per_token", 512)
    assert (fused.payload, fused.maximum, fused.zero_scale) == (E4M3FNUZ, 240, ZeroScale.ONE)
    assert (fused.scale_rule, fused.payload_rule) == (ScaleRule.DIVIDE, PayloadRule.DIVIDE)
    assert (codec("fused_per_token", 1, "gfx950").payload, codec("fused_per_token", 1, "gfx950").maximum) == (
        *(E4M3FN, 448),
    )
    fallback = codec("fused_per_token", 513)
    assert (fallback.scale_rule, fallback.zero_scale) == (ScaleRule.RECIPROCAL, ZeroScale.FORMULA)
    assert fallback.payload_rule is PayloadRule.APPROXIMATE_RECIPROCAL
    assert not fallback.zero_codes_defined
    for rows, hidden in ((1, 4096), (1, 8320)):
        assert codec("fused_per_group", rows, hidden=hidden).scale_layout is ScaleLayout.ROW_MAJOR
        assert codec("fused_per_group_transposed", rows, hidden=hidden).scale_layout is ScaleLayout.COLUMN_MAJOR
        assert codec("fused_per_group", rows, hidden=hidden).group == 128
    fp4, triton = codec("fused_mxfp4", 64), codec("fused_mxfp4", 65)
    assert (fp4.payload, fp4.ties, fp4.scale_layout) == (E2M1, Ties.AWAY, ScaleLayout.ROW_MAJOR)
    assert (triton.payload, triton.ties, triton.scale_layout) == (E2M1, Ties.EVEN, ScaleLayout.COLUMN_MAJOR)
    assert fp4.scale_rule is triton.scale_rule is ScaleRule.EVEN


def test_what_comes_back() -> None:
    for operator in OPERATORS:
        declared = contract(problem(), operator, "gfx942")
        assert declared.residual == (operator != "fused_no_residual")
        quantised = any(name in operator for name in ("per_token", "per_group", "mxfp4"))
        assert (declared.codec is not None) == quantised == (declared.codec_at(1) is not None)
        assert declared.element_output == (not quantised or operator.endswith("_emit"))
        assert not declared.takes_empty
    assert contract(problem(), "fused_gemma", "gfx942").numerics(1).gemma


@pytest.mark.parametrize(
    ("operator", "changes", "reason"),
    [
        ("fused", {"ranks": 6}, "world_size is 6; AITER has no fused kernel"),
        ("fused_per_token", {"ranks": 6}, "throws for FP8 per token"),
        ("split", {"ranks": 3}, "world_size is 3"),
        ("split", {"ranks": 1}, "world_size is 1"),
        ("fused", {"hidden": 4100}, "a multiple of 8 elements"),
        ("fused", {"hidden": 256}, r"32 packs, where 64 are the fewest .* capacity of at most 448"),
        ("fused", {"hidden": 12288, "dtype": "float32"}, "where 2048 are the most"),
        ("fused", {"hidden": 16384, "capacity": 2049}, "goes to RCCL"),
        ("fused_per_group", {"hidden": 4032}, "groups of 128"),
        ("fused_per_group", {"dtype": "float32"}, "have no such rows"),
        ("fused_per_token", {"dtype": "float32", "hidden": 7168}, "have no such rows"),
        ("fused_mxfp4", {"hidden": 16384}, "in the MXFP4 kernel, where 1024 are the most"),
        ("nothing", {}, "unknown allreduce_norm operator"),
    ],
)
def test_refusals(operator: str, changes: dict[str, object], reason: str) -> None:
    refused = problem(**changes)  # type: ignore[arg-type]
    found = support(refused, operator, "gfx942")
    assert found.standing is Standing.REFUSED
    assert re.search(reason, found.reason)
    with pytest.raises(ContractError, match=reason):
        contract(refused, operator, "gfx942")


def test_gfx1250_has_no_fused_kernel() -> None:
    for operator in OPERATORS:
        found = support(problem(4), operator, "gfx1250")
        assert (found.standing is Standing.REFUSED) == (operator != "split")
    assert "four at most" in support(problem(8), "split", "gfx1250").reason
    assert support(problem(8), "split", "gfx9999").standing is Standing.REFUSED


@pytest.mark.parametrize(
    ("operator", "changes", "reason"),
    [
        ("fused_per_group", {"hidden": 640}, "last warp"),
        ("fused", {"hidden": 520}, "reduced by nobody"),
        ("fused", {"hidden": 16392}, "does not test the fallback"),
        ("split", {"ranks": 6}, "2, 4 and 8 ranks"),
        ("fused_per_token", {"dtype": "float32", "capacity": 200}, "float16 and bfloat16"),
    ],
)
def test_doubtful_cells_are_unclaimed(operator: str, changes: dict[str, object], reason: str) -> None:
    found = support(problem(**changes), operator, "gfx942")  # type: ignore[arg-type]
    assert found.standing is Standing.UNCLAIMED
    assert reason in found.reason


def test_served_sizes_are_claimed() -> None:
    for operator in OPERATORS:
        for ranks in (2, 4, 8):
            for hidden in (4096, 7168):
                assert support(problem(ranks, hidden), operator, "gfx950").standing is Standing.CLAIMED
    assert support(problem(hidden=640, capacity=102), "fused_per_group", "gfx942").standing is Standing.CLAIMED
