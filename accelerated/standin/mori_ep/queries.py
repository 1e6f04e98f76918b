"""What the double's operator answers without moving rows: buffers, positions, capacities; and its reset.

Scope: python/mori/ops/dispatch_combine.py of MoRI 624002c8. It proves nothing about the cost of the synchronisation
that some of them imply.
"""

from __future__ import annotations

from typing import Any

import torch

from accelerated.standin.mori_ep import graphs
from accelerated.standin.mori_ep.buffers import Buffers
from accelerated.standin.mori_ep.config import recv_capacity, recv_capacity_per_rank
from accelerated.standin.mori_ep.positions import legacy_positions
from accelerated.standin.mori_ep.refusals import Refusals


class Queries(Refusals):
    """Queries of one operator."""

    def get_registered_combine_input_buffer(self, dtype: torch.dtype, hidden_dim: int = -1) -> torch.Tensor:
        """Return the registered buffer as ``[R, hidden_dim]`` of ``dtype``."""
        hidden = hidden_dim if hidden_dim > 0 else self.config.hidden_dim
        return Buffers.view(self._buffers.registered, self._buffers.capacity, hidden, dtype)

    def get_dispatch_src_token_pos(self) -> torch.Tensor:
        """Return ``[total_recv]`` int32, ``source_rank * W * M + token`` of each received row; empty after combine.

        Synchronises with the host. Legacy InterNode answers on the CPU with stride M instead of W * M, collectively.
        Rows received with a routing handle are not counted here.

        Raises:
            RuntimeError: a graph is being captured.
        """
        graphs.refuse("get_dispatch_src_token_pos()")
        total = int(self._buffers.total.item())
        positions = self._buffers.source[: min(total, self._buffers.source.numel() - 1)]
        if self._rules.name == "InterNode":
            return legacy_positions(positions, self.config, self._cur_n)
        return positions

    def decode_send_flat_idx(self, flat_idx: Any) -> tuple[int, int]:
        """Split ``source_rank * W * M + token``."""
        stride = self.max_num_tokens_to_send()
        return int(flat_idx) // stride, int(flat_idx) % stride

    def max_num_tokens_to_recv(self) -> int:
        """R, rows of every dispatch output."""
        return recv_capacity(self.config)

    def max_num_tokens_to_recv_per_rank(self) -> int:
        """Rows that one source may send here."""
        return recv_capacity_per_rank(self.config)

    def max_num_tokens_to_send(self) -> int:
        """W * M."""
        return self.config.world_size * self.config.max_num_inp_token_per_rank

    def max_num_tokens_to_send_per_rank(self) -> int:
        """M."""
        return self.config.max_num_inp_token_per_rank

    def reset(self) -> None:
        """Do nothing, as upstream; where that defect is off, forget the rows of the last dispatch."""
        if not self._on("reset-does-nothing"):
            self._buffers.total.zero_()
