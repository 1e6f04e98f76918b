"""The oracle: one MoE layer's dispatch and combine derived a second time, densely, in one process, in float64.

It judges the reference, so it shares no code with the distributed path: destinations come from plain Python sets, the
wire is modelled as "each destination rank rounds its partial sum once", and rounding is done by scaling, not on bits.
Its bounds are derived apart from reference/bounds.py and a little wider: gamma(n) times the sum of magnitudes for n
roundings.
What agreeing with the oracle does not prove: anything about communication; there is none here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

_SIGNIFICAND_BITS = {torch.float32: 24, torch.bfloat16: 8}
_MIN_EXPONENT = -126
_OVERFLOW = 2.0**128


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
    rounded = torch.round(value / quantum) * quantum
    return torch.where(rounded.abs() >= _OVERFLOW, torch.copysign(torch.full_like(value, torch.inf), value), rounded)


def layer_output(
    rows: torch.Tensor,
    routing: Sequence[Sequence[int]],
    weights: torch.Tensor,
    expert: Callable[[int, torch.Tensor], torch.Tensor],
    *,
    experts_per_rank: int,
    world_size: int,
    dtype: torch.dtype,
    nodes: int = 1,
    grid: float | None = None,
    every_addition_rounds: bool = False,
) -> Expected:
    """Output of the layer for the tokens of one source rank.

    Args:
        rows: ``[n, H]`` activations.
        routing: ``routing[token][slot]`` global expert ids.
        weights: ``[n, k]``.
        expert: ``(id, float64 [H]) -> float64 [H]``, an affine map per element.
        experts_per_rank: experts that each rank owns.
        world_size: W.
        dtype: element type of the partial sums on the wire and of the result.
        nodes: rounding levels, as in the contract.
        grid: promise that every float32 product and sum of the experts is a multiple of this power of two; what also
            fits 24 bits is exact, so that only stores round.
        every_addition_rounds: True if the sum over ranks rounds to ``dtype`` after each addition, in any order.

    Returns:
        Expected values. Experts may evaluate ``sum_j w_j (a_j x + b_j)`` in float32 in any order.
    """
    value, lower, upper = (torch.zeros(rows.shape, dtype=torch.float64) for _ in range(3))
    weight_sum = torch.zeros(weights.shape, dtype=torch.float64)
    per_node = world_size // nodes
    for token, row in enumerate(routing):
        x = rows[token].double().cpu()
        reached = destinations_of(row, experts_per_rank, world_size)
        weight_sum[token] = len(reached) * weights[token].double().cpu()
        by_node: dict[int, list[torch.Tensor]] = {}
        for rank in reached:
            slots = zip(row, weights[token].tolist(), strict=True)
            local = [(e, float(w)) for e, w in slots if e // experts_per_rank == rank]
            by_node.setdefault(rank // per_node, []).append(_wire_row(x, local, expert, dtype, grid))
        if nodes > 1:
            sums = [_add_up(parts, dtype, grid, False) for parts in by_node.values()]
        else:
            sums = by_node.get(0, [])
        if sums:
            value[token], lower[token], upper[token] = _add_up(sums, dtype, grid, every_addition_rounds)
    return Expected(value, lower, upper, weight_sum)


#: Signs of the slack in (value, lower, upper).
_SHIFT = torch.tensor([[0.0], [-1.0], [1.0]], dtype=torch.float64)


def _relative(roundings: int, unit: float) -> float:
    """Largest |(1 + d_1) ... (1 + d_n) - 1| with |d_i| <= unit, bounded by n u / (1 - n u)."""
    return roundings * unit / (1 - roundings * unit)


def _wire_row(
    x: torch.Tensor,
    local: Sequence[tuple[int, float]],
    expert: Callable[[int, torch.Tensor], torch.Tensor],
    dtype: torch.dtype,
    grid: float | None,
) -> torch.Tensor:
    """What one rank sends back for one token, ``[3, H]``: its (expert, weight) pairs summed and stored."""
    outputs = torch.stack([w * expert(e, x) for e, w in local])
    constants = torch.stack([w * expert(e, torch.zeros_like(x)) for e, w in local])
    # Sum of w |a x| and w |b|: |f(x)| alone would miss what a x and b cancel.
    magnitude = ((outputs - constants).abs() + constants.abs()).sum(0)
    # Each w_j a_j x passes two products, the sum over the slots and the addition of the constant.
    slack = _relative(len(local) + 2, 2.0**-24) * magnitude
    if grid is not None:
        slack = torch.where(magnitude <= grid * 2.0**24, 0.0, slack)
    return round_half_even(outputs.sum(0) + _SHIFT * slack, dtype)


def _add_up(parts: Sequence[torch.Tensor], dtype: torch.dtype, grid: float | None, every: bool) -> torch.Tensor:
    """Sum of ``[3, H]`` parts in any order: in float32 and then stored, or with each addition rounded to ``dtype``."""
    stacked = torch.stack(list(parts))
    total, magnitude = stacked.sum(0), stacked.abs().amax(1).sum(0)
    bits = _SIGNIFICAND_BITS[dtype] if every else 24
    # Rounded to the element type, perhaps by way of float32; otherwise to float32 alone.
    unit = 2.0**-24 if bits == 24 else 2.0**-8 + 2.0**-24 + 2.0**-32
    slack = _relative(len(parts) - 1, unit) * magnitude
    if grid is not None:
        known = (stacked[:, 1] == stacked[:, 2]).all(0)  # the end of an interval need not be on the grid
        slack = torch.where(known & (magnitude <= grid * 2.0**bits), 0.0, slack)
    if bits == 24:
        return round_half_even(round_half_even(total + _SHIFT * slack, torch.float32), dtype)
    return torch.stack([round_half_even(total[0], dtype), total[1] - slack, total[2] + slack])
