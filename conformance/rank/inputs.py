"""Tensors of a case, built in each rank from (case, round, rank) alone.

Every row carries its own tag (source rank, token, stamp) in its first four elements as integers that bfloat16 holds
exactly, so a row is recognised wherever it turns up. The stamp counts rounds over all runs of an operator, so a row of
an earlier round, or of an earlier run of the same case, is recognised as stale. Weights are multiples of 1/16 and, with
values ``integers``, every product and sum the experts form is exact in float32; with ``bits`` the payload is random bit
patterns, NaN, infinities and subnormals among them, and only the dispatch is judged. With ``edges`` weights are powers
of two, so that a tie of a codec stays one.

Rows of a wire are codes: random bytes whose first four are the tag, NaN codes among them, with scales that are random
as well and begin with a byte of their own token. What codes mean to the experts is in
:mod:`conformance.rank.elements`; whether a quantiser makes the right ones is not asked here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from accelerated.wires import scale_shape
from conformance.cases import MAX_REPLAYED, Case, Cell, Round, Rows, Values
from conformance.rank.elements import BEYOND, WITNESSES, code_bits, edge_codes, row_hidden, table

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
TAG_WIDTH = 4
_TAG_BASE = 256
_ROUNDS_PER_RUN = 16
#: Parts of a seed: rounds and their replays, of sequences by the step. More would be the next seed's.
PARTS = 512
#: Every expert output of ``integers`` values is a multiple of this.
INTEGER_GRID = 2.0**-4


@dataclass
class Inputs:
    """What one rank dispatches in one round.

    ``rows [n, H]`` or codes ``[n, B]`` uint8, ``ids [n, k]`` int32, ``weights [n, k]`` float32, and ``scales [n, G]``
    float32 or uint8 where the wire has any.
    """

    rows: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    scales: torch.Tensor | None = None

    def clone(self) -> Inputs:
        scales = None if self.scales is None else self.scales.clone()
        return Inputs(self.rows.clone(), self.ids.clone(), self.weights.clone(), scales)

    def pick(self, tokens: list[int]) -> Inputs:
        """The given tokens, in that order."""
        index = torch.tensor(tokens, dtype=torch.int64, device=self.rows.device)
        scales = None if self.scales is None else self.scales[index]
        return Inputs(self.rows[index], self.ids[index], self.weights[index], scales)


def stamp_of(index: int, run: int, *, replayed: bool = False) -> int:
    """Stamp of round ``index``, or of its replay, in an operator's ``run``-th run, from 0 to 255."""
    return (index + (MAX_REPLAYED if replayed else 0) + _ROUNDS_PER_RUN * run) % _TAG_BASE


def round_inputs(
    case: Case, index: int, rank: int, routing: Rows, device: torch.device, run: int = 0, *, replayed: bool = False
) -> Inputs:
    """Inputs of round ``index`` on source ``rank``, or those with which it is replayed.

    Always drawn on the CPU, so every device sees the same numbers.
    """
    part = index + 32 if replayed else index
    return numbered_inputs(case, index, rank, routing, device, part, stamp_of(index, run, replayed=replayed))


def numbered_inputs(
    case: Case, index: int, rank: int, routing: Rows, device: torch.device, part: int, stamp: int
) -> Inputs:
    """Inputs of round ``index`` on source ``rank`` as often as ``part`` says, with a stamp of the caller's.

    Raises:
        ValueError: there are not so many parts.
    """
    if not 0 <= part < PARTS:
        raise ValueError(f"part is {part}; a seed has parts 0 to {PARTS - 1}")
    cell, a_round = case.cell, case.rounds[index]
    tokens = len(routing[rank])
    generator = torch.Generator().manual_seed((a_round.seed * PARTS + part) * 1024 + rank)
    rows = _rows(cell, a_round, tokens, generator)
    tags = row_tags(rank, torch.arange(tokens), stamp)
    if cell.wire:
        rows[:, :TAG_WIDTH] = tags.to(torch.uint8)
    else:
        rows[:, :TAG_WIDTH] = tags.to(rows.dtype)
    ids = torch.tensor(routing[rank], dtype=torch.int32).reshape(tokens, cell.top_k)
    weights = _weights(a_round.values, (tokens, cell.top_k), generator)
    scales = _scales(cell, a_round.values, tags, generator)
    return Inputs(rows.to(device), ids.to(device), weights.to(device), None if scales is None else scales.to(device))


