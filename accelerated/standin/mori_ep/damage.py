"""What the defects of combine write where they should not, and read where nothing was written.

Scope: deterministic stand-ins for memory corruption, inside the double's own buffers: bytes past the staging memory
land in the dispatch output, which begins at the next boundary of the symmetric heap; those in the gap hit nothing. It
proves nothing about what lies next to a buffer on a device.
"""

from __future__ import annotations

import torch

from accelerated.standin.mori_ep.buffers import Buffers
from accelerated.standin.mori_ep.codecs import Codec
from accelerated.standin.mori_ep.config import EpDispatchCombineConfig, recv_capacity
from accelerated.standin.mori_ep.state import Round

#: Every allocation of the symmetric heap begins at a multiple of this many bytes (src/shmem/memory.cpp).
HEAP_ALIGNMENT = 256


def take(table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Read ``rows [Q]`` of ``table [s, c]`` float32; rows past its end read as poison."""
    found = table.index_select(0, rows.clamp(max=table.size(0) - 1))
    return found.masked_fill((rows >= table.size(0)).unsqueeze(1), float("nan"))


def stale_row(answers: torch.Tensor, before: torch.Tensor | None, done: Round, rank: int) -> None:
    """Put back one answer from another rank as the combine before left it."""
    if before is None or before.shape != answers.shape:
        return
    lookup = done.lookup.view(-1, done.n)
    late = (lookup != done.plan.nothing) & (done.owners.t() != rank)
    rows = lookup[late]
    if len(rows):
        answers[rows[-1]] = before[rows[-1]]


def node_terms(partials: list[torch.Tensor], slots: int) -> list[torch.Tensor]:
    """Mix up node sums where a warp's list holds ``slots`` nodes: the rest is read from the next token's list."""
    return [partial if node < slots else partials[node - slots].roll(-1, 0) for node, partial in enumerate(partials)]


def fan_out(table: torch.Tensor, blocks: int, epoch: int) -> None:
    """Write ``epoch`` into a line of 64 bytes for each block from the start of ``table`` int32, as far as memory goes.

    A table of the caller's may be part of a longer tensor; what the library would hit past that is not modelled.
    """
    words = table.untyped_storage().nbytes() // 4 - table.storage_offset()
    memory = table.as_strided((words,), (1,))
    memory[: 16 * blocks : 16] = epoch


def staging_bytes(config: EpDispatchCombineConfig, kind: str, codec: Codec | None) -> int:
    """Bytes of the staging memory of combine (src/ops/dispatch_combine/dispatch_combine.cpp)."""
    row = config.hidden_dim * config.max_token_type_size
    head = 8 * config.num_experts_per_token + 4
    rows = recv_capacity(config)
    if kind == "AsyncLL":
        rows = config.world_size * config.max_num_inp_token_per_rank
    if kind == "IntraNode" and codec is not None and codec.blockwise:
        tokens = (config.hidden_dim + 1) // 2 if codec.name == "fp4_blockwise" else row
        return rows * (tokens + head + 4 * codec.scale_dim)
    return rows * (row + head + config.scale_dim * config.scale_type_size)


def next_on_heap(size: int) -> int:
    """Where memory begins that is allocated after ``size`` bytes."""
    return -(-size // HEAP_ALIGNMENT) * HEAP_ALIGNMENT


def overrun(
    buffers: Buffers,
    answers: torch.Tensor,
    done: Round,
    config: EpDispatchCombineConfig,
    kind: str,
    codec: Codec | None,
    hidden: int,
    rows: torch.Tensor,
    weighted: bool,
) -> None:
    """Write what peers pushed past the end of this rank's staging memory into the dispatch output behind it."""
    slot = hidden * rows.element_size() if codec is None else codec.row_bytes(hidden)
    slot += 4 * config.num_experts_per_token * weighted
    room, tokens = next_on_heap(staging_bytes(config, kind, codec)), config.max_num_inp_token_per_rank
    if config.world_size * tokens * slot <= room:
        return
    lookup = done.lookup.view(-1, done.n).t()
    for token, place in (lookup != done.plan.nothing).nonzero().tolist():
        end = (int(done.owners[token, place]) * tokens + token + 1) * slot
        if end > room:
            written = answers[lookup[token, place]].view(torch.uint8)[:slot]
            start = max(end - slot - room, 0)
            written = written[len(written) - min(len(written), end - room) :][: max(buffers.out.numel() - start, 0)]
            buffers.out[start : start + len(written)].copy_(written)
