"""Persistent, capacity-sized, poisoned memory of an operator, and the typed views that calls hand out.

Scope: every call returns views of the same storage, with stale or poisoned tails, as symmetric buffers give.
It proves nothing about heap sizes, alignment or caching of device memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from accelerated.standin.mori_ep.config import EpDispatchCombineConfig, recv_capacity

#: Content of integer buffers that nothing has written yet: no id, no position.
INT_POISON = 0x7ABADBAD

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


def padded(size: int) -> int:
    """Round bytes up to a whole number of 64-bit words."""
    return -(-size // 8) * 8


def raw(tensor: torch.Tensor, dtype: torch.dtype, rows: int, columns: int) -> torch.Tensor:
    """Read ``[rows, columns]`` of ``dtype`` from the address of ``tensor``, whatever its own dtype and strides are.

    The real library takes ``data_ptr()`` and nothing else, so an int64 index tensor or a transposed input is misread.
    What lies past the end of the storage reads as poison.
    """
    if tensor.dtype == dtype and tensor.is_contiguous() and tensor.numel() == rows * columns:
        return tensor.view(-1).view(rows, columns)  # strides of dimensions of size 0 and 1 are arbitrary
    count = rows * columns
    size = dtype.itemsize
    start = tensor.storage_offset() * tensor.element_size()
    storage = tensor.untyped_storage()
    memory: torch.Tensor = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(
        storage, 0, (storage.nbytes(),), (1,)
    )
    found = memory[start : start + count * size]
    missing = count * size - found.numel()
    if missing or start % size:
        found = torch.cat([found, torch.full((missing,), 0xFF, dtype=torch.uint8, device=tensor.device)])
    return found.view(dtype).view(rows, columns)


def as_words(tensor: torch.Tensor) -> torch.Tensor:
    """View contiguous rows ``[n, h]`` as the widest integer words that fill a row exactly."""
    size = tensor.size(1) * tensor.element_size()
    return tensor.view(_WORDS[math.gcd(size, 8)])


@dataclass(frozen=True)
class RowLayout:
    """Byte offsets of the sections of one packed row; every section starts on a 64-bit word."""

    payload: int  # bytes of the payload
    ids: int
    weights: int
    scales: int
    source: int
    size: int

    @property
    def words(self) -> int:
        """64-bit words of one row."""
        return self.size // 8


def row_layout(payload: int, k: int, scale_bytes: int) -> RowLayout:
    """Lay out ``[payload | ids | weights | scales | source]``; every rank derives the same one."""
    ids = padded(payload)
    weights = ids + padded(4 * k)
    scales = weights + padded(4 * k)
    source = scales + padded(scale_bytes)
    return RowLayout(payload, ids, weights, scales, source, source + 8)


class Sections:
    """Views of packed rows ``[Q, words]`` (int64): ``payload`` words, ``ids``, ``weights``, ``scales``, ``source``."""

    def __init__(self, rows: torch.Tensor, layout: RowLayout, k: int, scale_bytes: int) -> None:
        word = math.gcd(layout.payload, 8)
        narrow = rows.view(torch.int32)
        wide = rows.view(_WORDS[word])
        self.payload = wide[:, : layout.payload // word]
        self.ids = narrow[:, layout.ids // 4 : layout.ids // 4 + k]
        self.weights = narrow[:, layout.weights // 4 : layout.weights // 4 + k]
        self.scales = rows.view(torch.uint8)[:, layout.scales : layout.scales + scale_bytes]
        self.source = narrow[:, layout.source // 4]


class Buffers:
    """What the real operator allocates once. Index R of a dispatch output is a dump row that no view shows.

    Attributes (all persistent):
        out, scales: uint8 memory of received rows and scales; see :meth:`view`.
        ids: ``[R + 1, k]`` int32; weights: ``[R + 1, k]`` float32; source: ``[max(R, W*M*EPR) + 1]`` int32.
        total: ``[1]`` int32, starts at 0.
        registered: uint8 memory of the registered combine input.
        combined, combined_weights: outputs of combine, ``[M, ...]``.
    """

    def __init__(self, config: EpDispatchCombineConfig, device: torch.device) -> None:
        self.capacity = rows = recv_capacity(config)
        k, tokens = config.num_experts_per_token, config.max_num_inp_token_per_rank
        row = config.hidden_dim * config.max_token_type_size
        self.row_bytes = row

        def memory(size: int) -> torch.Tensor:  # 0xFF is a NaN in float32, bfloat16 and float8_e4m3fn
            return torch.full((padded(size),), 0xFF, dtype=torch.uint8, device=device)

        self.out = memory((rows + 1) * row)
        self.scales = memory((rows + 1) * config.scale_dim * 8)
        self.registered = memory(rows * row)
        self.combined = memory(tokens * row)
        self.ids = torch.full((rows + 1, k), INT_POISON, dtype=torch.int32, device=device)
        self.weights = torch.full((rows + 1, k), math.nan, dtype=torch.float32, device=device)
        sources = max(rows, config.world_size * tokens * config.num_experts_per_rank) + 1
        self.source = torch.full((sources,), INT_POISON, dtype=torch.int32, device=device)
        self.total = torch.zeros(1, dtype=torch.int32, device=device)
        self.combined_weights = torch.full((tokens, k), math.nan, dtype=torch.float32, device=device)

    @staticmethod
    def view(memory: torch.Tensor, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """Return ``[rows, columns]`` of ``dtype`` at the start of ``memory``."""
        return memory[: rows * columns * dtype.itemsize].view(dtype).view(rows, columns)
