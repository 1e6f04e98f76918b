"""The standard-MoE (expert-major) entry points of a MoRI that was built without them, as it is by default.

Scope: the refusal and its type. It proves nothing about a build with ENABLE_STANDARD_MOE_ADAPT=ON.
"""

from __future__ import annotations

import torch

_NOT_BUILT = "{} is not available; rebuild MoRI with ENABLE_STANDARD_MOE_ADAPT=ON"


class StandardMoeNotBuilt:
    """Mixin with the four entry points; each raises RuntimeError (python/mori/ops/dispatch_combine.py)."""

    def dispatch_standard_moe(
        self,
        input: torch.Tensor,
        weights: torch.Tensor | None,
        scales: torch.Tensor | None,
        indices: torch.Tensor,
        block_num: int = -1,
        rdma_block_num: int = -1,
        warp_per_block: int = -1,
    ) -> None:
        """Raise RuntimeError: not built."""
        raise RuntimeError(_NOT_BUILT.format("dispatch_standard_moe"))

    def combine_standard_moe(
        self,
        input: torch.Tensor,
        weights: torch.Tensor | None,
        indices: torch.Tensor,
        block_num: int = -1,
        rdma_block_num: int = -1,
        warp_per_block: int = -1,
        call_reset: bool = False,
    ) -> None:
        """Raise RuntimeError: not built."""
        raise RuntimeError(_NOT_BUILT.format("combine_standard_moe"))

    def convert_dispatch_output(
        self,
        dispatch_out_x: torch.Tensor,
        dispatch_out_topk_idx: torch.Tensor,
        block_num: int = -1,
        warp_per_block: int = -1,
    ) -> None:
        """Raise RuntimeError: not built."""
        raise RuntimeError(_NOT_BUILT.format("convert_dispatch_output"))

    def convert_combine_input(
        self,
        packed_recv_x: torch.Tensor,
        packed_recv_src_info: torch.Tensor,
        packed_recv_layout_range: torch.Tensor,
        block_num: int = -1,
        warp_per_block: int = -1,
    ) -> None:
        """Raise RuntimeError: not built."""
        raise RuntimeError(_NOT_BUILT.format("convert_combine_input"))
