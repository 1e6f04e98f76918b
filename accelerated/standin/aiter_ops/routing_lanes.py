"""How the lanes of a wave agree on the largest of their candidates, as AITER's routing kernels do it.

Scope: the exchanges of csrc/include/hip_reduce.h of AITER e4048607, each lane with its own view afterwards, so that a
comparison which prefers neither side (NaN, or a tie without a rule) leaves lanes with different winners. Tensors are
``[M, lanes]``. It proves nothing about AMD hardware.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from accelerated.standin.aiter_ops.jit.utils.chip_info import get_gfx_runtime

#: Whether a lane takes what it is sent: value and key of the sender, then its own.
Takes = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def wave_size() -> int:
    """Lanes of a wave of the live device."""
    return 64 if get_gfx_runtime().startswith("gfx9") else 32


def larger(sent: torch.Tensor, sent_key: torch.Tensor, own: torch.Tensor, own_key: torch.Tensor) -> torch.Tensor:
    """Only what is larger; of equal values each lane keeps its own."""
    return sent > own


def larger_or_first(
    sent: torch.Tensor, sent_key: torch.Tensor, own: torch.Tensor, own_key: torch.Tensor
) -> torch.Tensor:
    """What is larger, and of equal values the smaller key."""
    return (sent > own) | ((sent == own) & (sent_key < own_key))


def unless_smaller(
    sent: torch.Tensor, sent_key: torch.Tensor, own: torch.Tensor, own_key: torch.Tensor
) -> torch.Tensor:
    """Everything but what is smaller, or equal with a larger key: NaN on either side is taken."""
    return ~((own > sent) | ((own == sent) & (own_key < sent_key)))


def exchange(values: torch.Tensor, keys: torch.Tensor, takes: Takes) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of all lanes after the DPP steps of one reduction over a row of 1 to 64 lanes, a power of two."""
    lanes = values.shape[1]
    for senders in _dpp_steps(lanes, values.device):
        values, keys = _step(values, keys, senders, takes)
    return values, keys


def butterfly(values: torch.Tensor, keys: torch.Tensor, takes: Takes) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by ``shfl_xor``, the farthest lane first."""
    lane = torch.arange(values.shape[1], device=values.device)
    offset = values.shape[1] // 2
    while offset:
        values, keys = _step(values, keys, lane ^ offset, takes)
        offset //= 2
    return values, keys


def _step(
    values: torch.Tensor, keys: torch.Tensor, senders: torch.Tensor, takes: Takes
) -> tuple[torch.Tensor, torch.Tensor]:
    sent, sent_key = values[:, senders], keys[:, senders]
    taken = takes(sent, sent_key, values, keys)
    return torch.where(taken, sent, values), torch.where(taken, sent_key, keys)


def _dpp_steps(lanes: int, device: torch.device) -> list[torch.Tensor]:
    """Whom each lane hears from in each step; from 32 lanes on only the last lane hears from all."""
    lane = torch.arange(lanes, device=device)
    steps = [lane ^ 1, lane ^ 2, lane & ~7 | 7 - (lane & 7), lane & ~15 | 15 - (lane & 15)]
    steps = steps[: min(lanes, 16).bit_length() - 1]
    if lanes >= 32:
        row = lane // 16
        steps.append(torch.where((row > 0) & ((lanes == 64) | (row % 2 == 1)), row * 16 - 1, lane))
    if lanes == 64:
        steps.append(torch.where(lane >= 32, 31, lane))
    return steps


def first_of(values: torch.Tensor, keys: torch.Tensor, start: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Each lane's first candidate larger than all before it, among ``[M, lanes, candidates]``.

    Args:
        values: of the candidates; NaN is larger than nothing.
        keys: of the candidates, the same shape.
        start: what the first must exceed; with NaN the first candidate itself is the start, whatever it is.

    Returns:
        Values and positions among the candidates ``[M, lanes]``; position -1 where none exceeds ``start``.
    """
    ordered = values.masked_fill(values.isnan(), -torch.inf)
    most = ordered.amax(2)
    place = (ordered == most.unsqueeze(2)).int().argmax(2)
    if math.isnan(start):
        first = values[:, :, 0]
        stuck = first.isnan()
        return torch.where(stuck, first, most), torch.where(stuck, 0, place)
    found = most > start
    return torch.where(found, most, start), torch.where(found, place, -1)
