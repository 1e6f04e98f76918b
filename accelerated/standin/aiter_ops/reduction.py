"""Sums over ranks, in the order of additions that each all-reduce kernel of AITER has.

Scope: the rows of every rank are gathered by one collective, and every rank then does the additions that a GPU would do
on the elements that it owns. It proves nothing about signals, barriers or the visibility of remote writes.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from accelerated.standin.aiter_ops import device

#: Bytes that one thread moves.
PACK_BYTES = 16


def gather(rows: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Rows of every rank, ``[W, ...]`` in the rows' type, moved as bytes. Collective."""
    sent = rows.contiguous().view(torch.uint8).view(-1)
    world = dist.get_world_size(group)
    received = torch.empty(world * sent.numel(), dtype=torch.uint8, device=sent.device)
    # Its new name; the old one warns from torch 2.13 on.
    call = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    call(received, sent, group=group)
    return received.view(world, -1).view(rows.dtype).view(world, *rows.shape)


def from_rank(parts: torch.Tensor, first: int = 0) -> torch.Tensor:
    """Float32 sum of ``parts [W, ...]`` from rank ``first`` on, ascending and around."""
    world = parts.shape[0]
    total = device.flush(parts[first].float())
    for step in range(1, world):
        total = device.flush(total + parts[(first + step) % world].float())
    return total


def from_owner(parts: torch.Tensor) -> torch.Tensor:
    """The same, each element from the rank on that reduces it: the r-th of W equal shares of the packs is rank r's.

    The last rank also has what is left over (csrc/include/custom_all_reduce.cuh:535).
    """
    world = parts.shape[0]
    flat = parts.reshape(world, -1)
    pack = PACK_BYTES // parts.element_size()
    share = flat.shape[1] // pack // world * pack
    ends = [*(share * (rank + 1) for rank in range(world - 1)), flat.shape[1]]
    shares = [from_rank(flat[:, share * rank : end], rank) for rank, end in enumerate(ends)]
    return torch.cat(shares).view(parts.shape[1:])