def _rows(cell: Cell, a_round: Round, tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Rows, or their codes, without tags."""
    hidden, kind, bits = row_hidden(cell, a_round), a_round.values, code_bits(cell)
    if kind != "edges":
        if bits:
            return torch.randint(0, 256, (tokens, hidden * bits // 8), generator=generator, dtype=torch.uint8)
        return _values(kind, (tokens, hidden), generator, DTYPES[cell.dtype])
    codes = edge_codes(cell, a_round, tokens, generator)
    if bits == 4:
        return codes[:, 0::2] | codes[:, 1::2] << 4
    if bits == 8:
        return codes
    rows = table(kind, 8)[codes.long()]
    known = min(len(WITNESSES), hidden - TAG_WIDTH)
    rows[:, TAG_WIDTH : TAG_WIDTH + known] = torch.tensor(WITNESSES[:known])
    rows[:, -1] = BEYOND
    return rows.to(DTYPES[cell.dtype])


def _weights(kind: Values, shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    if kind == "edges":
        return torch.exp2(torch.randint(-1, 2, shape, generator=generator).float())
    return torch.randint(1, 17, shape, generator=generator).float() / 16


def _scales(cell: Cell, kind: Values, tags: torch.Tensor, generator: torch.Generator) -> torch.Tensor | None:
    """Scales of codes: random bytes, or with ``normal`` values positive numbers where they are float32."""
    groups, size = scale_shape(cell.problem())
    if groups == 0:
        return None
    if kind == "normal" and size == 4:
        return torch.rand(tags.shape[0], groups, generator=generator) + 2.0**-10
    raw = torch.randint(0, 256, (tags.shape[0], groups * size), generator=generator, dtype=torch.uint8)
    # A single byte is the same for one pair of tokens in 256 unless it counts them.
    raw[:, 0] = (tags[:, 1] + 37 * tags[:, 0] + 101 * tags[:, 3]).to(torch.uint8)
    return raw.view(torch.float32) if size == 4 else raw


def _values(kind: Values, shape: tuple[int, int], generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    if kind == "bits":
        words = (shape[0], shape[1] * dtype.itemsize)
        return torch.randint(0, 256, words, generator=generator, dtype=torch.uint8).view(dtype)
    if kind == "integers":
        return torch.randint(-8, 9, shape, generator=generator).to(dtype)
    normal = torch.randn(shape, generator=generator)
    if kind == "wide":
        normal = normal * torch.exp2(torch.randint(-20, 21, shape, generator=generator).float())
    return normal.to(dtype)


def row_tags(rank: int, tokens: torch.Tensor, stamp: int) -> torch.Tensor:
    """``[n, 4]`` int64 tags: source rank, token low and high digit, stamp."""
    constant = torch.ones_like(tokens)
    return torch.stack(
        [constant * rank, tokens % _TAG_BASE, tokens // _TAG_BASE, constant * (stamp % _TAG_BASE)], dim=1
    )


def read_tags(rows: torch.Tensor) -> torch.Tensor:
    """``[R, 3]`` int64 (source rank, token, stamp) of received rows; -1 throughout where the tag is not one of ours.

    The first bytes of codes are always some tag.
    """
    raw = rows[:, :TAG_WIDTH].float()
    digits = raw.nan_to_num(nan=-1.0, posinf=-1.0, neginf=-1.0).clamp(-1, _TAG_BASE).long()
    valid = ((digits >= 0) & (digits < _TAG_BASE) & (digits.float() == raw)).all(1, keepdim=True)
    tags = torch.stack([digits[:, 0], digits[:, 1] + _TAG_BASE * digits[:, 2], digits[:, 3]], dim=1)
    return torch.where(valid, tags, -1)
