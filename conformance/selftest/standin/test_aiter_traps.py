"""Traps that AITER's double reproduces, and its conversions against torch's.

Scope: what callers must not rely on. A pass proves nothing about AITER's kernels.
"""

from __future__ import annotations

import pytest
import torch

from accelerated.standin.aiter_ops import device, mx
from accelerated.standin.aiter_ops.jit.utils import chip_info
from accelerated.standin.aiter_ops.ops import quant, rmsnorm
from accelerated.standin.aiter_ops.ops.enum import QuantType
from accelerated.standin.aiter_ops.utility import dtypes

M, N = 5, 384


@pytest.fixture(params=["gfx942", "gfx950"])
def fp8(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    monkeypatch.setenv(chip_info.ARCH_VARIABLE, request.param)
    return dtypes.get_dtype_fp8()


def rows() -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(M, N, generator=generator).bfloat16() * torch.arange(1, M + 1)[:, None]


def test_rows_from_the_count_on_stay_as_they_were(fp8: torch.dtype) -> None:
    x, count = rows(), torch.tensor([3], dtype=torch.int32)
    for kind in (QuantType.per_Token, QuantType.per_1x128):
        codes, scales = quant.get_hip_quant(kind)(x, quant_dtype=fp8, num_rows=count)
        whole, all_scales = quant.get_hip_quant(kind)(x, quant_dtype=fp8)
        assert torch.equal(codes.view(torch.uint8)[:3], whole.view(torch.uint8)[:3])
        assert torch.equal(scales[:3], all_scales[:3])
        assert (codes.view(torch.uint8)[3:] == device.POISON).all()
        assert scales[3:].isnan().all()
    codes, scales = quant.per_token_quant_hip(x, quant_dtype=fp8, num_rows=count, num_rows_factor=2)
    assert not scales.isnan().any(), "the factor multiplies the count"


def test_transposed_bytes_keep_the_shape_and_their_stride_is_the_devices_count(fp8: torch.dtype) -> None:
    x, count = rows(), torch.tensor([2], dtype=torch.int32)
    plain = quant.per_group_quant_hip(x, quant_dtype=fp8)[1]
    transposed = quant.per_group_quant_hip(x, quant_dtype=fp8, transpose_scale=True)[1]
    assert transposed.shape == plain.shape == (M, N // 128)
    assert transposed.stride() == plain.stride()
    assert torch.equal(transposed.view(N // 128, M).T, plain)
    counted = quant.per_group_quant_hip(x, quant_dtype=fp8, transpose_scale=True, num_rows=count)[1].view(-1)
    assert torch.equal(counted[: 2 * N // 128].view(N // 128, 2).T, plain[:2])
    assert counted[2 * N // 128 :].isnan().all()


def test_zero_rows_differ_by_path(fp8: torch.dtype) -> None:
    x = torch.zeros(2, N, dtype=torch.bfloat16)
    codes, scales = quant.per_token_quant_hip(x, quant_dtype=fp8)
    assert scales.eq(0).all()
    assert (codes.float() == -device.largest(fp8)).all(), "0 * inf, clamped"
    codes, scales = quant.per_group_quant_hip(x, quant_dtype=fp8)
    assert codes.float().eq(0).all()
    assert scales.eq(torch.tensor(1e-10) * torch.tensor(1 / device.largest(fp8))).all()
    codes, scales = quant.pertoken_quant(x, quant_dtype=fp8)
    assert codes.float().eq(0).all()
    assert scales.eq(1).all()
    codes, scales = quant.per_tensor_quant(x, quant_dtype=fp8)
    assert codes.float().isnan().all()
    short = quant.per_token_quant_hip(x[:, :128].contiguous(), quant_dtype=fp8)
    assert short[1].gt(0).all(), "rows of 128 take the group kernel"


def test_padding_of_the_swizzle_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(chip_info.ARCH_VARIABLE, "gfx950")
    plain = quant.per_1x32_mx_quant_hip(rows())[1].view(torch.uint8)
    shuffled = quant.per_1x32_mx_quant_hip(rows(), shuffle=True)[1].view(torch.uint8)
    assert shuffled.shape == (256, 16)
    places = mx.swizzled_places(M, N // 32, torch.device("cpu"))
    assert torch.equal(shuffled.view(-1)[places], plain)
    rest = torch.ones(256 * 16, dtype=torch.bool)
    rest[places] = False
    assert (shuffled.view(-1)[rest] == device.POISON).all()
    reference = quant.per_1x32_f4_quant(rows(), shuffle=True)[1].view(torch.uint8)
    assert torch.equal(reference.view(-1)[places], plain), "both use the same layout"


@pytest.mark.parametrize(
    ("mode", "exponents"), [(0, [-1, 0, 0, -1]), (1, [0, 0, 1, -1]), (2, [0, 0, 0, -1]), (3, [0, 0, 1, -1])]
)
def test_scale_modes_of_mxfp4(mode: int, exponents: list[int]) -> None:
    amax = torch.tensor([3.75, 4.0, 6.5, 2.0])
    assert (mx.scale_bytes(amax, mx.FP4, mode).int() - 127).tolist() == exponents
    assert mx.scale_bytes(torch.tensor([torch.inf, torch.nan, 0.0]), mx.FP4, mode).tolist() == [255, 255, 0]


def test_the_reciprocal_never_changes_a_power_of_two() -> None:
    for maximum, payload in (
        (6.0, mx.FP4),
        (448.0, mx.FP8[torch.float8_e4m3fn]),
        (240.0, mx.FP8[torch.float8_e4m3fnuz]),
    ):
        # Every float32 of two binades: the power of two depends on the position in one only.
        bits = torch.tensor(maximum / 2).view(torch.int32).item() + torch.arange(-(1 << 15), 1 << 15)
        amax = torch.cat((bits.int().view(torch.float32), (bits + (1 << 23)).int().view(torch.float32)))
        quotient = amax.double() / maximum
        wanted = torch.ceil(torch.log2(quotient.float().double())) + 127
        assert torch.equal(mx.scale_bytes(amax, payload).double(), wanted)


def test_codes_agree_with_torch_on_every_bfloat16(fp8: torch.dtype) -> None:
    value = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).float()
    value = value[value.isfinite()]
    largest = device.largest(fp8)
    assert largest == torch.finfo(fp8).max
    codes = value.clamp(-largest, largest).to(fp8).view(torch.uint8)
    assert torch.equal(device.fp8_codes(value, fp8), codes)


def test_fp4_codes_round_halves_to_even() -> None:
    value = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, -0.25, -5.0, 0.26, 4.99])
    assert device.fp4_bytes(value).tolist() == [0x20, 0x42, 0x64, 0x76, 0xE8, 0x61]


def test_norms_truncate_on_gfx942_only(fp8: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    x, residual = (torch.randn(64, 512, generator=generator).bfloat16() for _ in range(2))
    out, residual_out = torch.empty_like(x), torch.empty_like(x)
    weight = torch.ones(512, dtype=torch.bfloat16)
    rmsnorm.rmsnorm2d_fwd_with_add(out, x, residual, residual_out, weight, 1e-6)
    exact = x.float() + residual.float()
    shrunk = (residual_out.float().abs() <= exact.abs()).all()
    assert shrunk == (fp8 == torch.float8_e4m3fnuz)
    assert torch.equal(residual_out, exact.bfloat16()) == (fp8 == torch.float8_e4m3fn)


def test_another_architectures_fp8_has_no_number(fp8: torch.dtype) -> None:
    other = ({torch.float8_e4m3fn, torch.float8_e4m3fnuz} - {fp8}).pop()
    with pytest.raises(AssertionError, match="no kernel writes"):
        quant.per_token_quant_hip(rows(), quant_dtype=other)


def test_no_rows(fp8: torch.dtype) -> None:
    none = rows()[:0]
    assert quant.per_token_quant_hip(none, quant_dtype=fp8)[1].shape == (0, 1)
    assert quant.per_tensor_quant_hip(none, quant_dtype=fp8)[1].tolist() == [0.0]
    with pytest.raises(RuntimeError, match="reshape tensor of 0 elements"):
        quant.per_group_quant_hip(none, quant_dtype=fp8)
    assert rmsnorm.rms_norm(none, none.new_ones(N), 1e-6).shape == (0, N)


def test_nothing_synchronises_with_the_host(fp8: torch.dtype) -> None:
    # On the meta device there is nothing to read: any look at a value raises.
    x, count = rows().to("meta"), torch.empty(1, dtype=torch.int32, device="meta")
    for kind in (QuantType.per_Token, QuantType.per_1x128):
        codes, scales = quant.get_hip_quant(kind)(x, quant_dtype=fp8, num_rows=count)
        assert (codes.shape, scales.is_meta) == (x.shape, True)
    quant.per_1x32_mx_quant_hip(x, quant_dtype=fp8, scale_type=dtypes.fp8_e8m0, shuffle=True, num_rows=count)
    rmsnorm.rmsnorm2d_fwd_with_add(
        torch.empty_like(x), x, x.clone(), torch.empty_like(x), torch.ones(N, dtype=x.dtype, device="meta"), 1e-6
    )
