"""AITER's declared standing and numerics, cell by cell. A pass does not prove that the library behaves so."""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys
from typing import Any

import pytest

from accelerated.aiter_ops.contract import NORMS, QUANTISERS, contract, support
from accelerated.contract import ContractError, Standing
from accelerated.operators import Family, NormContract, QuantContract, RowProblem
from conformance.selftest.suite.runs import ROOT
from reference.codecs import PayloadRule, ScaleLayout, ScaleRule, ZeroScale
from reference.formats import Ties
from reference.norm_numerics import NormInput, NormNumerics, WeightProduct

QUANT = RowProblem(Family.QUANTISE, 1, 4096, 64)
NORM = RowProblem(Family.NORM, 1, 4096, 64)


def quant(operator: str, arch: str = "gfx942", **sizes: Any) -> QuantContract:
    declared = contract(dataclasses.replace(QUANT, **sizes), operator, arch)
    assert isinstance(declared, QuantContract)
    return declared


def norm(operator: str, arch: str = "gfx942", **sizes: Any) -> NormContract:
    declared = contract(dataclasses.replace(NORM, **sizes), operator, arch)
    assert isinstance(declared, NormContract)
    return declared


def numerics(operator: str, arch: str = "gfx942", **sizes: Any) -> NormNumerics:
    return norm(operator, arch, **sizes).numerics(3)


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
@pytest.mark.parametrize("operator", [name for name in QUANTISERS if "fp4" not in name and name != "torch.per_tensor"])
def test_quantisers_are_claimed(operator: str, arch: str) -> None:
    assert support(QUANT, operator, arch).standing is Standing.CLAIMED


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
@pytest.mark.parametrize("operator", NORMS)
def test_norms_are_claimed(operator: str, arch: str) -> None:
    assert support(NORM, operator, arch).standing is Standing.CLAIMED


@pytest.mark.parametrize(
    ("operator", "arch", "sizes", "reason"),
    [
        ("hip.per_1x32_fp4", "gfx942", {}, "is built without fp4x2"),
        ("hip.per_1x32_fp4_shuffled", "gfx942", {}, "is built without fp4x2"),
        ("hip.per_token", "gfx950", {"dtype": "float32"}, "have no such rows"),
        ("hip.per_1x128", "gfx950", {"hidden": 192}, "groups of 128"),
        ("torch.per_1x128", "gfx950", {"hidden": 192}, "groups of 128"),
        ("hip.per_1x32_fp8", "gfx950", {"hidden": 48}, "groups of 32"),
        ("torch.per_1x32_fp4", "gfx950", {"hidden": 48}, "groups of 32"),
        ("hip.per_row", "gfx950", {}, "unknown quantise operator 'hip.per_row'; choose one of hip.per_tensor,"),
        ("hip.per_token", "gfx90a", {}, "unknown architecture 'gfx90a'"),
        ("rmsnorm", "gfx950", {}, "unknown quantise operator 'rmsnorm'"),
        (
            "rmsnorm_dynamicquant_1x128",
            "gfx950",
            {"family": Family.NORM, "hidden": 16384},
            "grouped scales end at 8192",
        ),
        (
            "rmsnorm_dynamicquant_1x128",
            "gfx950",
            {"family": Family.NORM, "hidden": 5120},
            "group_size not support: 128",
        ),
        ("rmsnorm_dynamicquant_1x128", "gfx950", {"family": Family.NORM, "hidden": 192}, "out of bounds"),
        ("rmsnorm_dynamicquant_1x128", "gfx950", {"family": Family.NORM, "dtype": "float32"}, "have no such rows"),
    ],
)
def test_refused_with_its_reason(operator: str, arch: str, sizes: dict[str, Any], reason: str) -> None:
    stand = support(dataclasses.replace(QUANT, **sizes), operator, arch)
    assert stand.standing is Standing.REFUSED
    assert reason in stand.reason


