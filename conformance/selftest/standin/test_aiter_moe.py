"""Numerics of AITER's double of ``fused_moe``, bit for bit where the sums are exact.

Scope: each quantisation scheme on both architectures, and the row counts at which the kernels change. The expected
values round where AITER e4048607 does. A pass proves nothing about AITER's kernels.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from accelerated.standin.aiter_ops import experts_kernels, experts_plan, experts_weights, fused_moe
from accelerated.standin.aiter_ops.experts_weights import Weights
from accelerated.standin.aiter_ops.jit.utils import chip_info
from accelerated.standin.aiter_ops.ops import quant, shuffle
from accelerated.standin.aiter_ops.ops.enum import ActivationType, QuantType
from accelerated.standin.aiter_ops.ops.flydsl.moe_common import GateMode
from accelerated.standin.aiter_ops.utility import dtypes
from conformance.selftest.standin.moe_inputs import E, H, bf16, codes, fp8, layer, mxfp4, silu

LIMIT = 7.0


@pytest.fixture(params=["gfx942", "gfx950"])
def arch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(chip_info.ARCH_VARIABLE, request.param)
    return str(request.param)


@pytest.fixture
def gfx950(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(chip_info.ARCH_VARIABLE, "gfx950")


def per_token(inner: torch.Tensor, group: int) -> torch.Tensor:
    """FP8 and back, by torch's own conversion."""
    kind = dtypes.get_dtype_fp8()
    largest = torch.finfo(kind).max
    blocks = inner.view(len(inner), -1, group)
    scale = blocks.abs().amax(2, keepdim=True) * torch.tensor(1 / largest)
    coded = (blocks * (1 / scale)).clamp(-largest, largest).to(kind)
    return (coded.float() * scale).view(inner.shape)


def per_32(inner: torch.Tensor) -> torch.Tensor:
    """MXFP4 and back, by AITER's torch reference."""
    packed, scales = quant.per_1x32_f4_quant(inner)
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    pairs = packed.view(torch.uint8).long()
    values = torch.stack((table[pairs & 15], table[pairs >> 4]), 2).view(len(inner), -1, 32)
    return (values * torch.exp2(scales.view(torch.uint8).float() - 127)[:, :, None]).flatten(1)


def swiglu(product: torch.Tensor) -> torch.Tensor:
    gate, up = product.chunk(2, 1)
    gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


@pytest.mark.parametrize("rows", [1, 33])
def test_bf16_rounds_the_intermediate(rows: int) -> None:
    case = layer(rows)
    assert torch.equal(bf16(case), case.expected(lambda y, _: silu(y).bfloat16().float()))


