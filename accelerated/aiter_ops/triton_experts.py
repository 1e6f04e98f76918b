"""AITER's Triton expert kernels behind the interface of experts: the sorted form.

Scope: sorting, buffers, the order of the calls, and the layouts of weights; what both forms share is here too. Sources:
ROCm/aiter e4048607, aiter/ops/triton/moe/{moe_align_block_size,moe_op,moe_op_silu_fused,moe_op_e2e,moe_op_mxfp4}.py,
aiter/ops/triton/activation.py; composed as op_tests/triton_tests/moe/test_moe.py does: GEMM, activation, GEMM with the
routing weight, sum over the slots. What a call that returns does not prove: anything about its result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from accelerated.aiter_ops import triton_experts_contract as declared
from accelerated.aiter_ops.triton_library import TritonLibrary
from accelerated.aiter_ops.triton_moe_library import TritonMoe
from accelerated.experts import ExpertContract, ExpertProblem
from reference.codecs import Granularity, ScaleFormat
from reference.expert_weights import ExpertWeights
from reference.formats import E2M1, E8M0_BIAS
from reference.layouts import pack_e2m1

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
#: Tile sizes of upstream's test of e2e_moe; the library has no configuration of its own for it.
E2E_CONFIG = {
    "BLOCK_SIZE_M": 64,
    "BLOCK_SIZE_N": 2 * declared.E2E_COLUMNS,
    "BLOCK_SIZE_K1": 64,
    "BLOCK_SIZE_K2": 64,
    "GROUP_SIZE_M": 2,
}


class Experts:
    """What every form shares: weights as the kernels want them, the slot of every id, and the checks of a call.

    Args:
        library: the loaded tree.
        moe: its mixture-of-experts part.
        problem: sizes.
        operator: a key of :data:`accelerated.aiter_ops.triton_experts_contract.OPERATORS`.
    """

    def __init__(self, library: TritonLibrary, moe: TritonMoe, problem: ExpertProblem, operator: str) -> None:
        self.library, self.moe, self.problem, self.operator = library, moe, problem, operator
        self.contract: ExpertContract = declared.contract(problem, operator, library.arch)
        self.dtype = _DTYPES[problem.dtype]

    def load(self, weights: ExpertWeights, owned: Sequence[int]) -> None:
        """Take the weights of the experts ``owned``.

        Raises:
            ValueError: they are stored otherwise than the contract says, or not one per id.
        """
        if weights.codec != self.contract.weight_codec or (weights.bias1 is None) == self.contract.biased:
            raise ValueError(
                f"{self.operator} takes weights stored as {self.contract.weight_codec}, biases: "
                f"{self.contract.biased}; these are stored as {weights.codec}, biases: {weights.bias1 is not None}"
            )
        if len(owned) != weights.experts or not owned:
            raise ValueError(f"{len(owned)} ids for {weights.experts} experts; give one each, and at least one")
        slots = torch.full((self.problem.experts + self.problem.shared,), -1, dtype=torch.int32)
        slots[torch.tensor(list(owned))] = torch.arange(len(owned), dtype=torch.int32)
        self.slot_of = slots.to(weights.w1.device)
        self.slots = len(owned)
        self._take(weights)

    def _take(self, weights: ExpertWeights) -> None:
        self.w1, self.scale1 = stored(weights.w1, weights.w1_scales, weights, self.library)
        self.w2, self.scale2 = stored(weights.w2, weights.w2_scales, weights, self.library)

    def quantise(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows as a dispatch carries them; themselves and None where there is no wire."""
        if self.contract.wire is None:
            return rows, None
        codes, scales = self._group_quantise(rows)
        return codes.view(torch.uint8), scales

    def _group_quantise(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Not get_triton_quant(per_1x128), which makes NaN of a group of zeros.
        groups = rows.view(rows.shape[0], self.problem.hidden // 128, 128)
        codes, scales = self.library.quant.fused_flatten_fp8_group_quant(
            groups, group_size=128, dtype_quant=self.library.fp8
        )
        return codes, scales

    def _mxfp4_quantise(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes, scales = self.library.fp4.dynamic_mxfp4_quant(rows, shuffle=False)
        return codes.view(torch.uint8), scales.view(torch.uint8)

    def _checked(
        self,
        rows: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        scales: torch.Tensor | None,
        num_rows: torch.Tensor | None,
    ) -> torch.Tensor:
        """The ids, those of invalid rows and those beyond the last expert replaced by -1.

        Raises:
            ValueError: arguments that do not fit the problem or the contract.
        """
        count, hidden = rows.shape
        if hidden != self.problem.hidden or count > self.problem.capacity or not rows.is_contiguous():
            raise ValueError(
                f"rows have shape {tuple(rows.shape)} and strides {rows.stride()}; give at most "
                f"{self.problem.capacity} contiguous rows of {self.problem.hidden}"
            )
        if ids.shape != weights.shape or ids.shape != (count, self.problem.top_k) or ids.dtype != torch.int32:
            raise ValueError(
                f"ids are {ids.dtype} {tuple(ids.shape)}, weights {tuple(weights.shape)}; give int32 and float32 "
                f"{(count, self.problem.top_k)}"
            )
        if scales is not None and self.contract.wire is None:
            raise ValueError(f"{self.operator} takes no scales; its contract has no wire")
        if num_rows is None:
            return ids
        if not self.contract.takes_num_rows:
            raise ValueError(f"{self.operator} takes no num_rows; its contract says so")
        valid = torch.arange(count, device=ids.device)[:, None] < num_rows
        return torch.where(valid, ids, -1)

    def _slots_of(self, ids: torch.Tensor) -> torch.Tensor:
        """Local slot of every id, and the number of slots where there is none; int32, same shape."""
        known = (ids >= 0) & (ids < len(self.slot_of))
        slots = self.slot_of[torch.where(known, ids, 0).long()]
        return torch.where(known & (slots >= 0), slots, self.slots)

    def close(self) -> None:
        return None


def stored(
    matrices: torch.Tensor, scales: torch.Tensor | None, weights: ExpertWeights, library: TritonLibrary
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Matrices ``[n, N, K]`` as a kernel reads them, and their scales: bytes for E8M0, ``[n]`` for one per tensor."""
    if weights.codec is None or scales is None:
        return matrices.contiguous(), None
    if weights.codec.scale_format is ScaleFormat.E8M0:
        exponents = torch.frexp(scales).exponent - 1 + E8M0_BIAS
        codes = pack_e2m1(matrices) if weights.codec.payload is E2M1 else _fp8(matrices, torch.float8_e4m3fn)
        return codes, exponents.to(torch.uint8)
    laid_out = scales.float()
    if weights.codec.granularity is Granularity.TENSOR:
        laid_out = laid_out.reshape(-1)
    return _fp8(matrices, library.fp8), laid_out.contiguous()


def _own(weights: torch.Tensor) -> torch.Tensor:
    """A copy whose last stride is 1 whatever the shape: with one row or column a contiguous tensor may have another."""
    return weights.clone(memory_format=torch.contiguous_format)


def _fp8(codes: torch.Tensor, dtype: Any) -> torch.Tensor:
    return codes.to(torch.uint8).contiguous().view(dtype)


class SortedExperts(Experts):
    """Pairs sorted by expert, one expert per block of rows."""

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
        with torch.no_grad():
            return _CALLS[self.operator](self, rows, self._slots_of(ids), _own(weights), scales)

    def _config(self, **kind: bool) -> Callable[[int], dict[str, Any]]:
        """Tile sizes by number of rows."""
        found: Callable[[int], dict[str, Any]] = self.moe.config(self.dtype, **kind)
        return found

    def _sort(self, slots: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sorted pairs, the expert of every block (-1: none of these), and how many pairs there are with padding.

        The library reads and writes histograms at the ids that it is given, so those without a local expert form one
        more expert, the last.
        """
        groups = self.slots + 1
        room = slots.numel() + groups * (block - 1)
        pairs = torch.full((room,), slots.numel(), dtype=torch.int32, device=slots.device)
        experts = torch.full((-(-room // block),), self.slots, dtype=torch.int32, device=slots.device)
        padded = torch.zeros(1, dtype=torch.int32, device=slots.device)
        self.moe.align(
            slots.contiguous(),
            num_experts=groups,
            block_size=block,
            sorted_token_ids=pairs,
            expert_ids=experts,
            num_tokens_post_pad=padded,
        )
        return pairs, torch.where(experts == self.slots, -1, experts), padded

    def _gemm(
        self,
        kernel: Any,
        left: torch.Tensor,
        second: bool,
        output: torch.Tensor,
        plan: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        slots: torch.Tensor,
        weights: torch.Tensor,
        config: dict[str, Any],
        **scaled: Any,
    ) -> None:
        """One GEMM over sorted pairs; the second multiplies by the routing weights."""
        pairs, experts, padded = plan
        kernel(
            left,
            self.w2 if second else self.w1,
            output,
            topk_weights=weights,
            topk_ids=slots,
            sorted_token_ids=pairs,
            expert_ids=experts,
            num_tokens_post_padded=padded,
            mul_routed_weight=second,
            top_k=1 if second else slots.shape[1],
            compute_type=self.moe.triton_dtype[self.dtype],
            config=config,
            **scaled,
        )

    def _new(self, slots: torch.Tensor, columns: int) -> torch.Tensor:
        """A buffer ``[M, k, columns]``; the kernels write all of it, zeros where there is no expert."""
        return torch.empty((*slots.shape, columns), dtype=self.dtype, device=slots.device)

    def fused(
        self, rows: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor | None
    ) -> torch.Tensor:
        """``triton.fused_moe.bf16`` and ``.fp8_tensor``; FP8 is quantised within the call (moe_op.py:116-118)."""
        fp8 = self.contract.weight_codec is not None
        config = self._config(use_fp8_w8a8=fp8)(rows.shape[0])
        plan = self._sort(slots, config["BLOCK_SIZE_M"])
        first = self._new(slots, 2 * self.problem.intermediate)
        self._gemm(self.moe.fused_moe, rows, False, first, plan, slots, weights, config, **_linear(self.scale1))
        hidden = self.moe.silu_and_mul(first.view(-1, first.shape[2]))
        return self._second(hidden, plan, slots, weights, config)

    def _second(
        self,
        hidden: torch.Tensor,
        plan: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        slots: torch.Tensor,
        weights: torch.Tensor,
        config: dict[str, Any],
        **scaled: Any,
    ) -> torch.Tensor:
        """W2 and the sum over the slots."""
        output = self._new(slots, self.problem.hidden)
        given = _linear(self.scale2) | scaled
        self._gemm(self.moe.fused_moe, hidden, True, output, plan, slots, weights, config, **given)
        return output.sum(1)

    def fused_block(
        self, rows: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor | None
    ) -> torch.Tensor:
        """``triton.fused_moe.fp8_block``: both quantisers are the caller's business."""
        config = self._config(use_fp8_w8a8=True)(rows.shape[0])
        codes = rows.view(self.library.fp8) if scales is not None else rows
        if scales is None:
            codes, scales = self._group_quantise(rows)
        plan, shape = self._sort(slots, config["BLOCK_SIZE_M"]), [128, 128]
        first = self._new(slots, 2 * self.problem.intermediate)
        given = _linear(self.scale1) | {"A_scale": scales, "block_shape": shape}
        self._gemm(self.moe.fused_moe, codes, False, first, plan, slots, weights, config, **given)
        hidden, of_hidden = self.moe.act_mul_fp8(
            first.view(-1, first.shape[2]), "silu", 128, dtype_quant=self.library.fp8
        )
        return self._second(hidden, plan, slots, weights, config, A_scale=of_hidden, block_shape=shape)

    def silu_fused(
        self, rows: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor | None
    ) -> torch.Tensor:
        """``triton.silu_fused.bf16``."""
        config = self._config()(rows.shape[0])
        plan = self._sort(slots, config["BLOCK_SIZE_M"])
        # One row more: where there is no expert the kernel writes zeros to W1's columns, twice as many as a row has.
        room = rows.new_empty((slots.numel() + 1, self.problem.intermediate))
        hidden = room[:-1]
        self._gemm(self.moe.fused_moe_silu, rows, False, hidden, plan, slots, weights, config, **_linear(None))
        return self._second(hidden, plan, slots, weights, config)

    def e2e(
        self, rows: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor | None
    ) -> torch.Tensor:
        """``triton.e2e.bf16``: the kernel adds to what the output holds."""
        pairs, experts, padded = self._sort(slots, E2E_CONFIG["BLOCK_SIZE_M"])
        result = self.moe.e2e_moe(
            rows,
            self.w1,
            self.w2,
            Intermediate=None,
            C=self._new(slots, self.problem.hidden).zero_(),
            A_scale=None,
            W1_scale=None,
            W2_scale=None,
            topk_weights=weights,
            sorted_token_ids=pairs,
            topk_ids=slots,
            expert_ids=experts,
            num_tokens_post_padded=padded,
            mul_routed_weight=True,
            top_k=slots.shape[1],
            use_fp8_w8a8=False,
            use_int8_w8a16=False,
            config=dict(E2E_CONFIG),
        )
        return torch.as_tensor(result).sum(1)

    def mxfp4(
        self, rows: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor | None
    ) -> torch.Tensor:
        """``triton.fused_moe.mxfp4`` and ``.mxfp4_bf16``."""
        quantised = self.contract.numerics(rows.shape[0]).input_codec is not None
        config = self._config(use_mxfp4=quantised)(rows.shape[0])
        plan = self._sort(slots, config["BLOCK_SIZE_M"])
        codes, given = self._mxfp4_quantise(rows) if quantised else (rows, None)
        first = self._new(slots, 2 * self.problem.intermediate)
        self._gemm_mxfp4(codes, given, False, first, plan, slots, weights, config)
        flat = first.view(-1, first.shape[2])
        if quantised:
            hidden, of_hidden = self.moe.act_mul_mxfp4(flat, "silu")
        else:
            hidden, of_hidden = self.moe.silu_and_mul(flat), None
        output = self._new(slots, self.problem.hidden)
        self._gemm_mxfp4(hidden, of_hidden, True, output, plan, slots, weights, config)
        return output.sum(1)

    def _gemm_mxfp4(
        self,
        left: torch.Tensor,
        left_scales: torch.Tensor | None,
        second: bool,
        output: torch.Tensor,
        plan: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        slots: torch.Tensor,
        weights: torch.Tensor,
        config: dict[str, Any],
    ) -> None:
        one = torch.ones(1, dtype=torch.float32, device=slots.device)
        self._gemm(
            self.moe.fused_moe_mxfp4,
            left,
            second,
            output,
            plan,
            slots,
            weights,
            config,
            A_scale=one,
            B_scale=one.expand(self.slots).contiguous(),
            A_mx_scale=left_scales,
            B_mx_scale=self.scale2 if second else self.scale1,
            swizzle_mx_a=False,
            swizzle_mx_b=False,
        )


def _linear(scale: torch.Tensor | None) -> dict[str, Any]:
    """Arguments of ``fused_moe`` and ``fused_moe_silu`` that say how the factors are stored."""
    return {
        "A_scale": None,
        "B_scale": scale,
        "B_zp": None,
        "use_fp8_w8a8": scale is not None,
        "use_int8_w8a16": False,
        "use_int4_w4a16": False,
    }


_Call = Callable[[SortedExperts, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
_CALLS: dict[str, _Call] = {
    "triton.fused_moe.bf16": SortedExperts.fused,
    "triton.fused_moe.fp8_tensor": SortedExperts.fused,
    "triton.fused_moe.fp8_block": SortedExperts.fused_block,
    "triton.silu_fused.bf16": SortedExperts.silu_fused,
    "triton.e2e.bf16": SortedExperts.e2e,
    "triton.fused_moe.mxfp4": SortedExperts.mxfp4,
    "triton.fused_moe.mxfp4_bf16": SortedExperts.mxfp4,
}