@pytest.mark.parametrize(
    ("problem", "operator", "arch"),
    [
        (QUANT, "torch.per_tensor", "gfx950"),
        (QUANT, "hip.per_token", "gfx1250"),
        (dataclasses.replace(QUANT, hidden=4100), "hip.per_token", "gfx950"),
        (dataclasses.replace(QUANT, hidden=8192, capacity=(1 << 19) + 1), "hip.per_token", "gfx950"),
        (dataclasses.replace(NORM, hidden=9001), "rmsnorm", "gfx950"),
    ],
)
def test_unclaimed_where_nobody_goes(problem: RowProblem, operator: str, arch: str) -> None:
    stand = support(problem, operator, arch)
    assert stand.standing is Standing.UNCLAIMED
    assert stand.reason


def test_odd_sizes_say_what_may_go_wrong() -> None:
    odd = dataclasses.replace(NORM, hidden=1027)
    assert "whole 4-byte words" in support(odd, "rmsnorm_add", "gfx950").reason
    assert support(odd, "rms_norm_cu", "gfx950").reason == "hidden is 1027; upstream tests multiples of 128"


def test_claimed_up_to_the_limits() -> None:
    largest = dataclasses.replace(QUANT, hidden=8192, capacity=1 << 19)
    assert support(largest, "hip.per_token", "gfx950").standing is Standing.CLAIMED
    beyond = dataclasses.replace(largest, capacity=1 << 20)
    assert support(beyond, "hip.per_1x128", "gfx950").standing is Standing.CLAIMED, "64-bit offsets"
    for hidden in (4096, 6272, 8192):
        problem = dataclasses.replace(NORM, hidden=hidden)
        assert support(problem, "rmsnorm_add_dynamicquant_1x128", "gfx950").standing is Standing.CLAIMED


@pytest.mark.parametrize(
    ("arch", "name", "maximum"), [("gfx942", "float8_e4m3fnuz", 240), ("gfx950", "float8_e4m3fn", 448)]
)
def test_the_architecture_decides_the_fp8_format(arch: str, name: str, maximum: float) -> None:
    for operator in ("hip.per_tensor_static", "hip.per_1x128_e8m0", "torch.per_token"):
        codec = quant(operator, arch).codec
        assert (codec.payload.name, codec.maximum) == (name, maximum)
    fused = norm("rmsnorm_dynamicquant", arch).codec
    assert fused is not None
    assert (fused.payload.name, fused.maximum) == (name, maximum)


@pytest.mark.parametrize("hidden", [32, 64, 128])
def test_short_rows_silently_take_the_group_kernel(hidden: int) -> None:
    short, longer = quant("hip.per_token", hidden=hidden).codec, quant("hip.per_token", hidden=hidden + 8).codec
    assert (short.amax_floor, short.payload_rule) == (1e-10, PayloadRule.RECIPROCAL)
    assert short.zero_codes_defined
    assert (longer.amax_floor, longer.payload_rule) == (0.0, PayloadRule.APPROXIMATE_RECIPROCAL)
    assert not longer.zero_codes_defined
    assert short.granularity is longer.granularity


def test_zero_policies_layouts_and_counts() -> None:
    assert quant("torch.per_token").codec.zero_scale is ZeroScale.ONE
    assert quant("torch.per_token").codec.scale_rule is ScaleRule.RECIPROCAL, "torch on a GPU"
    assert quant("hip.per_1x128_e8m0").codec.scale_rule is ScaleRule.UP
    layouts = {name: quant(name).codec.scale_layout for name in QUANTISERS if name.startswith("hip.per_1x")}
    assert layouts.pop("hip.per_1x128_transposed") is ScaleLayout.TRANSPOSED_BYTES
    assert layouts.pop("hip.per_1x32_fp4_shuffled") is ScaleLayout.SWIZZLED
    assert set(layouts.values()) == {ScaleLayout.ROW_MAJOR}
    assert not quant("hip.per_1x128_transposed").takes_num_rows, "its stride would be the device's count"
    assert [name for name in QUANTISERS if quant(name).takes_empty] == ["torch.per_token"]


@pytest.mark.parametrize(("arch", "dtype", "ties"), [
    ("gfx942", "bfloat16", Ties.TRUNCATE), ("gfx942", "float16", Ties.EVEN), ("gfx950", "bfloat16", Ties.EVEN),
])  # fmt: skip
def test_gfx942_truncates_to_bfloat16(arch: str, dtype: str, ties: Ties) -> None:
    for operator in NORMS:
        assert numerics(operator, arch, dtype=dtype).store is ties


