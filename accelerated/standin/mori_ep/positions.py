"""Source positions as the legacy InterNode kernel type reports them.

Scope: a CPU tensor with stride M, from a call that every rank must make. It proves nothing about the sender and
receiver maps from which the real library rebuilds it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from accelerated.standin.mori_ep.config import EpDispatchCombineConfig


def legacy_positions(positions: torch.Tensor, config: EpDispatchCombineConfig, tokens: int) -> torch.Tensor:
    """Re-encode ``positions`` (``rank * W * M + token``) as ``rank * M + token``, ``[total]`` int32 on the CPU.

    Collective over the default group: the real call gathers every rank's token count there.
    """
    counts = [torch.empty(1) for _ in range(config.world_size)]
    dist.all_gather(counts, torch.tensor([float(tokens)]))
    capacity = config.max_num_inp_token_per_rank
    stride = config.world_size * capacity
    found = positions.cpu()
    return (found // stride * capacity + found % stride).to(torch.int32)
