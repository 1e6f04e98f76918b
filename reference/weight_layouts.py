"""Where the weights of experts lie in memory: AITER's (16, 16) shuffle, interleaved gate and up rows, packed FP4.

Scope: pure permutations of elements, each with its inverse; the values are :mod:`reference.expert_weights`' and the
scales' own layouts are :mod:`reference.layouts`'. Source: AITER e4048607 aiter/ops/shuffle.py, ``shuffle_weight`` with
layout (16, 16) and ``interleave_gate_up_rows``. What a pass does not prove: that a kernel reads a layout as AITER
writes it, or anything about the mark ``is_shuffled``, which is an attribute and no part of the bytes.
"""

from __future__ import annotations

import torch

from reference.layouts import pack_e2m1, unpack_e2m1

#: Rows and elements of one tile.
TILE_ROWS, TILE_COLUMNS = 16, 32
#: Bytes that one lane reads at a time.
PIECE_BYTES = 16


def shuffled_positions(rows: int, columns: int, element_bytes: int) -> torch.Tensor:
    """Flat position of element [row, column] in the shuffled matrix, int64 ``[rows, columns]``.

    Tiles of 16 rows by 32 elements follow each other along the columns, then along the rows. In a tile, from slowest to
    fastest: the piece of 16 bytes within its row, the row, the element within its piece.

    Args:
        rows: N, a multiple of 16.
        columns: K in stored elements (bytes of packed FP4), a multiple of 32.
        element_bytes: 1 or 2.

    Raises:
        ValueError: a size that does not fill tiles, or another element size.
    """
    if element_bytes not in (1, 2):
        raise ValueError(f"elements have {element_bytes} bytes; shuffled weights have 1 or 2")
    if rows % TILE_ROWS or columns % TILE_COLUMNS:
        raise ValueError(f"{rows} x {columns} does not fill tiles of {TILE_ROWS} x {TILE_COLUMNS}; pad the weights")
    row, column = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
    piece = PIECE_BYTES // element_bytes
    tile = row // TILE_ROWS * (columns // TILE_COLUMNS) + column // TILE_COLUMNS
    in_tile = (column % TILE_COLUMNS // piece * TILE_ROWS + row % TILE_ROWS) * piece + column % piece
    return tile * (TILE_ROWS * TILE_COLUMNS) + in_tile


def shuffle(weights: torch.Tensor) -> torch.Tensor:
    """Matrices ``[..., N, K]`` of 1- or 2-byte elements in the order in which AITER's kernels read them; a new tensor.

    Packed FP4 is ``[..., N, K / 2]`` uint8.

    Raises:
        ValueError: as :func:`shuffled_positions` does, or fewer than two dimensions.
    """
    matrices, where = _flat(weights)
    out = torch.empty_like(matrices)
    out[:, where] = matrices
    return out.view(weights.dtype).reshape(weights.shape)


def unshuffle(weights: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`shuffle`; a new tensor.

    Raises:
        ValueError: as :func:`shuffle` does.
    """
    matrices, where = _flat(weights)
    return matrices[:, where].view(weights.dtype).reshape(weights.shape)


def _flat(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each matrix as one row of integers, and where its elements go."""
    if weights.dim() < 2:
        raise ValueError(f"weights have shape {list(weights.shape)}; give [..., N, K]")
    size = weights.element_size()
    where = shuffled_positions(weights.shape[-2], weights.shape[-1], size).flatten().to(weights.device)
    # Bits, for indexing is not defined for every element type.
    bits = weights.contiguous().view(torch.uint8 if size == 1 else torch.int16)
    return bits.reshape(-1, where.numel()), where


def interleave(separated: torch.Tensor) -> torch.Tensor:
    """Gate rows, then up rows, as gate 0, up 0, gate 1, up 1, ...; a new tensor.

    Args:
        separated: ``[n, 2 I, ...]``: weights, their scales with one row per row, or biases.

    Raises:
        ValueError: fewer than two dimensions, or an odd second one.
    """
    _check_pairs(separated)
    halves = separated.chunk(2, 1)
    return torch.stack(halves, 2).reshape(separated.shape)


def separate(interleaved: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`interleave`; a new tensor.

    Raises:
        ValueError: as :func:`interleave` does.
    """
    _check_pairs(interleaved)
    return torch.cat([interleaved[:, 0::2], interleaved[:, 1::2]], 1)


def _check_pairs(rows: torch.Tensor) -> None:
    if rows.dim() < 2 or rows.shape[1] % 2 or not rows.shape[1]:
        raise ValueError(f"shape {list(rows.shape)} has no gate and up rows; give [n, 2 I, ...]")


def pack(codes: torch.Tensor) -> torch.Tensor:
    """E2M1 codes ``[..., N, K]`` as bytes ``[..., N, K / 2]`` uint8, the even element in the low nibble.

    Raises:
        ValueError: as :func:`reference.layouts.pack_e2m1` does.
    """
    return pack_e2m1(codes)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`pack`: int64 ``[..., N, K]``.

    Raises:
        ValueError: as :func:`reference.layouts.unpack_e2m1` does.
    """
    return unpack_e2m1(packed)
