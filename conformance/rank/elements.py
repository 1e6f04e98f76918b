"""What the probe experts take a row to mean: elements of a kind of values, whether they are sent as such or as codes.

A row in its element type is its elements. A row of codes is moved verbatim by a dispatch, NaN codes included, so any
byte may occur in it, and an expert of the suite reads each code as a number of a fixed table: what a code means to
hardware is a quantiser's business and is not tested here. Elements of the kind ``edges`` are made for a combine codec:
in blocks as wide as its own, zeros, what only its subnormals hold, ties, values at both sides of the largest code, and
values far beyond it. What these values do not hold: NaN and infinities, whose coding MoRI leaves open.
"""

from __future__ import annotations

from functools import cache

import torch

from conformance.cases import Cell, Round, Values
from reference.problem import block_width, wire_format

#: Elements of a segment of like values where no codec has blocks.
_SEGMENT = 16
#: The last element of a row of the kind ``edges``: beyond the largest code after any of the experts' factors.
BEYOND = 4096.0
#: Values whose E4M3 code is off by more than bfloat16 rounds: ties of its three mantissa bits, and between.
WITNESSES = (17 / 16, 19 / 16, 21 / 16, 1.3046875)


def row_hidden(cell: Cell, a_round: Round) -> int:
    """Elements of a row of this round."""
    return a_round.hidden or cell.hidden


def code_bits(cell: Cell) -> int:
    """Bits of one code, 0 where rows are dispatched in their element type."""
    if not cell.wire:
        return 0
    return 8 if wire_format(cell.wire).payload == "fp8" else 4


def elements(rows: torch.Tensor, cell: Cell, kind: Values, dtype: torch.dtype) -> torch.Tensor:
    """Elements ``[R, H]`` in ``dtype`` of received rows: themselves, or ``[R, B]`` codes looked up."""
    bits = code_bits(cell)
    if bits == 0:
        return rows
    codes = rows.view(torch.uint8)
    if bits == 4:
        # The even element is in the low nibble (MoRI 624002c8, packed FP4).
        codes = torch.stack((codes & 15, codes >> 4), dim=2).flatten(1)
    return table_on(rows.device, kind, bits)[codes.long()].to(dtype)


@cache
def table_on(device: torch.device, kind: Values, bits: int) -> torch.Tensor:
    """:func:`table` on a device, copied there once: the copy waits for all that the device has to do.

    A program must have asked for it before the first call of a backend. Expected results are made of the same elements,
    so it has.
    """
    return table(kind, bits).to(device)


@cache
def table(kind: Values, bits: int) -> torch.Tensor:
    """``[2 ** bits]`` float32: the element behind every code; all of them bfloat16 numbers."""
    size = 1 << bits
    if kind == "edges":
        return torch.cat([_spread(part, width) for part, width in zip(_edges(), _widths(size), strict=True)])
    generator = torch.Generator().manual_seed(size)
    if kind in ("integers", "bits"):
        return (torch.arange(size) % 17 - 8).float()
    normal = torch.randn(size, generator=generator)
    if kind == "wide":
        normal = normal * torch.exp2(torch.randint(-20, 21, (size,), generator=generator).float())
    return normal.bfloat16().float()


def edge_codes(cell: Cell, a_round: Round, tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Codes ``[n, H]`` uint8 of the kind ``edges``: every segment of a row is of one class, or of all."""
    hidden, size = row_hidden(cell, a_round), 16 if code_bits(cell) == 4 else 256
    width = block_width(hidden, cell.scale_dim) if cell.scale_dim else _SEGMENT
    segments = -(-hidden // width)
    ends = torch.tensor([0, *_widths(size)]).cumsum(0)
    kind = torch.randint(0, len(_widths(size)) + 1, (tokens, segments), generator=generator)
    kind[:, :1] = _SMALL  # the witnesses are coded without a scale
    kind = kind.repeat_interleave(width, 1)[:, :hidden]
    mixed = kind == len(_widths(size))
    kind = kind.clamp(max=len(_widths(size)) - 1)
    low, high = torch.where(mixed, 0, ends[kind]), torch.where(mixed, size, ends[kind + 1])
    codes = (low + (torch.rand(tokens, hidden, generator=generator) * (high - low)).long()).to(torch.uint8)
    codes[:, -1] = size - 1
    return codes


#: Position of the class of small values.
_SMALL = 2


def _widths(size: int) -> tuple[int, ...]:
    """Codes of each class: zeros, subnormals, small values, those around the largest code, and far beyond."""
    return (2, 2, 6, 4, 2) if size == 16 else (16, 48, 96, 64, 32)


@cache
def _edges() -> tuple[torch.Tensor, ...]:
    """Classes of values, for E4M3 of both flavours (largest 448 and 240) and for E2M1 (scaled in any case)."""
    signs = torch.tensor([1.0, -1.0])
    # Multiples of a quarter of both flavours' smallest code, 2**-9 and 2**-10: below, on and between them.
    tiny = torch.arange(1, 25) * 2.0**-12
    # Three mantissa bits and a half, so that every other one is a tie, over the binades below 256.
    small = torch.cat([(1 + torch.arange(8) / 8 + 1 / 16) * 2.0**e for e in (-6, -3, 0, 1, 3, 5)])
    around = torch.tensor(
        [232.0, 240, 244, 247, 248, 249, 256, 264, 416, 432, 440, 448, 450, 456, 462, 464, 466, 472, 480, 496, 512]
    )
    beyond = torch.tensor([1000.0, 1016, 3000, 4096, 7000, 65280, 2.0**20, 3.0 * 2**30])
    return (0.0 * signs, *((part.outer(signs).flatten()) for part in (tiny, small, around, beyond)))


def _spread(values: torch.Tensor, width: int) -> torch.Tensor:
    """``width`` of the values, from all over them."""
    at = torch.arange(width) * 37 % len(values) if width < len(values) else torch.arange(width) % len(values)
    return values[at].bfloat16().float()
