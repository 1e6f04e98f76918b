"""Tensors of a layer's round, built in each rank from (case, round, rank) alone.

Rows carry no tags: what came from where is told by the values, which every token has its own. Among rows of normal
values some are zero or have a zero group. What these inputs do not hold: NaN and infinities in valid rows; they fill
the rows beyond the valid ones.
"""

from __future__ import annotations

import torch

from conformance.cases import LayerCase, LayerRound, Rows
from conformance.rank.inputs import Inputs

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
#: One row in so many is zero, and another has a zero group.
_SPECIAL = 11
_GROUP = 32


def layer_inputs(case: LayerCase, index: int, rank: int, routing: Rows, device: torch.device) -> Inputs:
    """Inputs of round ``index`` on source ``rank``; always drawn on the CPU, so every device sees the same numbers."""
    cell, a_round = case.cell, case.rounds[index]
    tokens = len(routing[rank])
    generator = torch.Generator().manual_seed((a_round.seed * 64 + index) * 1024 + rank)
    rows = _rows(a_round, tokens, cell.hidden, generator).to(_DTYPES[cell.dtype])
    ids = torch.tensor(routing[rank], dtype=torch.int32).reshape(tokens, cell.top_k)
    weights = _weights(a_round, (tokens, cell.top_k), generator)
    return Inputs(rows.to(device), ids.to(device), weights.to(device))


def _rows(a_round: LayerRound, tokens: int, hidden: int, generator: torch.Generator) -> torch.Tensor:
    if a_round.values == "integers":
        return torch.randint(-8, 9, (tokens, hidden), generator=generator).float()
    normal = torch.randn((tokens, hidden), generator=generator)
    if a_round.values == "wide":
        normal = normal * torch.exp2(torch.randint(-12, 7, (tokens, hidden), generator=generator).float())
    number = torch.arange(tokens)
    normal[number % _SPECIAL == 5] = 0.0
    start = _GROUP * (a_round.seed % max(hidden // _GROUP, 1))
    normal[number % _SPECIAL == 7, start : start + _GROUP] = 0.0
    return normal


def _weights(a_round: LayerRound, shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    if a_round.weighting == "ones":
        return torch.ones(shape)
    if a_round.weighting == "positive":
        return torch.randint(1, 17, shape, generator=generator).float() / 16
    signed = torch.randn(shape, generator=generator)
    if a_round.weighting == "zeros":
        signed[torch.rand(shape, generator=generator) < 0.4] = 0.0
    elif a_round.weighting == "single":
        chosen = torch.randint(0, shape[1], (shape[0], 1), generator=generator)
        return torch.zeros(shape).scatter(1, chosen, signed.gather(1, chosen) + signed.gather(1, chosen).sign())
    return signed


def poisoned(inputs: Inputs, tail: int, experts: int) -> Inputs:
    """The inputs and ``tail`` rows of NaN and huge values, with ids that name experts and weights that are NaN."""
    if tail == 0:
        return inputs.clone()
    rows = torch.full((tail, inputs.rows.shape[1]), torch.nan, dtype=inputs.rows.dtype, device=inputs.rows.device)
    rows[::2] = torch.finfo(rows.dtype).max
    number = torch.arange(tail * inputs.ids.shape[1], device=rows.device).reshape(tail, inputs.ids.shape[1])
    ids = (number % experts).to(inputs.ids.dtype)
    weights = torch.full(ids.shape, torch.nan, device=rows.device)
    return Inputs(torch.cat([inputs.rows, rows]), torch.cat([inputs.ids, ids]), torch.cat([inputs.weights, weights]))
