"""AITER's declared standing and numerics of its fused experts, cell by cell.

Scope: the numbers are written out from AITER e4048607. A pass does not prove that the library behaves so.
"""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys
from typing import Any

import pytest

from accelerated.aiter_ops import contract as row_contract
from accelerated.aiter_ops import experts_contract
from accelerated.aiter_ops.experts_contract import contract, support
from accelerated.aiter_ops.experts_numerics import OPERATORS, Choice, fake_column, key_columns, padded_rows
from accelerated.contract import ContractError, Standing
from accelerated.experts import ExpertProblem, Selection
from accelerated.operators import Family, QuantContract, RowProblem
from conformance.selftest.suite.runs import ROOT
from reference.codecs import Granularity
from reference.expert_numerics import Activation, SlotSum, WeightStage
from reference.formats import BFLOAT16, FLOAT16

BASE = ExpertProblem(shards=4, hidden=2048, intermediate=768, experts=64, top_k=4, capacity=4096)
STAGE1 = {"fused_moe.fp8_token_stage1": 1}
FP4 = ("fused_moe.mxfp4", "fused_moe.mxfp4_swiglu")


def problem(operator: str, **sizes: Any) -> ExpertProblem:
    return dataclasses.replace(BASE, **{"top_k": STAGE1.get(operator, BASE.top_k), **sizes})


def choice(operator: str, arch: str, **sizes: Any) -> Choice:
    found = contract(problem(operator, **sizes), operator, arch).numerics
    assert isinstance(found, Choice)
    return found


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_standing(operator: str, arch: str) -> None:
    found = support(problem(operator), operator, arch)
    if operator in FP4 and arch == "gfx942":
        assert found.standing is Standing.REFUSED
    elif operator == "fused_moe.mxfp4_swiglu":
        assert found.standing is Standing.UNCLAIMED
        assert support(problem(operator, shards=1), operator, arch).standing is Standing.CLAIMED
    else:
        assert (found.standing, found.reason) == (Standing.CLAIMED, "")


@pytest.mark.parametrize(
    ("operator", "arch", "sizes", "reason"),
    [
        ("fused_moe.bf16", "gfx1250", {}, "FP4 or FP8 on gfx1250"),
        ("fused_moe.bf16", "gfx90a", {}, "gfx90a"),
        ("fused_moe.fp4", "gfx950", {}, "unknown experts operator 'fused_moe.fp4'"),
        ("fused_moe.mxfp4", "gfx942", {}, "no FP4 matrix cores"),
        ("fused_moe.bf16", "gfx950", {"dtype": "float32"}, "bfloat16 or float16"),
        ("fused_moe.bf16", "gfx950", {"hidden": 2080}, "multiples of 64"),
        ("fused_moe.bf16", "gfx950", {"intermediate": 800}, "multiples of 64"),
        ("fused_moe.fp8_token", "gfx950", {"hidden": 2112}, "multiples of 128"),
        ("fused_moe.fp8_token", "gfx950", {"intermediate": 832}, "No suitable kernel found"),
        ("fused_moe.fp8_token", "gfx950", {"intermediate": 832, "dtype": "float16"}, "without a one-stage kernel"),
        ("fused_moe.fp8_block", "gfx950", {"hidden": 2176}, "multiples of 256"),
        ("fused_moe.fp8_block", "gfx950", {"intermediate": 832}, "multiples of 128"),
        ("fused_moe.mxfp4", "gfx950", {"hidden": 2872}, "multiples of 32"),
        ("fused_moe.mxfp4_swiglu", "gfx950", {"intermediate": 360}, "multiples of 32"),
        ("fused_moe.mxfp4_swiglu", "gfx950", {"dtype": "float16"}, "leaves the output zero"),
        ("fused_moe.fp8_token_stage1", "gfx950", {"top_k": 2}, "one expert per token"),
        ("fused_moe.fp8_token_stage1", "gfx950", {"shared": 1}, "one expert per token"),
        ("fused_moe.bf16", "gfx950", {"capacity": 1 << 24}, "into one word"),
        ("fused_moe.bf16", "gfx950", {"experts": 300, "top_k": 255}, "into one word"),
        ("fused_moe.bf16", "gfx950", {"experts": 3, "shards": 4, "top_k": 2}, "at least one expert"),
    ],
)
def test_refusals(operator: str, arch: str, sizes: dict[str, Any], reason: str) -> None:
    found = support(problem(operator, **sizes), operator, arch)
    assert found.standing is Standing.REFUSED
    assert reason in found.reason


