"""Weight and scale layouts of AITER's double, place by place.

Scope: AITER e4048607's aiter/ops/shuffle.py on gfx942 and gfx950, the mark, and what lies behind the end of scales that
are too short. A pass proves nothing about the kernels that read these layouts.
"""

from __future__ import annotations

import pytest
import torch

from accelerated.standin.aiter_ops import device, mx
from accelerated.standin.aiter_ops.ops import shuffle
from accelerated.standin.aiter_ops.utility import dtypes, fp4_utils

TYPES = [torch.bfloat16, torch.float8_e4m3fn, torch.float4_e2m1fn_x2]


def numbered(rows: int, columns: int, dtype: torch.dtype, experts: int = 2) -> torch.Tensor:
    """Every element another, as far as its bytes allow."""
    width = torch.empty((), dtype=dtype).element_size()
    count = experts * rows * columns * width
    raw = (torch.arange(count) * 2654435761 >> 7).to(torch.uint8)
    return raw.view(experts, rows, columns * width).view(dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_tile_holds_sixteen_bytes_of_sixteen_rows(dtype: torch.dtype) -> None:
    rows, columns = 48, 96
    weights = numbered(rows, columns, dtype)
    pack = 16 // weights.element_size()
    raw = weights.view(torch.uint8).view(2, rows, columns // pack, 16)
    found = shuffle.shuffle_weight(weights)
    assert (found.dtype, found.shape) == (dtype, weights.shape)
    packs = found.view(torch.uint8).view(2, -1, 16)
    for row in range(rows):
        for pack_ in range(columns // pack):
            place = row // 16 * (columns // pack) * 16 + pack_ * 16 + row % 16
            assert torch.equal(packs[:, place], raw[:, row, pack_])
    back = shuffle.unshuffled(found, interleaved=False)
    assert torch.equal(back.view(torch.uint8), weights.view(torch.uint8))


def test_gate_and_up_rows_alternate_in_sixteens() -> None:
    weights = numbered(64, 128, torch.float4_e2m1fn_x2)
    found = shuffle.shuffle_weight_a16w4(weights, 16, True)
    raw = weights.view(torch.uint8)
    order = torch.cat([torch.arange(16) + start for start in (0, 32, 16, 48)])
    plain = shuffle.shuffle_weight(raw[:, order].contiguous())
    assert torch.equal(found.view(torch.uint8), plain)
    back = shuffle.unshuffled(found.view(torch.uint8), interleaved=True)
    assert torch.equal(back, raw)
    apart = shuffle.shuffle_weight_a16w4(weights, 16, False).view(torch.uint8)
    assert torch.equal(apart, shuffle.shuffle_weight(raw)), "without gate and up the two layouts are one"


def test_the_mark_is_lost_with_the_tensor() -> None:
    weights = shuffle.shuffle_weight(numbered(32, 64, torch.bfloat16))
    assert vars(weights)["is_shuffled"] is True
    for other in (weights.clone(), weights.view(-1), weights[:1], torch.nn.Parameter(weights), *weights.chunk(2)):
        assert not hasattr(other, "is_shuffled")
    assert vars(shuffle.shuffle_weight_a16w4(numbered(32, 64, torch.float4_e2m1fn_x2), 16, False))["is_shuffled"]
    assert vars(shuffle.moe_shuffle_weight(numbered(32, 64, torch.bfloat16)))["is_shuffled"]


def test_sizes_that_do_not_fill_tiles() -> None:
    with pytest.raises(AssertionError, match="40 rows do not fill tiles of 16"):
        shuffle.shuffle_weight(numbered(40, 64, torch.bfloat16))
    with pytest.raises(AssertionError, match="rows of 48 elements do not fill tiles of 32"):
        shuffle.shuffle_weight(numbered(32, 48, torch.bfloat16))
    with pytest.raises(RuntimeError, match="do not fill shuffled tiles"):
        shuffle.unshuffled(numbered(48, 64, torch.bfloat16), interleaved=True)


def test_padding_of_rows() -> None:
    weights = numbered(32, 96, torch.bfloat16)
    found = shuffle.shuffle_weight(weights, pad_k_to=128)
    assert (vars(found)["aiter_original_k"], vars(found)["aiter_padded_k"]) == (96, 128)
    back = shuffle.unshuffled(found, interleaved=False)
    assert torch.equal(back[:, :, :96].contiguous().view(torch.uint8), weights.view(torch.uint8))
    assert back[:, :, 96:].eq(0).all()
    with pytest.raises(ValueError, match="pad_k_to is -1"):
        shuffle.shuffle_weight(weights, pad_k_to=-1)
    with pytest.raises(NotImplementedError, match="pads neither"):
        shuffle.shuffle_weight(weights, pad_k_to=128, is_guinterleave=True)
    with pytest.raises(NotImplementedError, match="no int4"):
        shuffle.shuffle_weight(weights, use_int4=True)


@pytest.mark.parametrize(("rows", "groups"), [(64, 4), (256, 8), (300, 12)])
def test_scales_are_padded_and_swizzled(rows: int, groups: int) -> None:
    scales = numbered(rows, groups, torch.float8_e8m0fnu, 1)[0]
    found = fp4_utils.e8m0_shuffle(scales)
    assert found.dtype == dtypes.fp8_e8m0
    assert found.shape == (-(-rows // 256) * 256, -(-groups // 8) * 8)
    flat = found.view(torch.uint8).view(-1)
    places = mx.swizzled_places(rows, groups, scales.device)
    assert torch.equal(flat[places], scales.view(torch.uint8))
    rest = torch.ones_like(flat, dtype=torch.bool)
    rest[places] = False
    assert flat[rest].eq(device.POISON).all(), "nobody writes the padding"
    if rows % 2 == 0:
        back = shuffle.unshuffled_scales(found, 2, rows // 2, groups, interleaved=False)
        assert torch.equal(back.view(rows, groups), scales.view(torch.uint8))


def test_scales_of_interleaved_weights() -> None:
    scales = numbered(128, 8, torch.float8_e8m0fnu, 1)[0]
    found = shuffle.shuffle_scale_a16w4(scales, 2, True).view(torch.uint8)
    raw = scales.view(torch.uint8).view(2, 64, 8)
    order = torch.cat([torch.arange(16) + start for start in (0, 32, 16, 48)])
    swapped = raw[:, order].reshape(128, 8).contiguous().view(torch.float8_e8m0fnu)
    assert torch.equal(found, shuffle.shuffle_scale_a16w4(swapped, 2, False).view(torch.uint8))
    assert torch.equal(shuffle.unshuffled_scales(found, 2, 64, 8, interleaved=True), raw)
    plain = shuffle.shuffle_scale(scales).view(torch.uint8)
    apart = shuffle.shuffle_scale_a16w4(scales, 2, False).view(torch.uint8)
    assert torch.equal(plain.view(-1)[: 128 * 8], apart.view(-1)), "the two layouts differ in padding only"
    narrow = shuffle.shuffle_scale_a16w4(scales[:, :4].contiguous(), 2, True).view(torch.uint8)
    assert narrow.shape == (128, 8)
    assert torch.equal(shuffle.unshuffled_scales(narrow, 2, 64, 4, interleaved=True), raw[:, :, :4])


def test_scales_that_are_too_short_end_in_whatever_memory_holds() -> None:
    plain = torch.zeros(64, 4, dtype=torch.uint8)
    found = shuffle.unshuffled_scales(plain, 2, 32, 4, interleaved=False)
    assert found.eq(0).any()
    assert found.eq(device.POISON).any()


def test_scales_that_are_left_alone_or_refused() -> None:
    scales = torch.ones(4, 4)
    assert shuffle.shuffle_scale(scales) is scales
    assert shuffle.moe_shuffle_scale(scales) is scales
    with pytest.raises(AssertionError, match="3 dimensions"):
        shuffle.shuffle_scale(torch.zeros(2, 32, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="experts_cnt"):
        shuffle.shuffle_scale(torch.zeros(64, 8, dtype=torch.uint8), is_guinterleave=True)
