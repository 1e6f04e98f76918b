"""The sort of tokens by expert that precedes AITER's MoE kernels.

Scope: csrc/include/moe_sorting_opus.h of AITER e4048607: permutation, padding and what is left unwritten; the CK and
FlyDSL kernels are taken to give the same. Nothing synchronises with the host. A pass proves nothing about the order in
which hardware writes.
"""

from __future__ import annotations

import torch

from accelerated.standin.aiter_ops import device, experts_kernels

Sorted = tuple[torch.Tensor, ...]

#: The kernel that clears the result writes vectors of so many bytes.
_VECTOR = 16


def sort(
    ids: torch.Tensor,
    weights: torch.Tensor,
    experts: int,
    width: int,
    dtype: torch.dtype,
    block: int,
    mask: torch.Tensor | None,
    num_local_tokens: torch.Tensor | None,
    *,
    local_ids: bool,
    buffer: bool,
) -> Sorted:
    """What :func:`accelerated.standin.aiter_ops.fused_moe.moe_sorting` returns, all of it freshly allocated."""
    count, k = ids.shape
    on = ids.device
    length = count * k + experts * block - k
    sorted_ids = device.empty((length,), torch.int32, on)
    sorted_weights = device.empty((length,), torch.float32, on)
    sorted_experts = device.empty((-(-length // block),), torch.int32, on)
    totals = device.empty((2,), torch.int32, on)
    result = torch.empty(0, 0, dtype=dtype, device=on)
    if buffer or mask is not None:
        result = device.empty((count, width), dtype, on)
    local = [device.empty((count, k), ids.dtype, on)] if local_ids else []
    if weights.dtype != torch.float32:
        raise RuntimeError(f"the sort wants float32 routing weights, not {weights.dtype}")
    if ids.dtype != torch.int32:
        # There is a kernel for int32 only, and its absence is not reported.
        return sorted_ids, sorted_weights, sorted_experts, totals, result, *local
    tokens = torch.tensor(count, device=on)
    if num_local_tokens is not None:
        tokens = experts_kernels.as_int32(num_local_tokens)[0].clamp(0, count)
    seen = torch.arange(count, device=on)[:, None] < tokens
    found = experts_kernels.routes(ids, weights, mask, experts, experts)
    placed = (seen & found.wanted).view(-1)

    # Blocks of each expert, then the place of each route: tokens ascending within an expert.
    key = torch.where(placed, ids.view(-1), experts).long()
    order = key.argsort(stable=True)
    key = key[order]
    counts = torch.zeros(experts + 1, dtype=torch.int64, device=on).scatter_add(0, key, torch.ones_like(key))[:-1]
    padded = (counts + block - 1) // block * block
    ends, first = padded.cumsum(0), counts.cumsum(0) - counts
    total = ends[-1:]
    expert = key.clamp(max=experts - 1)
    place = (ends - padded)[expert] + torch.arange(count * k, device=on) - first[expert]
    place = torch.where(placed[order], place, length)

    inside = torch.arange(length, device=on) < total
    entry = order // k | order % k << 24
    _fill(sorted_ids, torch.where(inside, tokens | k << 24, sorted_ids), place, entry)
    _fill(sorted_weights, torch.where(inside, 0.0, sorted_weights), place, weights.reshape(-1)[order])
    slots = torch.arange(experts, device=on)
    values = None if mask is None else experts_kernels.as_int32(mask)[:experts]
    if values is not None:
        slots = experts_kernels.exclusive_sums(values)
    start = torch.arange(len(sorted_experts), device=on) * block
    owner = torch.searchsorted(ends, start, right=True).clamp(max=experts - 1)
    sorted_experts.copy_(torch.where(start < total, slots[owner], sorted_experts))
    totals.copy_(torch.cat((total, tokens.view(1))))
    _clear(result, tokens)
    if local:
        known = (ids >= 0) & (ids < experts)
        index = torch.where(known, ids, 0).long()
        remote = torch.zeros_like(known) if values is None else values[index] == 0
        local[0].copy_(torch.where(seen & known, torch.where(remote, -1, slots[index]), local[0]))
    return sorted_ids, sorted_weights, sorted_experts, totals, result, *local


def _fill(out: torch.Tensor, padding: torch.Tensor, place: torch.Tensor, values: torch.Tensor) -> None:
    """``values`` at ``place``, whose last number but the end is thrown away, over ``padding``."""
    longer = torch.cat((padding.to(out.dtype), out.new_zeros(1)))
    out.copy_(longer.scatter(0, place, values.to(out.dtype))[:-1])


def _clear(result: torch.Tensor, tokens: torch.Tensor) -> None:
    """Zero the rows of the tokens; what does not fill a vector at their end stays."""
    if not result.numel():
        return
    row = result.shape[1] * result.element_size()
    raw = result.view(-1).view(torch.uint8)
    written = torch.arange(raw.numel(), device=raw.device) < tokens * row // _VECTOR * _VECTOR
    raw.masked_fill_(written, 0)
