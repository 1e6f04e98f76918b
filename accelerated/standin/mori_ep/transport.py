"""Moving packed rows between ranks: one collective of fixed-size slots, or counts and then ragged rows.

Scope: rows are opaque 64-bit words. It proves nothing about P2P stores, RDMA puts or the ordering of either.
"""

from __future__ import annotations

import torch
import torch.distributed as dist


class Transport:
    """Row exchange over one process group; with one rank it copies and calls no collective."""

    def __init__(self, group: dist.ProcessGroup | None, world_size: int) -> None:
        self._group = group
        self._world_size = world_size

    def slots(self, received: torch.Tensor, sent: torch.Tensor) -> None:
        """Send slot r of ``sent`` to rank r. Both are contiguous with W equal slots along dimension 0. Collective."""
        if self._world_size == 1:
            received.copy_(sent)
        else:
            dist.all_to_all_single(received, sent, group=self._group)

    def ragged(self, received: torch.Tensor, sent: torch.Tensor, arriving: list[int], leaving: list[int]) -> None:
        """Send ``leaving[r]`` leading rows to rank r and receive ``arriving[r]`` rows, in rank order. Collective."""
        if self._world_size == 1:
            received.copy_(sent)
        else:
            dist.all_to_all_single(received, sent, arriving, leaving, group=self._group)

    def meet(self) -> None:
        """Wait for every rank."""
        if self._world_size > 1:
            dist.barrier(self._group)