def test_bf16_gelu_is_by_erf() -> None:
    case = layer(5)

    def gelu(product: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        gate, up = product.chunk(2, 1)
        return (torch.nn.functional.gelu(gate) * up).bfloat16().float()

    assert torch.equal(bf16(case, activation=ActivationType.Gelu), case.expected(gelu))


def test_the_weight_before_the_activation(arch: str) -> None:
    case = layer(5, 1)
    found = bf16(case, doweight_stage1=True)
    assert torch.equal(found, case.expected(lambda y, _: silu(y).bfloat16().float(), early=True))
    found = fp8(case, QuantType.per_Token, doweight_stage1=True)
    two_stage = case.expected(lambda y, _: per_token(silu(y).bfloat16().float(), 128), early=True)
    assert torch.equal(found, two_stage)


@pytest.mark.parametrize(
    ("kind", "last"), [(QuantType.per_Token, 16), (QuantType.per_128x128, 32)], ids=["token", "block"]
)
def test_fp8_requantises_the_rounded_intermediate_in_two_stages_only(arch: str, kind: object, last: int) -> None:
    for rows in (last, last + 1):
        case = layer(rows)
        two_stages = case.expected(lambda y, _: per_token(silu(y).bfloat16().float(), 128))
        one_stage = case.expected(lambda y, _: per_token(silu(y), 128))
        assert not torch.equal(two_stages, one_stage)
        assert torch.equal(fp8(case, kind), two_stages if rows == last else one_stage)


def test_a_one_stage_kernel_adds_each_tile(arch: str) -> None:
    # W2 takes one column of the first tile and one of the third: two terms for each route, each rounded.
    case = layer(20, 1, inner=512)
    case.w2[:] = torch.where(torch.arange(512) % 256 == 0, 1.0, 0.0)
    product = torch.einsum("mh,mnh->mn", case.rows, case.w1[case.ids[:, 0].long()])
    shares = (per_token(silu(product), 128) * case.weights).bfloat16()
    assert torch.equal(fp8(case, QuantType.per_Token), (shares[:, :1] + shares[:, 256:257]).expand(20, H))


def test_tiles_are_chosen_by_rounds_over_the_units() -> None:
    found = [
        experts_plan.choose(call(rows, inner=inner, k=1, experts=1), dtypes.get_dtype_fp8(), None).tile
        for rows, inner in ((20, 512), (32 * 304, 512), (32 * 304, 768), (20, 640))
    ]
    assert found == [128, 512, 384, 128], "the fewest rounds, then the fewest idle units"
    with pytest.raises(RuntimeError, match="a multiple of none"):
        experts_plan.choose(call(20, inner=96), dtypes.get_dtype_fp8(), None)


@pytest.mark.parametrize("scheme", ["token", "block", "mxfp4"])
def test_each_scale_belongs_to_its_weights(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    monkeypatch.setenv(chip_info.ARCH_VARIABLE, "gfx950")
    case, generator = layer(6), torch.Generator().manual_seed(9)
    tile = {"token": (1, H), "block": (128, 128), "mxfp4": (1, 32)}[scheme]
    scales = []
    for name in ("w1", "w2"):
        matrix = getattr(case, name)
        rows, columns = tile[0], min(tile[1], matrix.shape[2])
        shape = (E, matrix.shape[1] // rows, matrix.shape[2] // columns)
        scales.append(torch.exp2(-torch.randint(0, 3, shape, generator=generator)))
        setattr(case, name, matrix * scales[-1].repeat_interleave(rows, 1).repeat_interleave(columns, 2))
    if scheme == "mxfp4":
        rounded = dataclasses.replace(case, rows=per_32(case.rows))
        assert torch.equal(mxfp4(case), rounded.expected(lambda y, _: per_32(silu(y).bfloat16().float())))
        return
    kind = QuantType.per_Token if scheme == "token" else QuantType.per_128x128
    found = fp8(case, kind, w1_scale=scales[0] / 32, w2_scale=scales[1])
    assert torch.equal(found, case.expected(lambda y, _: per_token(silu(y).bfloat16().float(), 128)))


def test_rows_are_quantised_once_where_they_come_unquantised(arch: str) -> None:
    case = layer(3)
    rows = torch.randn(3, H, generator=torch.Generator().manual_seed(4)).bfloat16()
    for kind, grouped in ((QuantType.per_Token, QuantType.per_Token), (QuantType.per_128x128, QuantType.per_1x128)):
        given, scales = quant.get_hip_quant(grouped)(rows, quant_dtype=dtypes.get_dtype_fp8())
        found = fp8(case, kind, rows=rows)
        assert torch.equal(found, fp8(case, kind, rows=given, a1_scale=scales))
        assert not torch.equal(found, fp8(case, kind, rows=given, a1_scale=2 * scales))


@pytest.mark.usefixtures("gfx950")
def test_mxfp4_requantises_rows_and_intermediate() -> None:
    case = layer(6)
    rounded = layer(6)
    rounded.rows = per_32(case.rows)
    wanted = rounded.expected(lambda y, _: per_32(silu(y).bfloat16().float()))
    assert torch.equal(mxfp4(case), wanted)
    assert torch.equal(mxfp4(case, shuffled=False), wanted), "neither marked nor shuffled: CK reads them as they lie"
    given, scale = quant.per_1x32_mx_quant_hip(case.rows.bfloat16())
    assert torch.equal(mxfp4(case, rows=given, a1_scale=scale), wanted)


@pytest.mark.parametrize("gate_mode", ["separated", "interleave"])
def test_swiglu_has_bf16_rows_below_256(arch: str, gate_mode: str) -> None:
    case = layer(255)
    generator = torch.Generator().manual_seed(1)
    bias1, bias2 = (torch.randint(-8, 9, (E, n), generator=generator) / 8.0 for n in (2 * 128, H))

    def inner(product: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
        # Cut along H, the product is stored before the bias and the activation.
        stored = product.bfloat16().float() if gate_mode == "separated" else product
        return swiglu(stored + bias1[expert]).bfloat16().float()

    found = mxfp4(case, activation=ActivationType.Swiglu, gate_mode=gate_mode, bias1=bias1, bias2=bias2)
    assert torch.equal(found, case.expected(inner, bias2))


@pytest.mark.usefixtures("gfx950")
def test_swiglu_has_fp4_rows_from_256_on() -> None:
    case = layer(256)
    rounded = layer(256)
    rounded.rows = per_32(case.rows)
    bias = torch.arange(E * 256).view(E, 256) / 512
    wanted = rounded.expected(lambda y, e: per_32(swiglu(y + bias[e]).bfloat16().float()))
    assert torch.equal(mxfp4(case, activation=ActivationType.Swiglu, bias1=bias), wanted)


def test_products_are_cut_by_k_tiles_of_256() -> None:
    call_ = call(8, hidden=1024, weights=dtypes.fp4x2, quant=QuantType.per_1x32, activation=ActivationType.Swiglu)
    plan = experts_plan.choose(call_, dtypes.bf16, None)
    assert (plan.cuts, plan.cut_type, plan.cut_sum) == (2, torch.bfloat16, torch.bfloat16)


def test_the_parts_of_a_cut_product_are_rounded() -> None:
    # H = 768: one part has two tiles of 256, the other the third.
    row = torch.zeros(1, 1, 768)
    for columns, values, kinds, wanted in (
        ((511, 512), (257.0, 1.0), (torch.bfloat16, torch.bfloat16), 256.0),
        ((510, 511), (257.0, 1.0), (torch.bfloat16, torch.bfloat16), 258.0),
        ((511, 512), (2049.0, 1.0), (torch.float16, torch.float32), 2049.0),
        ((510, 511), (2049.0, 1.0), (torch.float16, torch.float32), 2050.0),
    ):
        first, second = torch.zeros(1, 32, 768), torch.zeros(1, 768, 16)
        first[0, :, columns[0]], first[0, :, columns[1]] = values
        plan = experts_plan.Plan("cut", reads_shuffled=(False, False), cuts=2, cut_type=kinds[0], cut_sum=kinds[1])
        weights = Weights(first, second, None, None, None, None, QuantType.No, plan, True)
        assert weights.times_w1(row + 1, torch.tensor([0])).unique().tolist() == [wanted]


def call(rows: int, **changes: object) -> experts_plan.Call:
    """A call without quantisation, but for the changes."""
    values: dict[str, object] = {
        **{"rows": rows, "k": 2, "hidden": H, "inner": 128, "local": E, "experts": E, "masked": False},
        **{"dtype": torch.bfloat16, "weights": dtypes.get_dtype_fp8(), "activation": ActivationType.Silu},
        **{"quant": QuantType.per_Token, "stage1": False, "gate": GateMode.SEPARATED, "shuffled": (True, True)},
    }
    return experts_plan.Call(**{**values, **changes})  # type: ignore[arg-type]


def test_few_rows_cut_h_for_block_scales(arch: str) -> None:
    fp8_type = dtypes.get_dtype_fp8()
    few = call(2, hidden=4096, local=64, experts=64, quant=QuantType.per_1x128)
    plan = experts_plan.choose(few, fp8_type, None)
    assert (plan.cuts, plan.cut_type, plan.cut_sum) == (16, torch.float16, torch.float32)
    many = call(32, hidden=4096, quant=QuantType.per_1x128)
    assert experts_plan.choose(many, fp8_type, None).cuts == 1, "64 slots for 4 experts"


@pytest.mark.parametrize(
    ("arch_name", "changes", "rows", "name"),
    [
        ("gfx942", {"stage1": True}, 64, "ck_2stages"),
        ("gfx950", {"stage1": True}, 64, "asm"),
        ("gfx942", {"quant": QuantType.per_1x128, "activation": ActivationType.Gelu}, 64, "ck_2stages"),
        ("gfx950", {"quant": QuantType.per_1x128, "activation": ActivationType.Gelu}, 64, "asm"),
        ("gfx950", {"inner": 192}, 1, "asm"),
        ("gfx950", {"dtype": torch.float16}, 64, "ck_2stages"),
    ],
)
def test_choice_by_architecture(
    monkeypatch: pytest.MonkeyPatch, arch_name: str, changes: dict[str, object], rows: int, name: str
) -> None:
    monkeypatch.setenv(chip_info.ARCH_VARIABLE, arch_name)
    assert experts_plan.choose(call(rows, **changes), dtypes.get_dtype_fp8(), None).name == name


def test_padded_rows() -> None:
    pairs = [(0, 1), (1, 1), (16, 16), (17, 32), (32767, 32768), (40000, 32768), (131072, 131072), (999999, 131072)]
    assert [fused_moe.get_padded_M(m) for m, _ in pairs] == [padded for _, padded in pairs]


@pytest.mark.usefixtures("gfx950")
def test_the_two_ways_to_compute_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    case = layer(40, 3)
    mask = torch.tensor([1, 0, 1, 1, 0], dtype=torch.int32)
    chosen = [0, 2, 3]
    case.w1, case.w2 = case.w1[chosen], case.w2[chosen]
    monkeypatch.setattr(experts_kernels, "atomic_sum", experts_kernels.reduced_sum)
    apart = bf16(case, expert_mask=mask)
    monkeypatch.setattr(experts_kernels, "_HELD", 1 << 17)
    assert torch.equal(bf16(case, expert_mask=mask), apart), "one expert at a time"

    def terms(
        rows: torch.Tensor, found: experts_kernels.Routes, weights: Weights, stage: experts_kernels.Stage, _: object
    ) -> torch.Tensor:
        result = torch.zeros(40, 3, 1, H, dtype=torch.bfloat16)
        experts_kernels._all(result, rows, found, weights, stage)
        return result.flatten(1, 2)

    monkeypatch.setattr(experts_kernels, "terms", terms)
    assert torch.equal(bf16(case, expert_mask=mask), apart), "every row at every expert"


def test_experts_are_computed_together_within_bounds() -> None:
    half = experts_kernels._HELD // 2
    assert list(experts_kernels._groups([5, 0, 5, 1], half)) == [[0, 2], [3]]
    assert list(experts_kernels._groups([5, 0, 5, 1], 4 * half)) == [[0], [2], [3]]
    assert list(experts_kernels._groups([1, 900, 1, 1], 1)) == [[1, 0], [2, 3]]
    assert list(experts_kernels._groups([0, 0], 1)) == []


def test_reduction_is_in_float32() -> None:
    parts = torch.tensor([[[256.0], [1.0], [1.0]]]).bfloat16()
    assert experts_kernels.reduced_sum(parts).item() == 258
    assert {experts_kernels.atomic_sum(parts).item() for _ in range(64)} == {256, 258}
    assert not math.isnan(experts_kernels.atomic_sum(parts[:0]).sum().item())


def test_weights_that_are_written_to_are_decoded_again() -> None:
    case, rows = layer(6), torch.ones(6, 1)
    scales = [torch.ones(E, 256, 1), torch.ones(E, 256, 1)]
    matrices = [shuffle.shuffle_weight(codes(each)) for each in (case.w1 * 32, case.w2)]

    def result() -> torch.Tensor:
        return fused_moe.fused_moe(
            codes(case.rows),
            matrices[0],
            matrices[1],
            case.weights,
            case.ids,
            quant_type=QuantType.per_Token,
            w1_scale=scales[0],
            w2_scale=scales[1],
            a1_scale=rows,
            dtype=torch.bfloat16,
        )

    before = result()
    assert torch.equal(result(), before)
    matrices[0].view(torch.uint8).zero_()
    assert result().eq(0).all(), "written to through a view"
    matrices[0] = shuffle.shuffle_weight(codes(case.w1 * 32))
    assert torch.equal(result(), before)
    scales[0].mul_(2)
    assert not torch.equal(result(), before)
    scales[0] = torch.ones(E, 256, 1)
    assert torch.equal(result(), before)
    alive, scales[0] = scales[0], torch.full((E, 256, 1), 2.0)
    assert not torch.equal(result(), before), "other scales, written to as often"
    assert alive.eq(1).all()
    kept = len(experts_weights._DECODED)
    matrices[0] = torch.zeros(0)
    assert len(experts_weights._DECODED) == kept - 1, "what nobody holds is forgotten"
    scales[0] = torch.ones(E, 256, 1)
    with torch.inference_mode():
        matrices[0] = shuffle.shuffle_weight(codes(case.w1 * 32))
        assert torch.equal(result(), before)
        matrices[0].view(torch.uint8).zero_()
        assert result().eq(0).all(), "writes are not counted here"
