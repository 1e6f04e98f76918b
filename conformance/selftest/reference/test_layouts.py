"""Packing and scale layouts against memory walked element by element, and against the swizzle written as a permutation.

Scope: reference/layouts.py. Expectations read flat storage with Python integers, or reshape and permute; the code under
test does index arithmetic. A pass proves nothing about what a library writes.
"""

from __future__ import annotations

import pytest
import torch

from reference.codecs import ScaleLayout
from reference.layouts import (
    lay_out_scales,
    logical_scales,
    pack_e2m1,
    swizzled_positions,
    swizzled_shape,
    unpack_e2m1,
)

SIZES = [(0, 4), (1, 1), (1, 7), (5, 1), (3, 2), (16, 8), (33, 9), (257, 12), (300, 20)]
POISON = 0xA5


def _logical(rows: int, groups: int) -> torch.Tensor:
    """Different in every place: a layout that swaps two of them shows."""
    return torch.arange(rows * groups, dtype=torch.float32).reshape(rows, groups)


def _storage(scales: torch.Tensor) -> list[float]:
    return scales.as_strided((scales.numel(),), (1,)).tolist()


def test_every_byte_unpacks_and_packs() -> None:
    packed = torch.arange(256, dtype=torch.uint8).reshape(4, 64)
    codes = unpack_e2m1(packed)
    assert codes.dtype == torch.int64
    assert codes.flatten().tolist() == [nibble for byte in range(256) for nibble in (byte % 16, byte // 16)]
    assert torch.equal(pack_e2m1(codes), packed)
    assert pack_e2m1(torch.tensor([0x1, 0x2, 0xF, 0x0])).tolist() == [0x21, 0x0F]
    assert unpack_e2m1(torch.empty(3, 0, dtype=torch.uint8)).shape == (3, 0)
    assert pack_e2m1(torch.empty(0, 6, dtype=torch.int64)).shape == (0, 3)


def test_what_does_not_pack_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 3\); two share a byte, so give an even last dimension$"):
        pack_e2m1(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"shape \(\); two share"):
        pack_e2m1(torch.tensor(1))
    with pytest.raises(ValueError, match=r"^codes lie in \[-1, 16\]; E2M1 codes lie in \[0, 15\]$"):
        pack_e2m1(torch.tensor([16, -1]))
    with pytest.raises(ValueError, match=r"^packed is torch.int64 of shape \(2,\); give a uint8 view"):
        unpack_e2m1(torch.zeros(2, dtype=torch.int64))


def test_swizzle_is_the_permutation_of_its_tiles() -> None:
    """The same map as a reshape and a permutation of the padded buffer, over more than one tile both ways."""
    rows, groups = 512, 24
    flat = torch.arange(rows * groups).reshape(rows, groups)
    tiles = flat.reshape(rows // 32, 2, 16, groups // 8, 2, 4).permute(0, 3, 5, 2, 4, 1)
    order = tiles.flatten()  # order[p] is the element at position p
    assert torch.equal(swizzled_positions(rows, groups).flatten(), torch.argsort(order))


def test_swizzle_by_bits() -> None:
    """A tile's position has 8 bits, each one bit of row or group: where single bits go says it all within a tile."""
    for bit, position in enumerate((4, 8, 16, 32, 1)):
        assert int(swizzled_positions(256, 8)[1 << bit, 0]) == position
    for bit, position in enumerate((64, 128, 2)):
        assert int(swizzled_positions(256, 8)[0, 1 << bit]) == position
    place = swizzled_positions(257, 17)
    assert (int(place[0, 8]), int(place[0, 16]), int(place[32, 0]), int(place[256, 0])) == (256, 512, 768, 8 * 768)


@pytest.mark.parametrize(("rows", "groups"), SIZES)
def test_swizzle_gives_every_scale_its_own_place(rows: int, groups: int) -> None:
    place = swizzled_positions(rows, groups).flatten()
    height, width = swizzled_shape(rows, groups)
    assert height % 256 == width % 8 == 0
    assert height - rows < 256
    assert width - groups < 8
    assert len(place.unique()) == rows * groups
    assert ((place >= 0) & (place < height * width)).all()


@pytest.mark.parametrize("layout", ScaleLayout)
@pytest.mark.parametrize(("rows", "groups"), SIZES)
def test_laid_out_scales_read_back(layout: ScaleLayout, rows: int, groups: int) -> None:
    logical = _logical(rows, groups)
    scales = lay_out_scales(logical, layout, padding=-1)
    assert torch.equal(logical_scales(scales, layout, rows, groups), logical)
    before = logical.clone()
    scales.fill_(7)
    assert torch.equal(logical, before), "the result shares memory with its source"


def test_memory_holds_what_the_layout_says() -> None:
    logical = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    by_rows, by_columns = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]
    expected = {
        ScaleLayout.ROW_MAJOR: (by_rows, (3, 1)),
        ScaleLayout.COLUMN_MAJOR: (by_columns, (1, 2)),
        ScaleLayout.TRANSPOSED_BYTES: (by_columns, (3, 1)),
    }
    for layout, (storage, strides) in expected.items():
        scales = lay_out_scales(logical, layout)
        assert (_storage(scales), scales.stride(), tuple(scales.shape)) == (storage, strides, (2, 3)), layout


def test_padding_is_what_it_was_told_to_be() -> None:
    logical = torch.full((300, 9), 3, dtype=torch.uint8)
    scales = lay_out_scales(logical, ScaleLayout.SWIZZLED, padding=POISON)
    assert scales.dtype == torch.uint8
    assert scales.shape == (512, 16)
    assert int((scales == 3).sum()) == 300 * 9
    assert int((scales == POISON).sum()) == 512 * 16 - 300 * 9
    assert (logical_scales(scales, ScaleLayout.SWIZZLED, 300, 9) == 3).all()


@pytest.mark.parametrize("layout", ScaleLayout)
def test_wrong_strides_are_refused(layout: ScaleLayout) -> None:
    """A tensor of the right shape and the other order: what a library returned for a promised transposed scale."""
    right = lay_out_scales(_logical(300, 20), layout)
    wrong = right.T.contiguous().T if right.stride(1) == 1 else right.contiguous()
    assert torch.equal(wrong, right)
    with pytest.raises(ValueError, match=rf"^scales have strides \(\d+, \d+\); layout {layout.name} of 300 x 20 prom"):
        logical_scales(wrong, layout, 300, 20)
    gapped = right.repeat_interleave(2, 1)[:, ::2]
    with pytest.raises(ValueError, match=r"^scales have strides"):
        logical_scales(gapped, layout, 300, 20)


@pytest.mark.parametrize("layout", ScaleLayout)
def test_wrong_shapes_are_refused(layout: ScaleLayout) -> None:
    right = lay_out_scales(_logical(300, 20), layout)
    for wrong in (right.T, right.flatten(), right[:299], right[None]):
        with pytest.raises(ValueError, match=rf"^scales have shape \(.*\); layout {layout.name} of 300 x 20 promises"):
            logical_scales(wrong, layout, 300, 20)
    with pytest.raises(ValueError, match=r"^logical has shape \(3,\); give \[rows, groups\]$"):
        lay_out_scales(torch.zeros(3), layout)


def test_strides_that_place_nothing_are_not_looked_at() -> None:
    assert logical_scales(torch.ones(1), ScaleLayout.ROW_MAJOR, 1, 1).shape == (1, 1)
    one_row = torch.arange(7.0).as_strided((1, 7), (99, 1))
    one_group = torch.arange(7.0).as_strided((7, 1), (1, 99))
    for layout in (ScaleLayout.ROW_MAJOR, ScaleLayout.COLUMN_MAJOR, ScaleLayout.TRANSPOSED_BYTES):
        assert logical_scales(one_row, layout, 1, 7)[0].tolist() == list(range(7))
        assert logical_scales(one_group, layout, 7, 1)[:, 0].tolist() == list(range(7))
