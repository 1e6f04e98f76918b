"""Counting received (row, slot) pairs per local expert.

Scope: exact integer counts; duplicates of an expert in one row count twice (contract section 4.9). It proves nothing
about the kernel of that name.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch


def count_local_experts(
    ids: torch.Tensor, total: torch.Tensor, rank: int, experts_per_rank: int, out: torch.Tensor
) -> None:
    """Overwrite ``out [EPR]`` int32 with the local expert counts of ``ids [R, k]`` int32 below row ``total [1]``."""
    local = ids - rank * experts_per_rank
    row = torch.arange(ids.size(0), device=ids.device).unsqueeze(1)
    wanted = (local >= 0) & (local < experts_per_rank) & (row < total)
    bins = torch.where(wanted, local, experts_per_rank).reshape(-1).to(torch.int64)
    counts = torch.zeros(experts_per_rank + 1, dtype=torch.int32, device=ids.device)
    out.copy_(counts.scatter_add_(0, bins, torch.ones_like(bins, dtype=torch.int32))[:experts_per_rank])


class _DevicePointer:
    def __init__(self, pointer: int, count: int) -> None:
        self.__cuda_array_interface__ = {"shape": (count,), "typestr": "<i4", "data": (pointer, False), "version": 2}


def launch_local_expert_count(
    config: Any,
    indices_ptr: int,
    total_recv_token_num_ptr: int,
    local_expert_count_ptr: int,
    block_num: int = -1,
    warp_per_block: int = -1,
    stream: int = 0,
) -> None:
    """Count at raw addresses: indices ``[total, k]`` int32, total ``[1]`` int32, result ``[EPR]`` int32.

    Addresses are host memory where CUDA is unavailable. Unlike the kernel, the double reads the total on the host.

    Raises:
        RuntimeError: no positive launch geometry.

    Source of semantics: python/mori/ops/local_expert_count.py.
    """
    del stream
    warps = config.warp_num_per_block if warp_per_block <= 0 else warp_per_block
    blocks = config.block_num if block_num <= 0 else block_num
    if warps <= 0 or blocks <= 0:
        raise RuntimeError(f"local expert count needs positive blocks and warps, got {blocks} and {warps}")
    total = _at(total_recv_token_num_ptr, 1)
    k, experts = config.num_experts_per_token, config.num_experts_per_rank
    ids = _at(indices_ptr, int(total.item()) * k).view(-1, k)
    count_local_experts(ids, total, config.rank, experts, _at(local_expert_count_ptr, experts))


def _at(pointer: int, count: int) -> torch.Tensor:
    if count == 0:
        return torch.empty(0, dtype=torch.int32)
    if torch.cuda.is_available():
        return torch.as_tensor(_DevicePointer(pointer, count), device="cuda")
    return torch.frombuffer((ctypes.c_int32 * count).from_address(pointer), dtype=torch.int32)