@pytest.mark.parametrize(
    ("operator", "sizes", "reason"),
    [
        ("fused_moe.bf16", {"dtype": "float16"}, "float16"),
        ("fused_moe.bf16", {"hidden": 2112}, "multiples of 128"),
        ("fused_moe.fp8_token", {"hidden": 2176}, "multiples of 256"),
        ("fused_moe.fp8_token", {"intermediate": 576}, "intermediate of 128"),
        ("fused_moe.mxfp4", {"intermediate": 640}, "without FlyDSL"),
        ("fused_moe.mxfp4", {"hidden": 2880}, "padded to 3072 x 768"),
        ("fused_moe.mxfp4", {"intermediate": 2880}, "padded to 2048 x 2944"),
        ("fused_moe.mxfp4_swiglu", {}, "biases under a mask"),
    ],
)
def test_unclaimed(operator: str, sizes: dict[str, Any], reason: str) -> None:
    found = support(problem(operator, **sizes), operator, "gfx950")
    assert found.standing is Standing.UNCLAIMED
    assert reason in found.reason


def test_padded_rows() -> None:
    known = {0: 1, 1: 1, 2: 2, 3: 4, 16: 16, 17: 32, 32767: 32768, 32768: 32768, 131071: 32768, 131072: 131072}
    assert {rows: padded_rows(rows) for rows in known} == known
    assert padded_rows(1 << 20) == 131072


@pytest.mark.parametrize(
    ("operator", "arch", "sizes", "most_two_stage"),
    [
        ("fused_moe.fp8_token", "gfx942", {}, 16),
        ("fused_moe.fp8_token", "gfx950", {}, 16),
        ("fused_moe.fp8_token", "gfx950", {"intermediate": 576}, 0),  # 576 = 3 * 192
        ("fused_moe.fp8_token", "gfx950", {"dtype": "float16"}, None),
        ("fused_moe.fp8_token_stage1", "gfx942", {}, None),
        ("fused_moe.fp8_token_stage1", "gfx950", {}, 16),
        ("fused_moe.fp8_block", "gfx942", {}, 32),
        ("fused_moe.fp8_block", "gfx950", {}, 32),
        ("fused_moe.bf16", "gfx950", {}, None),
        ("fused_moe.bf16_gelu", "gfx942", {}, None),
        ("fused_moe.mxfp4", "gfx950", {}, None),
    ],
)
def test_stages(operator: str, arch: str, sizes: dict[str, Any], most_two_stage: int | None) -> None:
    found = choice(operator, arch, **sizes)
    for rows in (0, 1, 15, 16, 17, 31, 32, 33, 64, 255, 256, 257, 5000):
        fused = most_two_stage is not None and (rows > most_two_stage or most_two_stage == 0)
        assert found.one_stage(rows) is fused
    if most_two_stage:
        assert most_two_stage in contract(problem(operator, **sizes), operator, arch).boundaries


@pytest.mark.parametrize(
    ("operator", "arch", "inner", "parts"),
    [
        ("fused_moe.fp8_token", "gfx942", 768, 6),
        ("fused_moe.fp8_token", "gfx942", 128, 1),
        ("fused_moe.fp8_token", "gfx950", 576, 3),
        ("fused_moe.fp8_token", "gfx950", 448, 1),
        ("fused_moe.fp8_token_stage1", "gfx950", 256, 2),
        ("fused_moe.fp8_block", "gfx950", 768, 6),
        ("fused_moe.fp8_block", "gfx942", 256, 2),
    ],
)
def test_the_hull_of_one_stage_kernels(operator: str, arch: str, inner: int, parts: int) -> None:
    found = choice(operator, arch, intermediate=inner)(64)
    assert (found.inner_parts, found.intermediate_any_group, found.store_ulps) == (parts, True, 1.0)
    codec = found.intermediate_codec
    assert codec is not None
    assert codec.granularity is Granularity.TOKEN


