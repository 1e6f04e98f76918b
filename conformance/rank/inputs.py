"""Tensors of a case, built in each rank from (case, round, rank) alone.

Every row carries its own tag (source rank, token, stamp) in its first four elements as integers that bfloat16 holds
exactly, so a row is recognised wherever it turns up. The stamp counts rounds over all runs of an operator, so a row of
an earlier round, or of an earlier run of the same case, is recognised as stale. Weights are multiples of 1/16 and, with
values ``integers``, every product and sum the experts form is exact in float32; with ``bits`` the payload is random bit
patterns, NaN, infinities and subnormals among them, and only the dispatch is judged. Quantised formats are not covered.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from conformance.cases import Case, Rows, Values

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
TAG_WIDTH = 4
_TAG_BASE = 256
_ROUNDS_PER_RUN = 16
#: Every expert output of ``integers`` values is a multiple of this.
INTEGER_GRID = 2.0**-4


@dataclass
class Inputs:
    """What one rank dispatches in one round: ``rows [n, H]``, ``ids [n, k]`` int32, ``weights [n, k]`` float32."""

    rows: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor

    def clone(self) -> Inputs:
        return Inputs(self.rows.clone(), self.ids.clone(), self.weights.clone())

    def pick(self, tokens: list[int]) -> Inputs:
        """The given tokens, in that order."""
        index = torch.tensor(tokens, dtype=torch.int64, device=self.rows.device)
        return Inputs(self.rows[index], self.ids[index], self.weights[index])


def stamp_of(index: int, run: int) -> int:
    """Stamp of round ``index`` in an operator's ``run``-th run, from 0 to 255."""
    return (index + _ROUNDS_PER_RUN * run) % _TAG_BASE


def round_inputs(case: Case, index: int, rank: int, routing: Rows, device: torch.device, run: int = 0) -> Inputs:
    """Inputs of round ``index`` on source ``rank``; always drawn on the CPU, so every device sees the same numbers."""
    cell, a_round = case.cell, case.rounds[index]
    dtype = DTYPES[cell.dtype]
    tokens = len(routing[rank])
    generator = torch.Generator().manual_seed((a_round.seed * 64 + index) * 1024 + rank)
    rows = _values(a_round.values, (tokens, cell.hidden), generator, dtype)
    rows[:, :TAG_WIDTH] = row_tags(rank, torch.arange(tokens), stamp_of(index, run)).to(dtype)
    ids = torch.tensor(routing[rank], dtype=torch.int32).reshape(tokens, cell.top_k)
    weights = torch.randint(1, 17, (tokens, cell.top_k), generator=generator).float() / 16
    return Inputs(rows.to(device), ids.to(device), weights.to(device))


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
    """``[R, 3]`` int64 (source rank, token, stamp) of received rows; -1 throughout where the tag is not one of ours."""
    raw = rows[:, :TAG_WIDTH].float()
    digits = raw.nan_to_num(nan=-1.0, posinf=-1.0, neginf=-1.0).clamp(-1, _TAG_BASE).long()
    valid = ((digits >= 0) & (digits < _TAG_BASE) & (digits.float() == raw)).all(1, keepdim=True)
    tags = torch.stack([digits[:, 0], digits[:, 1] + _TAG_BASE * digits[:, 2], digits[:, 3]], dim=1)
    return torch.where(valid, tags, -1)
