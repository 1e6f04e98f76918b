"""The oracle: one MoE layer's dispatch and combine derived a second time, densely, in one process, in float64.

It judges the reference, so it shares no code with the distributed path: destinations come from plain Python sets, the
wire is modelled as "each destination rank rounds its partial sum once", and rounding is done by scaling, not on bits.
What agreeing with the oracle does not prove: anything about communication; there is none here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

_SIGNIFICAND_BITS = {torch.float32: 24, torch.bfloat16: 8}
_MIN_EXPONENT = -126


@dataclass
class Expected:
    """What one source rank must get back: any result in ``[lower, upper]``, float64 ``[n, H]``."""

    value: torch.Tensor
    lower: torch.Tensor
    upper: torch.Tensor
    weights: torch.Tensor  # [n, k] float64: the token's weight row times its number of destination ranks


def destinations_of(row: Sequence[int], experts_per_rank: int, world_size: int) -> list[int]:
    """Distinct owner ranks of one token's expert ids, ascending; ids outside ``[0, E)`` name no expert."""
    return sorted({e // experts_per_rank for e in row if 0 <= e < experts_per_rank * world_size})


def received_set(
    routing: Sequence[Sequence[Sequence[int]]], rank: int, experts_per_rank: int, world_size: int
) -> list[tuple[int, int]]:
    """(source rank, token) of every row that ``rank`` must receive, ascending; ``routing[source][token][slot]``."""
    return [
        (source, token)
        for source, rows in enumerate(routing)
        for token, row in enumerate(rows)
        if rank in destinations_of(row, experts_per_rank, world_size)
    ]


def round_half_even(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round float64 to the nearest value of ``dtype`` (bfloat16, float32), ties to even; float64."""
    _, exponent = torch.frexp(value)
    # value = m * 2**exponent with 0.5 <= |m| < 1, so the last kept bit weighs 2**(exponent - bits).
    quantum = torch.ldexp(
        torch.ones_like(value), torch.clamp(exponent, min=_MIN_EXPONENT + 1) - _SIGNIFICAND_BITS[dtype]
    )
    return torch.round(value / quantum) * quantum


def layer_output(
    rows: torch.Tensor,
    routing: Sequence[Sequence[int]],
    weights: torch.Tensor,
    expert: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    *,
    experts_per_rank: int,
    world_size: int,
    dtype: torch.dtype,
    nodes: int = 1,
    exact: bool = False,
    every_addition_rounds: bool = False,
) -> Expected:
    """Output of the layer for the tokens of one source rank.

    Args:
        rows: ``[n, H]`` activations.
        routing: ``routing[token][slot]`` global expert ids.
        weights: ``[n, k]``.
        expert: ``(ids [n] int64, float64 [n, H]) -> float64 [n, H]``, row i through expert ``ids[i]``.
        experts_per_rank: experts that each rank owns.
        world_size: W.
        dtype: element type of the partial sums on the wire and of the result.
        nodes: rounding levels, as in the contract.
        exact: True if every float32 intermediate is exact for this data, so that only stores round.
        every_addition_rounds: True if the sum over ranks rounds to ``dtype`` after each addition, in any order.

    Returns:
        Expected values; without ``exact``, float32 arithmetic is allowed ``8 k`` roundings of the sum of magnitudes.
    """
    n, hidden = rows.shape
    x, weight = rows.double().cpu(), weights.double().cpu()
    top_k = weight.shape[1]
    ids = torch.tensor([list(row) for row in routing], dtype=torch.int64).reshape(n, top_k)
    valid = (ids >= 0) & (ids < experts_per_rank * world_size)
    outputs = torch.stack([weight[:, j : j + 1] * expert(ids[:, j].clamp(min=0), x) for j in range(top_k)], dim=1)
    # share[t, r, j] is 1 where slot j of token t belongs to rank r.
    rank_of = torch.where(valid, torch.div(ids, experts_per_rank, rounding_mode="floor"), -1)
    share = (rank_of.unsqueeze(1) == torch.arange(world_size).reshape(1, world_size, 1)).double()
    weight_sum = share.any(2).sum(1, keepdim=True) * weight
    partial = share @ outputs  # [n, W, H], at most k terms each
    bounds = partial.unsqueeze(0)
    if not exact:
        slack = 8 * top_k * 2.0**-24 * (share @ outputs.abs() + share.amax(2, keepdim=True))
        bounds = torch.stack([partial, partial - slack, partial + slack])
    stored = round_half_even(bounds, dtype)
    sums = stored.reshape(stored.shape[0], n, nodes, world_size // nodes, hidden).sum(3)
    magnitude = partial.abs().reshape(n, nodes, world_size // nodes, hidden).sum(2)
    roundings = world_size * every_addition_rounds
    value, lower, upper = _store_levels(sums, magnitude, nodes, dtype, exact, roundings)
    return Expected(value, lower, upper, weight_sum)


def _store_levels(
    sums: torch.Tensor, magnitude: torch.Tensor, nodes: int, dtype: torch.dtype, exact: bool, roundings: int
) -> tuple[torch.Tensor, ...]:
    """Round ``sums [1 or 3, n, N, H]`` (value, lower, upper) per node if there are several, then their sum."""
    if exact and not roundings:
        if nodes > 1:
            sums = round_half_even(sums, dtype)
        total = round_half_even(sums.sum(2), dtype)
        return total[0], total[0], total[-1]
    shift = torch.tensor([0.0, -1.0, 1.0], dtype=torch.float64).reshape(3, 1, 1, 1)
    slack = torch.zeros_like(magnitude) if exact else 64 * 2.0**-24 * magnitude
    sums = sums.expand(3, *magnitude.shape) + shift * slack
    if nodes > 1:
        sums = round_half_even(sums, dtype)
    total = sums.sum(2) + shift[:, 0] * slack.sum(1)
    # Each of the additions may lose half a unit of a partial sum, which sum|partial| bounds; 2 covers second order.
    loss = 2 * roundings * 2.0 ** -_SIGNIFICAND_BITS[dtype] * magnitude.sum(1) if roundings else 0.0
    total = round_half_even(total, dtype) + shift[:, 0] * loss
    return tuple(total)