def test_two_stages_round_the_intermediate_and_add_by_atomics() -> None:
    found = choice("fused_moe.fp8_token", "gfx950")(16)
    assert (found.intermediate_store, found.slot_sum, found.inner_parts) == (BFLOAT16, SlotSum.ATOMIC, 1)
    assert (found.store_ulps, found.intermediate_any_group, found.gemm1_partial) == (0.5, False, None)
    assert choice("fused_moe.bf16", "gfx950", dtype="float16")(1).intermediate_store is FLOAT16
    assert choice("fused_moe.bf16_gelu", "gfx950")(1).activation is Activation.GELU
    stage1 = choice("fused_moe.fp8_token_stage1", "gfx950")
    assert {stage1(rows).weight_stage for rows in (1, 64)} == {WeightStage.BEFORE_ACTIVATION}


@pytest.mark.parametrize(
    ("sizes", "rows", "parts"),
    [
        ({}, 4, 16),  # 4 * (4 - 1) columns of the key are not more than 16 local experts; 2048 / 128
        ({}, 5, 1),  # padded to 8: 24 are
        ({"shards": 1}, 16, 16),  # 16 * 4 routes, 64 experts, no mask
        ({"shards": 1}, 17, 1),
        ({"hidden": 256}, 1, 1),  # too short to split
    ],
)
def test_split_k_of_few_rows(sizes: dict[str, Any], rows: int, parts: int) -> None:
    found = choice("fused_moe.fp8_block", "gfx942", **sizes)(rows)
    assert (found.gemm1_parts, found.gemm1_partial) == (parts, FLOAT16 if parts > 1 else None)


def test_gpt_oss_has_bf16_rows_below_256() -> None:
    found = choice("fused_moe.mxfp4_swiglu", "gfx950")
    few, many = found(255), found(256)
    assert (few.input_codec, few.gemm1_store, few.gemm1_parts, few.late_bias) == (None, BFLOAT16, 2, True)
    assert few.store_ulps == 1.0
    assert (many.gemm1_store, many.late_bias, many.limit, many.store_ulps) == (None, False, 7.0, 0.5)
    assert many.input_codec is not None
    assert many.input_codec == many.intermediate_codec
    # 2880 is padded to twelve times 256.
    assert choice("fused_moe.mxfp4_swiglu", "gfx950", shards=1, hidden=2880, experts=128)(1).gemm1_parts == 12
    assert 255 in contract(problem("fused_moe.mxfp4_swiglu"), "fused_moe.mxfp4_swiglu", "gfx950").boundaries


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
@pytest.mark.parametrize(
    ("operator", "quantiser"),
    [
        ("fused_moe.fp8_token", "hip.per_token"),
        ("fused_moe.fp8_block", "hip.per_1x128"),
        ("fused_moe.mxfp4", "hip.per_1x32_fp4"),
        ("fused_moe.bf16", ""),
        ("fused_moe.mxfp4_swiglu", ""),
        ("fused_moe.fp8_token_stage1", ""),
    ],
)
def test_the_wire_is_the_quantiser_that_the_suite_judges_alone(operator: str, quantiser: str, arch: str) -> None:
    found = contract(problem(operator), operator, arch)
    if not quantiser:
        assert found.wire is None
        return
    sizes = RowProblem(Family.QUANTISE, 1, BASE.hidden, 8)
    declared = row_contract.contract(sizes, quantiser, arch)
    assert isinstance(declared, QuantContract)
    assert found.wire == declared.codec == found.numerics(1).input_codec


def test_rows_of_128_take_the_group_kernel() -> None:
    """``dynamic_per_token_scaled_quant`` sends them there: another floor, another reciprocal."""
    short, long = (choice("fused_moe.fp8_token", "gfx950", intermediate=size)(1) for size in (128, 256))
    assert short.intermediate_codec is not None
    assert long.intermediate_codec is not None
    assert short.intermediate_codec.amax_floor > 0 == long.intermediate_codec.amax_floor


