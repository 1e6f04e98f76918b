"""The oracle: one MoE layer's dispatch and combine derived a second time, densely, in one process, in float64.

It judges the reference, so it shares no code with the distributed path: destinations come from plain Python sets, the
wire is modelled as "each destination rank rounds its partial sum once", and rounding is done by scaling, not on bits.
Its bounds are derived apart from reference/bounds.py and are a little wider: gamma(n) times the sum of magnitudes for n
roundings (Higham, Accuracy and Stability of Numerical Algorithms, lemma 3.1).
What agreeing with the oracle does not prove: anything about communication; there is none here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

_SIGNIFICAND_BITS = {torch.float32: 24, torch.bfloat16: 8}
_UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
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
    expert: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    *,
    experts_per_rank: int,
    world_size: int,
    dtype: torch.dtype,
    nodes: int = 1,
    grid: float | None = None,
    every_addition_rounds: bool = False,
    wire_sum: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> Expected:
    """Output of the layer for the tokens of one source rank.

    Args:
        rows: ``[n, H]`` activations.
        routing: ``routing[token][slot]`` global expert ids.
        weights: ``[n, k]``.
        expert: ``(ids [n] int64, float64 [n, H]) -> float64 [n, H]``, row i through expert ``ids[i]``: an affine map of
            each element.
        experts_per_rank: experts that each rank owns.
        world_size: W.
        dtype: element type of the partial sums on the wire and of the result.
        nodes: rounding levels, as in the contract.
        grid: promise that every float32 product and sum of the experts is a multiple of this power of two; those that
            fit 24 bits are exact, so that only stores round.
        every_addition_rounds: True if the sum over ranks rounds to ``dtype`` after each addition, in any order.
        wire_sum: how partial sums that travel coded add up (:func:`reference.combine_oracle.coded_sum` of a codec and
            nodes): ``(wire [1 or 3, n, W, H], reached [n, W] bool) -> [1 or 3, n, H]``; None for the element type.

    Returns:
        Expected values. The experts may evaluate ``sum_j w_j (a_j x + b_j)`` in float32 in any order.
    """
    n, hidden = rows.shape
    x, weight = rows.double().cpu(), weights.double().cpu()
    top_k = weight.shape[1]
    ids = torch.tensor([list(row) for row in routing], dtype=torch.int64).reshape(n, top_k)
    valid = (ids >= 0) & (ids < experts_per_rank * world_size)
    known = torch.where(valid, ids, 0)
    outputs = torch.stack([weight[:, j : j + 1] * expert(known[:, j], x) for j in range(top_k)], dim=1)
    # share[t, r, j] is 1 where slot j of token t belongs to rank r.
    rank_of = torch.where(valid, torch.div(ids, experts_per_rank, rounding_mode="floor"), -1)
    share = (rank_of.unsqueeze(1) == torch.arange(world_size).reshape(1, world_size, 1)).double()
    reached = share.any(2)
    weight_sum = reached.sum(1, keepdim=True) * weight
    # |f(x)| alone would miss what a x and b cancel, so sum w |a x| and w |b|.
    at_zero = torch.zeros(n, 1, dtype=torch.float64)
    constants = torch.stack([weight[:, j : j + 1] * expert(known[:, j], at_zero) for j in range(top_k)], dim=1)
    magnitude = share @ ((outputs - constants).abs() + constants.abs())
    # Each w_j a_j x passes two products, the sum over the slots and the addition of the constants.
    slack = _relative(share.sum(2, keepdim=True) + 2, _UNIT[torch.float32]) * magnitude
    if grid is not None:
        slack = torch.where(magnitude <= grid * 2.0**24, 0.0, slack)
    wire = round_half_even(_spread((share @ outputs).unsqueeze(0), slack), dtype)
    if wire_sum is not None:
        ends = wire_sum(wire, reached)
        return Expected(ends[0], ends[1 % len(ends)], ends[2 % len(ends)], weight_sum)
    if nodes > 1:
        by_node = (n, nodes, world_size // nodes)
        count = reached.reshape(by_node).sum(2, keepdim=True)
        wire = _add_up(wire.reshape(len(wire), *by_node, hidden), count, dtype, grid, False)
        reached = count.squeeze(2) > 0
    ends = _add_up(wire, reached.sum(1, keepdim=True), dtype, grid, every_addition_rounds)
    return Expected(ends[0], ends[1 % len(ends)], ends[2 % len(ends)], weight_sum)


def _relative(roundings: torch.Tensor, unit: float) -> torch.Tensor:
    """Largest ``|(1 + d_1) ... (1 + d_n) - 1|`` with ``|d_i| <= unit``: at most ``n u / (1 - n u)``."""
    n = roundings.double().clamp(min=0) * unit
    return n / (1 - n)


def _spread(value: torch.Tensor, slack: torch.Tensor) -> torch.Tensor:
    """``value [1 or 3, ...]`` with the slack off its lower and on its upper end; left alone without slack."""
    if not slack.any():
        return value
    return value + torch.tensor([0.0, -1.0, 1.0], dtype=torch.float64).reshape(3, *[1] * slack.dim()) * slack


def _add_up(
    parts: torch.Tensor, count: torch.Tensor, dtype: torch.dtype, grid: float | None, every: bool
) -> torch.Tensor:
    """Sum of ``parts [1 or 3, ..., c, H]`` over c in any order, of which ``count [..., 1]`` are present.

    In float32 and then stored as ``dtype``, or with every addition rounded to ``dtype``.
    """
    total, magnitude = parts.sum(-2), parts.abs().amax(0).sum(-2)
    in_float32 = not every or dtype == torch.float32
    # An addition rounded to bfloat16 may have been rounded to float32 before.
    unit = _UNIT[torch.float32] if in_float32 else _UNIT[dtype] * (1 + _UNIT[torch.float32]) + _UNIT[torch.float32]
    slack = _relative(count - 1, unit) * magnitude
    if grid is not None:
        bits = _SIGNIFICAND_BITS[torch.float32 if in_float32 else dtype]
        slack = torch.where(magnitude <= grid * 2.0**bits, 0.0, slack)
    ends = _spread(total, slack)
    if in_float32:
        return round_half_even(round_half_even(ends, torch.float32) if slack.any() else ends, dtype)
    return torch.cat([round_half_even(ends[:1], dtype), ends[1:]])
