"""Layouts of expert weights: positions by hand, inverses, against AITER's view and permutation written out.

Scope: every element is moved by name, so a swapped axis shows. A pass proves nothing about a kernel that reads them.
"""

from __future__ import annotations

import pytest
import torch

from reference.weight_layouts import interleave, pack, separate, shuffle, shuffled_positions, unpack, unshuffle

_KINDS = (torch.bfloat16, torch.float16, torch.int16, torch.uint8, torch.float8_e4m3fn, torch.float8_e4m3fnuz)


def _numbered(shape: tuple[int, ...], kind: torch.dtype) -> torch.Tensor:
    """Distinct bits, as far as the element has bits."""
    count = torch.arange(torch.Size(shape).numel()).reshape(shape)
    bits = torch.int16 if kind.itemsize == 2 else torch.uint8
    return (count % (1 << (8 * kind.itemsize - 1))).to(bits).view(kind)


def _bits(weights: torch.Tensor) -> torch.Tensor:
    return weights.view(torch.int16 if weights.element_size() == 2 else torch.uint8)


@pytest.mark.parametrize(
    ("size", "place", "position"),
    [
        (2, (0, 7), 7),
        (2, (1, 0), 8),
        (2, (15, 7), 127),
        (2, (0, 8), 128),
        (2, (0, 32), 512),
        (2, (16, 0), 1024),
        (1, (0, 15), 15),
        (1, (1, 0), 16),
        (1, (0, 16), 256),
        (1, (3, 21), 256 + 3 * 16 + 5),
        (1, (31, 63), 2047),
    ],
)
def test_positions_by_hand(size: int, place: tuple[int, int], position: int) -> None:
    assert int(shuffled_positions(32, 64, size)[place]) == position


@pytest.mark.parametrize("kind", _KINDS, ids=str)
@pytest.mark.parametrize("shape", [(16, 32), (48, 96), (3, 32, 64), (2, 2, 16, 64), (0, 16, 32)])
def test_shuffle_is_upstreams_view_and_has_an_inverse(kind: torch.dtype, shape: tuple[int, ...]) -> None:
    weights = _numbered(shape, kind)
    kept = _bits(weights).clone()
    rows, columns, piece = shape[-2], shape[-1], 16 // kind.itemsize
    tiles = _bits(weights).view(-1, rows // 16, 16, columns // 32, 32 // piece, piece) if weights.numel() else None
    moved = shuffle(weights)
    assert moved.dtype == kind
    assert moved.shape == weights.shape
    if tiles is not None:
        assert torch.equal(_bits(moved), tiles.permute(0, 1, 3, 4, 2, 5).reshape(shape))
        assert not torch.equal(_bits(moved), kept)
    assert torch.equal(_bits(unshuffle(moved)), kept)
    assert torch.equal(_bits(shuffle(unshuffle(weights))), kept)
    assert torch.equal(_bits(weights), kept)


def test_shuffle_takes_a_view() -> None:
    weights = _numbered((64, 32), torch.bfloat16)
    assert torch.equal(shuffle(weights.T), shuffle(weights.T.contiguous()))


@pytest.mark.parametrize("tail", [(), (32,), (4, 3)])
def test_interleaving(tail: tuple[int, ...]) -> None:
    separated = torch.arange(2 * 6 * torch.Size(tail).numel()).reshape(2, 6, *tail)
    mixed = interleave(separated)
    for row in range(3):
        assert torch.equal(mixed[:, 2 * row], separated[:, row])
        assert torch.equal(mixed[:, 2 * row + 1], separated[:, 3 + row])
    assert torch.equal(separate(mixed), separated)
    assert torch.equal(interleave(separate(separated)), separated)
    assert mixed.is_contiguous()
    assert mixed.data_ptr() != separated.data_ptr()


def test_packed_fp4_is_shuffled_as_bytes() -> None:
    codes = torch.randint(0, 16, (2, 32, 128), generator=torch.Generator().manual_seed(1))
    packed = pack(codes)
    assert packed.shape == (2, 32, 64)
    assert int(packed[0, 0, 0]) == int(codes[0, 0, 0]) + 16 * int(codes[0, 0, 1])
    assert torch.equal(unpack(unshuffle(shuffle(packed))), codes)


@pytest.mark.parametrize(
    ("weights", "text"),
    [
        (torch.zeros(8, 32, dtype=torch.bfloat16), "does not fill tiles"),
        (torch.zeros(16, 48, dtype=torch.bfloat16), "does not fill tiles"),
        (torch.zeros(16, 32), "4 bytes"),
        (torch.zeros(32, dtype=torch.bfloat16), "[..., N, K]"),
    ],
)
def test_refusals(weights: torch.Tensor, text: str) -> None:
    for move in (shuffle, unshuffle):
        with pytest.raises(ValueError) as caught:
            move(weights)
        assert text in str(caught.value)


@pytest.mark.parametrize("rows", [torch.zeros(3), torch.zeros(2, 3, 4), torch.zeros(2, 0, 4)])
def test_rows_that_are_no_pairs(rows: torch.Tensor) -> None:
    for move in (interleave, separate):
        with pytest.raises(ValueError, match="no gate and up rows"):
            move(rows)
