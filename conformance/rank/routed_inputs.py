"""Router logits and biases of a routed layer, built in each rank from (case, round, rank) alone.

Each token's logits favour the experts that its drawn row names: noise from -4 to -2, favoured ones from 1 to 4 or, with
a single weight asked for, 1 and one of 6. Scores are then apart by more than any bias here, so that a router without
groups has one legal choice: the drawn row. A grouped one has the same where the row lies in no more groups than it
keeps; it must choose others where the row does not. What these inputs do not hold: ties at the last place, NaN,
infinities and masked experts; the routers alone get them.
"""

from __future__ import annotations

import torch

from accelerated.routers import RouteContract
from conformance.cases import LayerCase, LayerCell, Rows, Weighting

#: Apart from every seed of :func:`conformance.rank.layer_inputs.layer_inputs`.
_STREAM = 1 << 48
#: Steps of a logit: bfloat16 holds every value here.
_STEPS = 16
#: Scores of favoured experts and of noise are further apart than two of these, whatever a router makes of logits.
_LARGEST_BIAS = 0.125


def logits_of(case: LayerCase, index: int, rank: int, routing: Rows, device: torch.device) -> torch.Tensor:
    """Logits ``[n, L]`` of round ``index`` on source ``rank``, in the cell's element type; drawn on the CPU."""
    cell, a_round = case.cell, case.rounds[index]
    tokens = len(routing[rank])
    generator = torch.Generator().manual_seed(_STREAM + (a_round.seed * 64 + index) * 1024 + rank)
    noise = torch.randint(-4 * _STEPS, -2 * _STEPS + 1, (tokens, cell.logical), generator=generator) / _STEPS
    ids = torch.tensor(routing[rank], dtype=torch.int64).reshape(tokens, cell.top_k)
    logits = noise.scatter(1, ids, _favoured(a_round.weighting, ids.shape, generator))
    return logits.to(getattr(torch, cell.dtype)).to(device)


def _favoured(weighting: Weighting, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Logits of the drawn experts. No router gives negative weights: other weightings are drawn like positive ones."""
    if weighting == "ones":
        return torch.full(shape, 2.0)
    if weighting == "single":
        chosen = torch.randint(0, shape[1], (shape[0], 1), generator=generator)
        return torch.ones(shape).scatter(1, chosen, 6.0)
    return torch.randint(_STEPS, 4 * _STEPS + 1, shape, generator=generator) / _STEPS


def bias_of(cell: LayerCell, contract: RouteContract, device: torch.device) -> torch.Tensor | None:
    """Correction bias ``[L]`` in the contract's element type, of the cell alone; None where it takes none."""
    if not contract.takes_bias:
        return None
    generator = torch.Generator().manual_seed(_STREAM + cell.logical)
    drawn = torch.rand(cell.logical, generator=generator) * 2 * _LARGEST_BIAS - _LARGEST_BIAS
    return drawn.to(getattr(torch, contract.bias_dtype)).to(device)