@pytest.mark.parametrize("operator", OPERATORS)
def test_boundaries_are_where_the_kernels_change(operator: str) -> None:
    for capacity in (1, 16, 17, 33, 256, 4096):
        found = contract(problem(operator, capacity=capacity), operator, "gfx950").boundaries
        assert list(found) == sorted(set(found))
        assert all(0 < rows < capacity for rows in found)
    whole = contract(problem(operator), operator, "gfx950")
    changes = [rows for rows in range(300) if whole.numerics(rows) != whole.numerics(rows + 1)]
    assert set(changes) <= set(whole.boundaries)


def test_masks_and_promises() -> None:
    parallel = contract(BASE, "fused_moe.bf16", "gfx942")
    assert (parallel.selection, parallel.drops_masked, parallel.takes_remote) == (Selection.MASK, True, True)
    alone = contract(dataclasses.replace(BASE, shards=1), "fused_moe.bf16", "gfx942")
    assert (alone.drops_masked, alone.takes_remote) == (False, False)
    assert contract(dataclasses.replace(BASE, shards=1, shared=1), "fused_moe.bf16", "gfx942").drops_masked
    assert (parallel.deterministic, parallel.rows_alone) == (False, False)
    two = dataclasses.replace(BASE, top_k=2)
    assert contract(two, "fused_moe.bf16", "gfx942").deterministic
    assert not contract(two, "fused_moe.fp8_token", "gfx942").deterministic  # six parts of each
    assert not contract(problem("fused_moe.fp8_token_stage1"), "fused_moe.fp8_token_stage1", "gfx950").takes_num_rows


@pytest.mark.parametrize(
    ("operator", "sizes", "fake", "columns"),
    [
        ("fused_moe.bf16", {}, False, 3),
        ("fused_moe.bf16", {"shards": 1}, False, 4),
        ("fused_moe.bf16", {"top_k": 1}, True, 1),
        ("fused_moe.bf16", {"top_k": 1, "shards": 1}, False, 1),
        ("fused_moe.bf16", {"shared": 2}, True, 6),
        ("fused_moe.fp8_token_stage1", {}, False, 0),
    ],
)
def test_the_fake_column(operator: str, sizes: dict[str, Any], fake: bool, columns: int) -> None:
    found = problem(operator, **sizes)
    assert fake_column(found, OPERATORS[operator]) is fake
    assert key_columns(found, OPERATORS[operator]) == columns


def test_the_sort() -> None:
    assert experts_contract.sort_support(BASE, "moe_sorting", "gfx950").standing is Standing.CLAIMED
    assert experts_contract.sort_support(BASE, "moe_sorting", "gfx1250").standing is Standing.REFUSED
    wide = dataclasses.replace(BASE, dtype="float32")
    assert "float32" in experts_contract.sort_support(wide, "moe_sorting", "gfx950").reason
    assert experts_contract.sort_contract(BASE, "moe_sorting").masked
    with pytest.raises(ContractError, match="unknown sort"):
        experts_contract.sort_contract(BASE, "sorting")


def test_unknown_names_are_errors() -> None:
    with pytest.raises(ContractError, match="unknown experts operator"):
        contract(BASE, "fused_moe", "gfx942")
    with pytest.raises(ContractError, match="gfx000"):
        contract(BASE, "fused_moe.bf16", "gfx000")


def test_contracts_are_data_without_torch() -> None:
    script = (
        "import sys\n"
        "from accelerated.aiter_ops.experts_contract import contract\n"
        "from accelerated.experts import ExpertProblem\n"
        "found = contract(ExpertProblem(2, 256, 256, 8, 2, 64), 'fused_moe.fp8_block', 'gfx950')\n"
        "assert found.numerics(64).inner_parts == 2, found\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
    declared = contract(BASE, "fused_moe.fp8_block", "gfx950")
    assert pickle.loads(pickle.dumps(declared)) == declared
