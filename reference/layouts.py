"""Where codes and scales lie in memory: packed E2M1 and the layouts of scale tensors.

Scope: the inverse pairs pack/unpack and logical/laid out for every :class:`reference.codecs.ScaleLayout`. What a tensor
does not promise is refused by name: a scale tensor of the right shape and the wrong stride is a defect that libraries
have had, and reading it through its shape alone would hide it. What a pass does not prove: that the values in the right
places are right, or anything about padding bytes, which no library promises to write.
"""

from __future__ import annotations

import torch

from reference.codecs import ScaleLayout

#: SWIZZLED buffers are padded to multiples of these, rows and groups.
SWIZZLE_ROWS, SWIZZLE_GROUPS = 256, 8
#: One tile: 32 rows by 8 groups, 256 consecutive elements.
_TILE_ROWS, _TILE = 32, 32 * SWIZZLE_GROUPS


def pack_e2m1(codes: torch.Tensor) -> torch.Tensor:
    """Two 4-bit codes per byte, the even element in the low nibble: integers ``[..., N]`` to uint8 ``[..., N / 2]``.

    Raises:
        ValueError: N is odd, there is no last dimension, or a code needs more than 4 bits.
    """
    if codes.dim() == 0 or codes.shape[-1] % 2:
        raise ValueError(f"codes have shape {tuple(codes.shape)}; two share a byte, so give an even last dimension")
    codes = codes.long()
    if bool(((codes < 0) | (codes > 15)).any()):
        raise ValueError(f"codes lie in [{int(codes.min())}, {int(codes.max())}]; E2M1 codes lie in [0, 15]")
    return (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)


def unpack_e2m1(packed: torch.Tensor) -> torch.Tensor:
    """Codes of uint8 ``[..., N / 2]``, low nibble first: int64 ``[..., N]``.

    Raises:
        ValueError: ``packed`` is not uint8, or has no last dimension.
    """
    if packed.dtype != torch.uint8 or packed.dim() == 0:
        raise ValueError(f"packed is {packed.dtype} of shape {tuple(packed.shape)}; give a uint8 view of [..., N / 2]")
    pair = packed.long()
    return torch.stack([pair & 15, pair >> 4], dim=-1).flatten(-2)


def swizzled_shape(rows: int, groups: int) -> tuple[int, int]:
    """Shape of the padded buffer of SWIZZLED: multiples of (256, 8)."""
    return -(-rows // SWIZZLE_ROWS) * SWIZZLE_ROWS, -(-groups // SWIZZLE_GROUPS) * SWIZZLE_GROUPS


def swizzled_positions(rows: int, groups: int) -> torch.Tensor:
    """Flat position of scale [row, group] in the buffer of SWIZZLED, int64 ``[rows, groups]``.

    Tiles of 32 rows by 8 groups follow each other along the groups, then along the rows. In a tile, from slowest to
    fastest: the group within its four, the row within its sixteen, which four, which sixteen.

    Source: AITER e4048607 csrc/include/mx_quant_utils.h ``mx_scale_shuffle_idx``, aiter/ops/shuffle.py
    ``shuffle_scale``.
    """
    row, group = torch.arange(rows)[:, None], torch.arange(groups)[None, :]
    tiles_per_row = swizzled_shape(rows, groups)[1] // SWIZZLE_GROUPS
    tile = row // _TILE_ROWS * tiles_per_row + group // SWIZZLE_GROUPS
    four, in_four = group % SWIZZLE_GROUPS // 4, group % 4
    sixteen, in_sixteen = row % _TILE_ROWS // 16, row % 16
    return tile * _TILE + ((in_four * 16 + in_sixteen) * 2 + four) * 2 + sixteen


def _promised(layout: ScaleLayout, rows: int, groups: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shape and strides of a layout."""
    if layout is ScaleLayout.SWIZZLED:
        shape = swizzled_shape(rows, groups)
        return shape, (shape[1], 1)
    return (rows, groups), ((1, rows) if layout is ScaleLayout.COLUMN_MAJOR else (groups, 1))


def logical_scales(scales: torch.Tensor, layout: ScaleLayout, rows: int, groups: int) -> torch.Tensor:
    """Scales ``[rows, groups]`` by index, from what a library returned: a view, or a copy for SWIZZLED.

    Args:
        scales: as ``layout`` says. The ``(1,)`` of a per-tensor quantiser passes for ``(1, 1)``.
        layout: of ``scales``.
        rows: M, or ``M / block_rows`` for blocks.
        groups: scales per row.

    Raises:
        ValueError: shape or strides are not what ``layout`` promises. The stride of a dimension of size 1 says nothing
            about where an element lies and is not looked at, nor is any stride of an empty tensor.
    """
    if rows == groups == 1 and scales.shape == (1,):
        scales = scales[None]
    shape, strides = _promised(layout, rows, groups)
    if tuple(scales.shape) != shape:
        raise ValueError(
            f"scales have shape {tuple(scales.shape)}; layout {layout.name} of {rows} x {groups} promises {shape}"
        )
    dimensions = zip(shape, scales.stride(), strides, strict=True)
    if scales.numel() and any(size > 1 and got != want for size, got, want in dimensions):
        raise ValueError(
            f"scales have strides {scales.stride()}; layout {layout.name} of {rows} x {groups} promises {strides}"
        )
    if layout is ScaleLayout.TRANSPOSED_BYTES:
        return scales.reshape(groups, rows).T
    if layout is ScaleLayout.SWIZZLED:
        return scales.reshape(-1)[swizzled_positions(rows, groups).to(scales.device)]
    return scales


def lay_out_scales(logical: torch.Tensor, layout: ScaleLayout, padding: float = 0) -> torch.Tensor:
    """The tensor that a library with ``layout`` returns for scales ``logical [rows, groups]``: a new tensor.

    Args:
        logical: any element type; bytes of E8M0 as uint8.
        layout: of the result.
        padding: what SWIZZLED's padding holds, in the element type. Libraries leave it unwritten, so poison it.

    Raises:
        ValueError: ``logical`` is not two-dimensional.
    """
    if logical.dim() != 2:
        raise ValueError(f"logical has shape {tuple(logical.shape)}; give [rows, groups]")
    rows, groups = logical.shape
    if layout is ScaleLayout.COLUMN_MAJOR:
        return logical.T.clone(memory_format=torch.contiguous_format).T
    if layout is ScaleLayout.TRANSPOSED_BYTES:
        return logical.T.clone(memory_format=torch.contiguous_format).reshape(rows, groups)
    if layout is ScaleLayout.SWIZZLED:
        shape = swizzled_shape(rows, groups)
        buffer = torch.full((shape[0] * shape[1],), padding, dtype=logical.dtype, device=logical.device)
        buffer[swizzled_positions(rows, groups).to(logical.device)] = logical
        return buffer.reshape(shape)
    return logical.clone(memory_format=torch.contiguous_format)
