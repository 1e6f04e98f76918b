"""Numerics of AITER's MoE kernels in float32 torch arithmetic: routes, two GEMMs per expert, and the sum over slots.

Scope: csrc/include/moe_sorting_opus.h for which routes count, CK's and CK-Tile's stages and the fused assembly kernels
of AITER e4048607 for the rest, on any torch device. On the CPU only routes that exist are computed; elsewhere nothing
is read back by the host, every local expert sees every row and what no route asks for is dropped. Sums over H and I
are float32 in torch's order. A pass proves nothing about AMD's matrix cores or the order of their atomics.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from accelerated.standin.aiter_ops import device
from accelerated.standin.aiter_ops.experts_weights import Weights

#: Elements of decoded weights, or of rows by experts, that are held at once.
_HELD = 1 << 23
#: Calls of this process, of which no two add up in the same order.
_CALLS = itertools.count(1)

Stage = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class Routes:
    """Which expert a token's slot goes to.

    Attributes:
        local: int64 ``[n, k]``, index into the weights where ``counts``.
        wanted: bool ``[n, k]``, the slot goes to a block of the sort, whether there is such an expert or not.
        counts: bool ``[n, k]``, the slot is added to the result.
        garbage: bool ``[n, k]``, its expert lies outside of the weights or its id outside of the mask.
        weights: float32 ``[n, k]``.
    """

    local: torch.Tensor
    wanted: torch.Tensor
    counts: torch.Tensor
    garbage: torch.Tensor
    weights: torch.Tensor


def exclusive_sums(mask: torch.Tensor) -> torch.Tensor:
    """Local expert by global id: the sum of the mask's values before it, whatever they are."""
    return mask.cumsum(0) - mask


def as_int32(tensor: torch.Tensor) -> torch.Tensor:
    """Memory as a kernel reads it that takes it for 32-bit integers."""
    return tensor.contiguous().view(torch.int32).view(-1).long()


def routes(ids: torch.Tensor, weights: torch.Tensor, mask: torch.Tensor | None, experts: int, local: int) -> Routes:
    """Routes of ``ids [n, k]`` to ``local`` experts of ``experts``.

    The kernel keeps one slot for each token and expert, so of a repeated id the last slot is left. An id that the mask
    does not reach, or a mask whose sums are no slots, reads memory that belongs to others: such a slot is garbage.
    """
    known = (ids >= 0) & (ids < experts)
    index = torch.where(known, ids, 0).long()
    later = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).triu(1)
    repeated = ((ids[:, :, None] == ids[:, None, :]) & later).any(2)
    if mask is None:
        wanted, slots = known, index
    else:
        values = as_int32(mask)[:experts]
        wanted, slots = known & (values[index] != 0), exclusive_sums(values)[index]
    wanted = wanted & ~repeated
    outside = (slots < 0) | (slots >= local)
    return Routes(slots, wanted, wanted & ~outside, (wanted & outside) | ~known, weights)


def terms(rows: torch.Tensor, found: Routes, weights: Weights, between: Stage, dtype: torch.dtype) -> torch.Tensor:
    """What each slot adds, rounded to ``dtype``: ``[n, T, H]``, 0 where no route is and NaN where it is garbage.

    T is k P; on the CPU, where it may be known, no more than the routes of the row that has the most.

    Args:
        rows: float32 ``[n, H]``, dequantised.
        found: their routes.
        weights: of the local experts.
        between: intermediate, dequantised, from ``W1 x [G, C, 2 I]``, routing weights ``[G, C]`` and experts ``[G]``.
        dtype: of the result.
    """
    count, slots = found.local.shape
    if rows.device.type != "cpu":
        shape = (count, slots, weights.shares, weights.hidden)
        result = torch.zeros(shape, dtype=dtype, device=rows.device)
        if count:
            _all(result, rows, found, weights, between)
        return result.masked_fill_(found.garbage[:, :, None, None], torch.nan).flatten(1, 2)
    active = found.counts | found.garbage
    slots = int(active.sum(1).max()) if count else 0
    place = torch.arange(count)[:, None] * slots + active.cumsum(1) - 1
    result = torch.zeros(count * slots, weights.shares, weights.hidden, dtype=dtype)
    _existing(result, place, rows, found, weights, between)
    result[place[found.garbage]] = torch.nan
    return result.view(count, slots * weights.shares, weights.hidden)