def test_paths_of_the_norms() -> None:
    assert numerics("rmsnorm_add").norm_input is NormInput.UNROUNDED
    assert numerics("rmsnorm_add", hidden=8192).norm_input is NormInput.UNROUNDED
    assert numerics("rmsnorm_add", hidden=8200).norm_input is NormInput.EITHER, "longer than opus keeps"
    assert numerics("fused_add_rms_norm_cu", hidden=1025).norm_input is NormInput.EITHER, "one element per load"
    assert numerics("fused_add_rms_norm_cu", hidden=1032).norm_input is NormInput.UNROUNDED
    assert numerics("rmsnorm", hidden=16384).norm_input is NormInput.UNROUNDED, "nothing is rounded without a residual"
    assert numerics("rmsnorm_add_3d", hidden=8192).norm_input is NormInput.UNROUNDED
    assert numerics("rmsnorm_add_3d", hidden=256).square_additions == 14, "the other kernel, whatever the size"
    assert numerics("rmsnorm_add_t5").norm_input is NormInput.ROUNDED
    assert numerics("rmsnorm_t5").product is WeightProduct.ROUNDED_NORM
    assert numerics("rmsnorm_add", "gfx1250").product is WeightProduct.EITHER
    assert numerics("rmsnorm_add_gemma").gemma
    assert norm("rmsnorm_add", capacity=256).boundaries == ()
    assert norm("rmsnorm_add_t5", capacity=256).boundaries == (255,)
    assert norm("rmsnorm_add_t5", capacity=255).boundaries == ()
    assert [name for name in NORMS if norm(name).in_place] == ["fused_add_rms_norm_cu"]


@pytest.mark.parametrize(
    ("operator", "hidden", "additions"),
    [
        ("rmsnorm", 512, 8 + 6),
        ("rmsnorm", 513, 8 + 7),
        ("rmsnorm", 7168, 32 + 8),
        ("rms_norm_cu", 256, 8 + 6),
        ("rms_norm_cu", 8192, 4 * 8 + 8),
        ("rms_norm_cu", 16384, 8 * 8 + 8),
    ],
)
def test_additions_of_the_squares(operator: str, hidden: int, additions: int) -> None:
    assert numerics(operator, hidden=hidden).square_additions == additions


def test_opus_quantises_by_division() -> None:
    hip, opus = norm("rmsnorm_dynamicquant").codec, norm("rmsnorm_dynamicquant", hidden=8200).codec
    assert hip is not None
    assert opus is not None
    assert (hip.scale_rule, hip.amax_floor) == (ScaleRule.RECIPROCAL, 1e-10)
    assert (opus.scale_rule, opus.amax_floor, opus.zero_codes_defined) == (ScaleRule.DIVIDE, 0.0, True)


def test_contracts_travel_and_errors_name_the_family() -> None:
    declared = norm("rmsnorm_add")
    assert pickle.loads(pickle.dumps(declared)) == declared
    fused = RowProblem(Family.ALLREDUCE_NORM, 2, 4096, 64)
    with pytest.raises(ContractError, match="declared in accelerated"):
        contract(fused, "rmsnorm_add", "gfx942")


def test_the_driver_side_needs_neither_torch_nor_aiter() -> None:
    script = (
        "import sys\n"
        "from accelerated.registry import backend\n"
        "from accelerated.operators import Family, RowProblem\n"
        "for name in ('aiter', 'aiter-standin'):\n"
        "    made = backend(name, 'gfx950:sramecc+')\n"
        "    for family, names in made.operators.items():\n"
        "        width = 2 if family == 'allreduce_norm' else 1\n"
        "        problem = RowProblem(Family(family), width, 1024, 16)\n"
        "        for operator in names:\n"
        "            if made.support(problem, operator).standing.name != 'REFUSED':\n"
        "                made.contract(problem, operator)\n"
        "    made.preflight('cpu')\n"
        "print(sorted({'torch', 'aiter', 'numpy'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
