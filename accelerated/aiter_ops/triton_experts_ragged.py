"""AITER's Triton grouped GEMMs with routing data behind the interface of experts: the ragged form.

Scope: routing data from ids, gather, two GEMMs and the scatter that sums the slots. Sources: ROCm/aiter e4048607,
aiter/ops/triton/fusions/fused_routing_from_topk.py, aiter/ops/triton/moe/{moe_op_gemm_a8w8,moe_op_gemm_a8w8_blockscale,
moe_op_gemm_a8w4,moe_op_gemm_a4w4,moe_op_gemm_a16w4,quant_moe,reduce}.py; composed as their tests do. Pairs of other
ranks' experts are given to the first local expert with weight zero, as ``fused_routing_from_topk`` has it. What a call
that returns does not prove: anything about its result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from accelerated.aiter_ops.triton_experts import Experts, stored
from reference.expert_numerics import SWIGLU_ALPHA, Activation
from reference.expert_weights import ExpertWeights

_Pair = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class Routing:
    """Routing data of one call.

    Attributes:
        data: the library's ``RoutingData``.
        gather: pair of every sorted position.
        scatter: sorted position of every pair.
        weights: of every sorted position.
    """

    data: Any
    gather: torch.Tensor
    scatter: torch.Tensor
    weights: torch.Tensor


def block_map(counts: torch.Tensor, pairs: int, block: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What ``ExptData`` says beside the histogram: offsets of rows, offsets of tiles, and (tile << 16 | expert) or -1.

    Args:
        counts: rows of every expert, int32 ``[n]``.
        pairs: their sum.
        block: rows of a tile.
    """
    experts = counts.shape[0]
    zero = counts.new_zeros(1)
    offsets = torch.cat([zero, counts.cumsum(0, dtype=torch.int32)])
    tiles = torch.cat([zero, ((counts + block - 1) // block).cumsum(0, dtype=torch.int32)])
    most = pairs if pairs <= experts else experts - 1 + -(-(pairs - experts + 1) // block)
    tile = torch.arange(most, dtype=torch.int32, device=counts.device)
    expert = torch.searchsorted(tiles[1:], tile, right=True, out_int32=True)
    within = tile - tiles[expert.clamp(max=experts - 1).long()]
    used = torch.where(expert < experts, (within << 16) + expert, -1)
    return offsets, tiles, used.to(torch.int32)


class RaggedExperts(Experts):
    """Rows gathered by expert, two grouped GEMMs, and a scatter that sums the slots."""

    def _take(self, weights: ExpertWeights) -> None:
        gate_up, scales = stored(weights.w1, weights.w1_scales, weights, self.library)
        down, down_scales = stored(weights.w2, weights.w2_scales, weights, self.library)
        bias = weights.bias1
        if self.contract.gate_layout.name == "INTERLEAVED":
            gate_up = _interleaved(gate_up)
            scales = None if scales is None else _interleaved(scales)
            bias = None if bias is None else _interleaved(bias)
        # The kernels take [n, K, N] with K contiguous.
        self.w1, self.scale1 = gate_up.mT, None if scales is None else scales.mT
        self.w2, self.scale2 = down.mT, None if down_scales is None else down_scales.mT
        self.bias1, self.bias2 = bias, weights.bias2

    def experts(
        self,
        rows: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        *,
        scales: torch.Tensor | None = None,
        num_rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See :meth:`accelerated.experts.ExpertOperation.experts`.

        Raises:
            ValueError: arguments that do not fit the problem or the contract.
        """
        ids = self._checked(rows, ids, weights, scales, num_rows)
        if not ids.numel():
            return rows.new_zeros(rows.shape, dtype=self.dtype)
        with torch.no_grad():
            return _CALLS[self.operator](self, rows, self._route(ids, weights), scales)

    def _route(self, ids: torch.Tensor, weights: torch.Tensor) -> Routing:
        counts, gather, scatter, sorted_weights = self.moe.routing_from_topk(
            weights.contiguous(), ids.contiguous(), n_expts_tot=self.slots, expert_map=self.slot_of
        )
        pairs = ids.numel()
        # As routing() chooses the rows of a tile (moe_routing/routing.py:303-307).
        block = max(16, min(1 << (max(1, pairs // self.slots) - 1).bit_length(), 128))
        offsets, tiles, blocks = block_map(counts, pairs, block)
        found = self.moe.routing.ExptData(
            hist=counts, token_offs_raw=offsets, token_offs_pad=tiles, block_pid_map=blocks
        )
        data = self.moe.routing.RoutingData(
            block_m=block,
            gate_scal=sorted_weights,
            expt_hist=counts,
            n_expts_tot=self.slots,
            n_expts_act=ids.shape[1],
            expt_data=found,
        )
        return Routing(data, gather, scatter, sorted_weights)

    def _activation(self) -> dict[str, Any]:
        """Arguments by which the first GEMM applies its activation."""
        numerics = self.contract.numerics(1)
        swiglu = numerics.activation is Activation.SWIGLU
        return {
            "apply_swiglu": True,
            "alpha": SWIGLU_ALPHA if swiglu else 1.0,
            "limit": numerics.limit,
            "swiglu_add_residual": swiglu,
        }

    def _gather(self, routing: Routing, **more: Any) -> dict[str, Any]:
        """Arguments of the first GEMM."""
        return {"bias": self.bias1, "routing_data": routing.data, "gather_indx": routing.gather, **more}

    def _scatter(self, routing: Routing, **more: Any) -> dict[str, Any]:
        """Arguments of the second GEMM."""
        return {
            "bias": self.bias2,
            "routing_data": routing.data,
            "scatter_indx": routing.scatter,
            "gammas": routing.weights,
            **more,
        }

    def _mxfp8_quantise(self, rows: torch.Tensor) -> _Pair:
        codes, scales = self.moe.downcast_to_mxfp(rows, torch.float8_e4m3fn, axis=-1)
        return codes, scales

    def _mxfp4_of_gemm(self, rows: torch.Tensor) -> _Pair:
        codes, scales = self.moe.mxfp4_quant(rows)
        return codes, scales

    def microscaled(self, rows: torch.Tensor, routing: Routing, scales: torch.Tensor | None) -> torch.Tensor:
        """Every operator whose activation is applied by the first GEMM."""
        kernel, quantise = _KERNELS[self.operator.removesuffix(".swiglu")]
        gemm = getattr(self.moe, kernel)

        def quantised(x: torch.Tensor) -> _Pair:
            return getattr(self, quantise)(x) if quantise else (x, None)  # type: ignore[no-any-return]

        codes, given = quantised(rows)
        hidden = gemm(codes, self.w1, given, self.scale1, **self._gather(routing, **self._activation()))
        codes, given = quantised(hidden)
        output: torch.Tensor = gemm(codes, self.w2, given, self.scale2, **self._scatter(routing))
        return output

    def block(self, rows: torch.Tensor, routing: Routing, scales: torch.Tensor | None) -> torch.Tensor:
        """``triton.gemm_a8w8.block``: blocks of 128 rows of W1 forbid to interleave gate and up."""
        codes = rows.view(self.library.fp8) if scales is not None else rows
        if scales is None:
            codes, scales = self._group_quantise(rows)
        given = self._gather(routing, per_row_x_scale=True)
        first = self.moe.gemm_a8w8_block(codes, self.w1, scales, self.scale1, **given)
        hidden, of_hidden = self.moe.act_mul_fp8(first, "silu", 128, dtype_quant=self.library.fp8)
        given = self._scatter(routing, per_row_x_scale=True)
        output: torch.Tensor = self.moe.gemm_a8w8_block(hidden, self.w2, of_hidden, self.scale2, **given)
        return output


def _interleaved(separated: torch.Tensor) -> torch.Tensor:
    """Dimension 1 from gate rows, then up rows, to one of each in turn."""
    gate, up = separated.view(torch.uint8).chunk(2, 1) if separated.element_size() == 1 else separated.chunk(2, 1)
    return torch.stack([gate, up], 2).flatten(1, 2).view(separated.dtype)


#: Grouped GEMM, and the quantiser of its left factor.
_KERNELS = {
    "triton.gemm_a8w8.mx": ("gemm_a8w8", "_mxfp8_quantise"),
    "triton.gemm_a8w4": ("gemm_a8w4", "_mxfp8_quantise"),
    "triton.gemm_a4w4": ("gemm_a4w4", "_mxfp4_of_gemm"),
    "triton.gemm_a16w4": ("gemm_a16w4", ""),
}
_Call = Callable[[RaggedExperts, torch.Tensor, Routing, torch.Tensor | None], torch.Tensor]
_CALLS: dict[str, _Call] = {
    "triton.gemm_a8w8.mx": RaggedExperts.microscaled,
    "triton.gemm_a8w8.block": RaggedExperts.block,
    "triton.gemm_a8w4": RaggedExperts.microscaled,
    "triton.gemm_a8w4.swiglu": RaggedExperts.microscaled,
    "triton.gemm_a4w4": RaggedExperts.microscaled,
    "triton.gemm_a4w4.swiglu": RaggedExperts.microscaled,
    "triton.gemm_a16w4.swiglu": RaggedExperts.microscaled,
}