def atomic_sum(parts: torch.Tensor) -> torch.Tensor:
    """Sum over the terms of ``[n, T, H]``, rounded after each addition, in an order that no two calls share."""
    count, slots, width = parts.shape
    call = next(_CALLS)
    index = torch.arange(count * slots, device=parts.device).view(count, slots)
    order = ((index * 0x9E3779B1 + call * 0x85EBCA77) % 0x7FFFFFFF * 0xC2B2AE35 % 0x7FFFFFED).argsort(1)
    total = torch.zeros(count, width, dtype=parts.dtype, device=parts.device)
    row = torch.arange(count, device=parts.device)
    for step in range(slots):
        total += parts[row, order[:, step]]
    return total


def reduced_sum(parts: torch.Tensor) -> torch.Tensor:
    """Sum over the terms of ``[n, T, H]`` in float32, rounded once."""
    return parts.float().sum(1).to(parts.dtype)


def valid_rows(num_local_tokens: torch.Tensor | None, rows: int) -> int | torch.Tensor:
    """Rows that the kernels see: a number on the CPU, elsewhere what the first element says when they run."""
    if num_local_tokens is None:
        return rows
    first = as_int32(num_local_tokens)[0].clamp(0, rows)
    return int(first) if first.device.type == "cpu" else first


def leave_rest(result: torch.Tensor, rows: int, valid: int | torch.Tensor) -> torch.Tensor:
    """``result`` of the valid rows in a buffer of ``rows``, of which nobody wrote the others."""
    if isinstance(valid, int):
        if valid == rows:
            return result
        fresh = device.empty((rows, result.shape[1]), result.dtype, result.device)
        fresh[:valid] = result
        return fresh
    written = torch.arange(rows, device=result.device)[:, None] < valid
    return torch.where(written, result, device.empty_like(result))


def _existing(
    result: torch.Tensor, place: torch.Tensor, rows: torch.Tensor, found: Routes, weights: Weights, between: Stage
) -> None:
    """Routes by expert, tokens ascending, in as few products as memory allows."""
    token, slot = found.counts.nonzero(as_tuple=True)
    expert = found.local[token, slot]
    order = expert.argsort(stable=True)
    token, slot = token[order], slot[order]
    place, weight = place[token, slot], found.weights[token, slot]
    counts = torch.bincount(expert, minlength=weights.experts).tolist()
    starts = list(itertools.accumulate(counts, initial=0))
    for group in _groups(counts, weights.elements):
        size = torch.tensor([counts[each] for each in group])[:, None]
        column = torch.arange(int(size.max()))[None, :]
        real = column < size
        index = (torch.tensor([starts[each] for each in group])[:, None] + column).where(real, starts[group[0]])
        chosen = torch.tensor(group)
        computed = _experts(rows[token[index]], weight[index], chosen, weights, between)
        result[place[index[real]]] = computed[real].to(result.dtype)


def _groups(counts: list[int], elements: int) -> Iterator[list[int]]:
    """Experts with routes, the fullest first, as many together as may be held and do not pad more than they compute."""
    group: list[int] = []
    for each in sorted((e for e, count in enumerate(counts) if count), key=lambda e: -counts[e]):
        more = [*group, each]
        real = sum(counts[e] for e in more)
        if group and (len(more) * elements > _HELD or len(more) * counts[more[0]] - real > 64 + real):
            yield group
            more = [each]
        group = more
    if group:
        yield group


def _all(result: torch.Tensor, rows: torch.Tensor, found: Routes, weights: Weights, between: Stage) -> None:
    """Every row at every expert, so that no number has to be known."""
    count = rows.shape[0]
    together = max(1, _HELD // max(weights.elements, count * (2 * weights.inner + weights.hidden)))
    row = torch.arange(count, device=rows.device)[:, None]
    for low in range(0, weights.experts, together):
        chosen = torch.arange(low, min(low + together, weights.experts), device=rows.device)
        mine = found.counts[None] & (found.local[None] == chosen[:, None, None])
        weight = (found.weights[None] * mine).sum(2)
        computed = _experts(rows[None].expand(len(chosen), -1, -1), weight, chosen, weights, between)
        inside = found.counts & (found.local >= low) & (found.local < low + len(chosen))
        picked = computed[(found.local - low).clamp(0, len(chosen) - 1), row]
        result.copy_(torch.where(inside[:, :, None, None], picked.to(result.dtype), result))


def _experts(
    rows: torch.Tensor, weight: torch.Tensor, chosen: torch.Tensor, weights: Weights, between: Stage
) -> torch.Tensor:
    """``[G, C, P, H]`` of ``rows [G, C, H]`` through the ``chosen [G]`` experts, weighted, in float32."""
    first = weights.times_w1(rows, chosen)
    return weights.times_w2(between(first, weight, chosen), weight, chosen)
