"""Buffers of AITER's routing entries: what the kernels take for granted of them, and how results reach them.

Scope: strided rows are written as rows; nothing else of a buffer is. It proves nothing about AITER.
"""

from __future__ import annotations

import torch


def check(weights: torch.Tensor, ids: torch.Tensor, logits: torch.Tensor) -> None:
    """Element types and sizes that the kernels would read past, and the empty grid that no launch takes."""
    if weights.dtype != torch.float32 or ids.dtype != torch.int32:
        raise RuntimeError(f"weights are {weights.dtype} and ids {ids.dtype}; kernels write float32 and int32")
    if logits.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise RuntimeError(f"no kernel reads logits of {logits.dtype}")
    if min(len(weights), len(ids)) < len(logits):
        raise RuntimeError(f"buffers of {len(weights)} and {len(ids)} rows for {len(logits)} rows of logits")
    if not len(logits):
        raise RuntimeError("a grid of no blocks")


def fill(weights: torch.Tensor, ids: torch.Tensor, result: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Write a result into the first rows and columns of the caller's buffers."""
    rows, columns = result[1].shape
    weights[:rows, :columns].copy_(result[0])
    ids[:rows, :columns].copy_(result[1])


def as_logits(bias: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """The bytes of a bias read as the logits' element type: garbage unless it has that type.

    Raises:
        RuntimeError: it has too few bytes; the real kernel would read past them.
    """
    experts = logits.shape[1]
    seen = bias.reshape(-1).view(torch.uint8)[: experts * logits.element_size()].view(logits.dtype)
    if seen.numel() < experts:
        raise RuntimeError(f"a bias of {bias.numel()} {bias.dtype} is read past as {experts} {logits.dtype}")
    return seen
