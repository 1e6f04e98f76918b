"""Double of ``aiter.dist.device_communicators.custom_all_reduce``: which calls it takes, and what its kernels give.

Scope: dense rows, eager calls and the warm-up of a capture, on gloo or NCCL ranks of one host. It proves nothing about
IPC, graph replay, races or AMD hardware, and it does not reproduce what a reading of the kernels only suspects.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from accelerated.standin.aiter_ops import device as memory
from accelerated.standin.aiter_ops import fused_norm, reduction
from accelerated.standin.aiter_ops.jit.utils.chip_info import get_gfx_runtime
from accelerated.standin.aiter_ops.utility import dtypes

_logger = logging.getLogger(__name__)

#: Largest input that the custom kernels take (custom_all_reduce.py:113).
MAX_SIZE = 8192 * 8192
#: Input up to which the quantising kernels reduce and normalise in one launch (custom_all_reduce.cuh:4477, 4604).
TWO_STAGE_BYTES = 512 * 1024
#: Ranks with fused kernels.
FUSED = (2, 4, 8)

Output = torch.Tensor
Quantised = tuple[torch.Tensor, ...]


def is_weak_contiguous(inp: torch.Tensor) -> bool:
    """Whether the elements fill the rest of the storage, in whatever order."""
    rest = inp.untyped_storage().nbytes() - inp.storage_offset() * inp.element_size()
    return inp.is_contiguous() or rest == inp.numel() * inp.element_size()


class CustomAllreduce:
    """The custom all-reduce of one group.

    Args:
        group: not served by NCCL; it moves the metadata.
        device: of the buffers.
        data_group: moves the rows here; ``group`` unless it has to be another on a GPU. Not in the real one.
    """

    _SUPPORTED_WORLD_SIZES: ClassVar[list[int]] = [2, 4, 6, 8]

    def __init__(
        self, group: dist.ProcessGroup, device: torch.device, data_group: dist.ProcessGroup | None = None
    ) -> None:
        self.disabled = True
        self._IS_CAPTURING = False
        self.group, self.device = group, device
        self._data = data_group or group
        assert dist.get_backend(group) != "nccl", "the custom all-reduce was given an NCCL group"
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        if self.world_size not in self._SUPPORTED_WORLD_SIZES:
            if self.world_size > 1:
                _logger.warning("no custom all-reduce for %d ranks", self.world_size)
            return
        if get_gfx_runtime() == "gfx1250" and self.world_size > 4:
            raise RuntimeError(
                f"{self.world_size} ranks on gfx1250, whose all-reduce has four at most and no RCCL behind it"
            )
        _assert_pure_tcp_store()
        self.disabled = False

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Calls inside give zeros unless the current stream is capturing."""
        try:
            self._IS_CAPTURING = True
            yield
        finally:
            self._IS_CAPTURING = False

    def should_custom_ar(self, inp: torch.Tensor, prefill_support: bool = False) -> bool:
        """Whether the custom kernels take ``inp``: 1 byte to 64 MiB, whole packs, dense."""
        size = inp.numel() * inp.element_size()
        return not self.disabled and size % 16 == 0 and 0 < size <= MAX_SIZE and is_weak_contiguous(inp)

    def custom_all_reduce(
        self, input: torch.Tensor, use_new: bool = True, open_fp8_quant: bool = False
    ) -> torch.Tensor | None:
        """Sum over ranks in the input's type, or None where the kernels do not take it."""
        if not self.should_custom_ar(input):
            return None
        if self._warming_up():
            return torch.zeros_like(input)
        if not use_new or open_fp8_quant:
            raise NotImplementedError("the double has the new all-reduce without FP8 only")
        parts = reduction.gather(input, self._data)
        return fused_norm.stored(self._plain_sum(parts, input), input.dtype)

    def custom_fused_ar_rms(
        self,
        input: torch.Tensor,
        residual_inp: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        use_1stage: bool,
        out_hidden_dim: int = 0,
        gemma_norm: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(output, residual out), or None where the kernels do not take the input.

        Raises:
            RuntimeError: more or less columns than the kernels have, or a number of ranks without them.
        """
        if not self.should_custom_ar(input):
            return None
        if self._warming_up():
            return torch.zeros_like(input), torch.zeros_like(input)
        if out_hidden_dim not in (0, input.shape[-1]):
            raise NotImplementedError("the double does not pad its output")
        packs = self._packs(input)
        one_stage = use_1stage and packs <= 1024
        if not one_stage:
            self._check_split(input, packs)
        total = fused_norm.reduced(reduction.from_rank(reduction.gather(input, self._data)), input.dtype)
        value, residual = fused_norm.add_unrounded(total, residual_inp)
        output = fused_norm.norm(value, weight, eps, gemma=gemma_norm, weight_first=not one_stage)
        return fused_norm.stored(output, input.dtype), residual

    def custom_fused_ar_rms_quant(
        self,
        input: torch.Tensor,
        residual_inp: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        use_1stage: bool,
        gemma_norm: bool = False,
        emit_bf16: bool = False,
    ) -> Quantised | None:
        """(FP8 codes, residual out, scales ``[M, 1]``[, output]), or None."""
        if not self.should_custom_ar(input):
            return None
        if self._warming_up():
            return self._zeros(input, input.shape, dtypes.fp8, (*input.shape[:-1], 1), torch.float32, emit_bf16)
        value, residual = self._rows_to_quantise(input, residual_inp, use_1stage and self._packs(input) <= 1024)
        output = fused_norm.norm(value, weight, eps, gemma=gemma_norm)
        codes, scales = fused_norm.quantise_fp8(output, input.shape[-1], dtypes.fp8)
        return self._result(codes, residual, scales, output, input.dtype, emit_bf16)

    def custom_fused_ar_rms_per_group_quant(
        self,
        input: torch.Tensor,
        residual_inp: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        group_size: int = 128,
        use_1stage: bool = False,
        emit_bf16: bool = False,
        transpose_scale: bool = False,
    ) -> Quantised | None:
        """(FP8 codes, residual out, scales ``[M, N / group_size]``, in columns if transposed[, output]), or None.

        Raises:
            ValueError: a group that is no power of two of packs or does not divide the row.
            RuntimeError: too many columns, or a number of ranks without kernels.
        """
        if not self.should_custom_ar(input):
            return None
        rows, groups = input.shape[0], input.shape[-1] // group_size
        if self._warming_up():
            zeros = self._zeros(input, input.shape, dtypes.fp8, (rows, groups), torch.float32, emit_bf16)
            scales = zeros[2].new_zeros(groups, rows).t() if transpose_scale else zeros[2]
            return (*zeros[:2], scales, *zeros[3:])
        per_thread = group_size * input.element_size() // 16
        if input.shape[-1] % group_size or per_thread & (per_thread - 1) or not 0 < per_thread <= 64:
            raise ValueError(f"per-group quant takes no group_size={group_size} at n={input.shape[-1]}")
        if self._packs(input) > 1024:
            raise RuntimeError(f"no fused kernel per group for {input.shape[-1]} columns")
        value, residual = self._rows_to_quantise(input, residual_inp, use_1stage)
        output = fused_norm.norm(value, weight, eps)
        codes, found = fused_norm.quantise_fp8(output, group_size, dtypes.fp8)
        scales = memory.empty((groups, rows), torch.float32, input.device).t() if transpose_scale else found
        return self._result(codes, residual, scales.copy_(found), output, input.dtype, emit_bf16)

    def custom_fused_ar_rms_mxfp4_quant(
        self,
        input: torch.Tensor,
        residual_inp: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        use_1stage: bool = False,
        emit_bf16: bool = False,
    ) -> Quantised | None:
        """(FP4 bytes ``[M, N / 2]``, residual out, E8M0 bytes ``[M, N / 32]``[, output]), or None.

        Raises:
            RuntimeError: a shape that neither kernel takes.
        """
        if not self.should_custom_ar(input):
            return None
        columns = input.shape[-1]
        if self._warming_up():
            shapes = (*input.shape[:-1], columns // 2), torch.uint8, (*input.shape[:-1], columns // 32), torch.uint8
            return self._zeros(input, *shapes, emit_bf16)
        packs, size = self._packs(input), input.numel() * input.element_size()
        fits = packs % self.world_size == 0 and not (emit_bf16 and packs % 32) and size <= TWO_STAGE_BYTES
        if packs > 1024 or not (use_1stage or fits):
            raise RuntimeError(f"no fused MXFP4 kernel for {input.shape[0]} x {columns}")
        self._require_fused()
        total = fused_norm.reduced(reduction.from_rank(reduction.gather(input, self._data)), input.dtype)
        add = fused_norm.add_stored if use_1stage else fused_norm.add_native
        value, residual = add(total, residual_inp)
        output = fused_norm.norm(value, weight, eps)
        codes, scales = fused_norm.quantise_fp4(output)
        return self._result(codes, residual, scales, output, input.dtype, emit_bf16)

    def _rows_to_quantise(
        self, input: torch.Tensor, residual: torch.Tensor, one_stage: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm input, residual out) of an FP8 kernel; those that are not one-stage normalise residual out."""
        self._require_fused()
        total = fused_norm.reduced(reduction.from_rank(reduction.gather(input, self._data)), input.dtype)
        return (fused_norm.add_unrounded if one_stage else fused_norm.add_native)(total, residual)

    def _plain_sum(self, parts: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
        size = input.numel() * input.element_size()
        if get_gfx_runtime() == "gfx1250":
            return reduction.from_rank(parts, self.rank)
        small = size < 160 * 1024 if self.world_size <= 4 else size < 80 * 1024
        written = (
            get_gfx_runtime() == "gfx942"
            and self.world_size == 8
            and size > 4 * 1024 * 1024
            and size % (16 * self.world_size) == 0
        )
        if self.world_size == 2 or small or written:
            return reduction.from_rank(parts)
        return reduction.from_owner(parts)

    def _check_split(self, input: torch.Tensor, packs: int) -> None:
        self._require_fused()
        m, n = input.shape[0], input.shape[-1]
        if packs < 64:
            raise RuntimeError(f"no fused kernel for {m} x {n}: {packs} packs are too few")
        if packs > 2048:
            raise RuntimeError(f"no fused kernel for {m} x {n}: {packs} packs are too many")

    def _packs(self, input: torch.Tensor) -> int:
        pack = reduction.PACK_BYTES // input.element_size()
        if input.shape[-1] % pack:
            raise RuntimeError(f"the fused kernel writes {pack} columns at a time")
        self._require_fused()
        return input.shape[-1] // pack

    def _require_fused(self) -> None:
        if self.world_size not in FUSED:
            raise RuntimeError(f"no fused kernel for {self.world_size} ranks")
        if get_gfx_runtime() == "gfx1250":
            raise RuntimeError("gfx1250's all-reduce has no fused kernel; the real library would run another class's")

    def _warming_up(self) -> bool:
        return self._IS_CAPTURING and not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())

    @staticmethod
    def _zeros(
        input: torch.Tensor, out: Any, out_type: torch.dtype, scale: Any, scale_type: torch.dtype, emit: bool
    ) -> Quantised:
        zeros = torch.zeros(out, dtype=out_type, device=input.device)
        scales = torch.zeros(scale, dtype=scale_type, device=input.device)
        return (zeros, torch.zeros_like(input), scales, *((torch.zeros_like(input),) if emit else ()))

    @staticmethod
    def _result(
        codes: torch.Tensor,
        residual: torch.Tensor,
        scales: torch.Tensor,
        output: torch.Tensor,
        dtype: torch.dtype,
        emit: bool,
    ) -> Quantised:
        return (codes, residual, scales, *((fused_norm.stored(output, dtype),) if emit else ()))


def _assert_pure_tcp_store() -> None:
    """The handles of the buffers travel through the default group's store (custom_all_reduce.py:519)."""
    c10d: Any = dist.distributed_c10d
    stores: Any = dist
    store = c10d._get_default_store()
    while isinstance(store, stores.PrefixStore):
        store = store.underlying_store
    assert isinstance(store, stores.TCPStore), (
        f"the default group has a {type(store).__name__}; the handles travel through a TCPStore"
    )
