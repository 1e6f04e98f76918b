"""Double of ``aiter.dist.device_communicators.communicator_cuda``: the thresholds, and what runs where they fail.

Scope: thresholds at their defaults (no environment variable is read), quick-reduce off, inputs as wide as the weight.
RCCL is torch.distributed's all-reduce. It proves nothing about AMD hardware or RCCL.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from accelerated.standin.aiter_ops import fused_norm
from accelerated.standin.aiter_ops.custom_all_reduce import FUSED, CustomAllreduce, is_weak_contiguous
from accelerated.standin.aiter_ops.ops.enum import QuantType
from accelerated.standin.aiter_ops.ops.quant import get_hip_quant
from accelerated.standin.aiter_ops.ops.rmsnorm import rmsnorm2d_fwd_with_add
from accelerated.standin.aiter_ops.utility import dtypes

_FUSED_BYTES = 8 * 1024 * 8192


class CudaCommunicator:
    """All-reduce and its fusions of one group.

    Args:
        cpu_group: of the metadata.
        device: of the rows.
        device_group: of the rows.
        custom: whether to make a :class:`CustomAllreduce`.
    """

    qr_comm = None

    def __init__(
        self, cpu_group: dist.ProcessGroup, device: torch.device, device_group: dist.ProcessGroup, custom: bool
    ) -> None:
        self.world_size = dist.get_world_size(cpu_group)
        self.device_group = device_group
        self.ca_comm = CustomAllreduce(cpu_group, device, device_group) if custom else None

    def all_reduce(
        self, input_: torch.Tensor, use_new: bool = True, ca_fp8_quant: bool = False, prefill_support: bool = False
    ) -> torch.Tensor:
        """Sum over ranks in the input's type: by the custom kernels where they take it, else by RCCL."""
        if self.ca_comm is not None and self.ca_comm.should_custom_ar(input_, prefill_support):
            out = self.ca_comm.custom_all_reduce(input_, use_new, ca_fp8_quant)
            assert out is not None
            return out
        out = input_.clone()
        dist.all_reduce(out, group=self.device_group)
        return out

    def fused_allreduce_rmsnorm(
        self,
        input_: torch.Tensor,
        res_inp_: torch.Tensor,
        weight_: torch.Tensor,
        eps: float,
        prefill_support: bool = False,
        x_pad_to_multiple: int = 0,
        gemma_norm: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(output, residual out): fused below 64 MiB and up to 16,384 columns, else two calls.

        Raises:
            RuntimeError: widths that differ, or what the fused kernels raise.
            NotImplementedError: strided or padded rows, which the double does not have.
        """
        n, size = weight_.numel(), input_.numel() * input_.element_size()
        if res_inp_.shape[-1] != n or input_.shape[-1] < n:
            raise RuntimeError(
                f"the residual has {res_inp_.shape[-1]} columns and the rows {input_.shape[-1]} for a weight of {n}"
            )
        dense = is_weak_contiguous(input_) and is_weak_contiguous(res_inp_)
        if not dense or input_.shape[-1] != n or x_pad_to_multiple:
            raise NotImplementedError("the double takes dense rows as wide as the weight, without padding")
        fuses = n <= 16384 and size < _FUSED_BYTES and self.world_size != 6
        ca = self.ca_comm
        if fuses and ca is not None and ca.should_custom_ar(input_, prefill_support):
            one_stage = size <= 128 * 7168 * 2 // self.world_size
            result = ca.custom_fused_ar_rms(input_, res_inp_, weight_, eps, one_stage, n, gemma_norm)
            assert result is not None
            return result
        reduced = self.all_reduce(input_, prefill_support=prefill_support)
        out, residual_out = torch.empty_like(reduced), torch.empty_like(reduced)
        rmsnorm2d_fwd_with_add(out, reduced, res_inp_, residual_out, weight_, eps, gemma_norm, 0)
        return out, residual_out

    def fused_allreduce_rmsnorm_quant(
        self,
        input_: torch.Tensor,
        res_inp_: torch.Tensor,
        weight_: torch.Tensor,
        eps: float,
        prefill_support: bool = False,
        quant_type: Any = "per_token",
        group_size: int = 128,
        emit_bf16: bool = False,
        transpose_scale: bool = False,
        gemma_norm: bool = False,
    ) -> tuple[torch.Tensor, ...]:
        """(codes, residual out, scales[, output]).

        Raises:
            NotImplementedError: Gemma with another quantiser than per token.
            TypeError: the custom all-reduce is there but takes no such input: its None is unpacked.
        """
        if gemma_norm and quant_type != "per_token":
            raise NotImplementedError("of the quantised forms only the one per token knows Gemma's weight")
        common = (input_, res_inp_, weight_, eps)
        if quant_type == "per_group":
            return self.fused_allreduce_rmsnorm_quant_per_group(
                *common, group_size, prefill_support, emit_bf16, transpose_scale
            )
        if quant_type == "mxfp4":
            return self.fused_allreduce_rmsnorm_mxfp4_quant(*common, prefill_support, emit_bf16)
        hidden, size = input_.shape[-1], input_.numel() * input_.element_size()
        wide = hidden in (6144, 7168) and input_.dtype in (torch.float16, torch.bfloat16)
        if (hidden in (512, 1024, 2048, 4096) or wide) and size <= 4096 * 1024:
            ca: Any = self.ca_comm
            found = ca.custom_fused_ar_rms_quant(
                *common, size <= 128 * 1024, gemma_norm=gemma_norm, emit_bf16=emit_bf16
            )
            if emit_bf16:
                codes, residual, scales, output = found
                return codes, residual, scales, output
            codes, residual, scales = found
            return codes, residual, scales
        output, residual = self.fused_allreduce_rmsnorm(*common, prefill_support, gemma_norm=gemma_norm)
        codes, scales = get_hip_quant(QuantType.per_Token)(output, quant_dtype=dtypes.fp8)
        return (codes, residual, scales, *((output,) if emit_bf16 else ()))

    def fused_allreduce_rmsnorm_quant_per_group(
        self,
        input_: torch.Tensor,
        res_inp_: torch.Tensor,
        weight_: torch.Tensor,
        eps: float,
        group_size: int = 128,
        prefill_support: bool = False,
        emit_bf16: bool = False,
        transpose_scale: bool = False,
    ) -> tuple[torch.Tensor, ...]:
        """The same by groups. Whatever the fused kernel raises is swallowed; the fallback has groups of 128."""
        common = (input_, res_inp_, weight_, eps)
        columns, size = input_.shape[-1], input_.numel() * input_.element_size()
        found: tuple[torch.Tensor, ...] | None = None
        if columns % group_size == 0 and columns <= 16384 and size < _FUSED_BYTES and self.world_size != 6:
            ca: Any = self.ca_comm
            try:
                found = ca.custom_fused_ar_rms_per_group_quant(
                    *common, group_size, size <= 128 * 1024, emit_bf16=emit_bf16, transpose_scale=transpose_scale
                )
            except Exception:  # noqa: BLE001 - as the real one (communicator_cuda.py:532)
                found = None
        if found is not None:
            return found
        output, residual = self.fused_allreduce_rmsnorm(*common, prefill_support)
        codes, scales = get_hip_quant(QuantType.per_1x128)(output, quant_dtype=dtypes.fp8, transpose_scale=False)
        if transpose_scale:
            scales = torch.empty_like(scales.t().contiguous()).t().copy_(scales)
        return (codes, residual, scales, *((output,) if emit_bf16 else ()))

    def fused_allreduce_rmsnorm_mxfp4_quant(
        self,
        input_: torch.Tensor,
        res_inp_: torch.Tensor,
        weight_: torch.Tensor,
        eps: float,
        prefill_support: bool = False,
        emit_bf16: bool = False,
    ) -> tuple[torch.Tensor, ...]:
        """The same in MXFP4: one stage for few rows, two up to 512 KiB, Triton's quantiser beyond."""
        common = (input_, res_inp_, weight_, eps)
        columns, element = input_.shape[-1], input_.element_size()
        rows, packs, size = input_.numel() // columns, columns // (16 // element), input_.numel() * element
        limit = next((most for widest, most in ((4096, 32), (6144, 16)) if columns <= widest), 4)
        limit = 8 if columns == 8192 else limit
        one = columns % 32 == 0 and columns <= 16384 and rows <= limit
        two = columns % 32 == 0 and columns <= 8192 and packs % self.world_size == 0 and size <= 512 * 1024
        two = two and not (emit_bf16 and packs % 32)
        if two and self.world_size == 8 and rows >= 16 and columns <= 6144:
            one = False
        ca = self.ca_comm
        if (
            ca is not None
            and ca.should_custom_ar(input_, prefill_support)
            and self.world_size in FUSED
            and (one or two)
        ):
            found = ca.custom_fused_ar_rms_mxfp4_quant(*common, use_1stage=one, emit_bf16=emit_bf16)
            assert found is not None
            return found
        output, residual = self.fused_allreduce_rmsnorm(*common, prefill_support)
        codes, scales = fused_norm.triton_mxfp4(output)
        return (codes, residual, scales, *((output,) if emit_bf16 else ()))
