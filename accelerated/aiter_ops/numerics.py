"""Codecs and rounding points of AITER's quantisers and norms, by operator.

Scope: plain data without torch, traced through AITER e4048607's call paths (QK is csrc/kernels/quant_kernels.cu, RK is
csrc/kernels/rmsnorm_quant_kernels.cu, OK is csrc/include/opus/rmsnorm_opus_kernel.hpp). Which problems run at all is in
:mod:`accelerated.aiter_ops.contract`. What a declaration does not prove: that the hardware keeps it; none of the HIP
kernels was run to write it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from accelerated.operators import ROW_BYTES, RowProblem
from reference.catalogue import Architecture
from reference.codecs import Codec, Granularity, PayloadRule, ScaleFormat, ScaleLayout, ScaleRule, ZeroScale
from reference.formats import E2M1, Format, Ties
from reference.norm_numerics import NormInput, NormNumerics, QuantisedFrom, WeightProduct

#: Row lengths that ``dynamic_per_token_scaled_quant`` sends to the group kernel (QK:738).
GROUP_KERNEL_COLUMNS = (32, 64, 128)
#: Longest row of the HIP norm kernels; longer ones take the opus kernels (aiter/ops/rmsnorm.py:388-398).
HIP_NORM_COLUMNS = 8192
#: Under which the group and norm kernels never let amax fall (QK:92, RK:210).
AMAX_FLOOR = 1e-10

#: Longest row, threads of a row and elements per thread of the HIP norm kernels (RK, ..._KERNEL_DISPATCH).
_HIP_NORM_SHAPES = (
    (512, 64, 8),
    (1024, 128, 8),
    (2048, 256, 8),
    (4096, 256, 16),
    (6144, 256, 24),
    (8192, 256, 32),
)
#: Vectors of its row that an opus thread keeps in registers (OK, CACHE_V), and the most threads of a row.
_OPUS_CACHED, _OPUS_THREADS = 4, 256

CodecOf = Callable[[Format, int], Codec]


@dataclass(frozen=True)
class Quantiser:
    """One quantiser: its codec by (FP8 format of the device, hidden), and what its calls take."""

    codec: CodecOf
    takes_num_rows: bool = False
    takes_out: bool = False
    takes_empty: bool = False


@dataclass(frozen=True)
class Norm:
    """One norm operator: what is added, how it is rounded and how its output is quantised."""

    residual: bool = False
    gemma: bool = False
    t5: bool = False  # use_model_sensitive_rmsnorm = 1
    quantised: bool = False
    group: int = 0
    transposed: bool = False
    opus_only: bool = False  # by name, or because the rows come as [1, M, N]
    in_place: bool = False

    def takes_opus(self, problem: RowProblem) -> bool:
        """Whether the call goes to the opus kernels (_use_hip_common); grouped quantisers never do."""
        if self.group:
            return False
        wide = ROW_BYTES[problem.dtype] != 2 or problem.hidden > HIP_NORM_COLUMNS
        return self.opus_only or self.t5 or wide

    def numerics(self, problem: RowProblem, arch: Architecture) -> NormNumerics:
        """Rounding points (RK:105-204, OK).

        Both kernels normalise the float32 sum, T5 the rounded one. What an opus thread does not keep in registers it
        reads back from residual out: there the product is of the rounded sum, the mean square of the unrounded one.
        """
        opus = self.takes_opus(problem)
        norm_input = NormInput.UNROUNDED
        if self.residual and self.t5:
            norm_input = NormInput.ROUNDED
        elif self.residual and opus and _opus_vectors_per_thread(problem) > _OPUS_CACHED:
            norm_input = NormInput.EITHER
        product = WeightProduct.NORM_FIRST
        if self.t5:
            product = WeightProduct.ROUNDED_NORM
        elif not opus and arch.wave_size == 32:
            # The packed multiplications are assembly on gfx9 only; -ffast-math may reorder the portable ones.
            product = WeightProduct.EITHER
        # gfx942 has no conversion to bfloat16, and both modules cut the lower half off there (opus.hpp:1219).
        truncates = arch.name == "gfx942" and problem.dtype == "bfloat16"
        return NormNumerics(
            norm_input=norm_input,
            product=product,
            gemma=self.gemma,
            quantised_from=QuantisedFrom.FLOAT32,
            store=Ties.TRUNCATE if truncates else Ties.EVEN,
            may_flush=True,
            square_additions=_opus_additions(problem) if opus else _hip_additions(problem.hidden),
        )

    def codec(self, problem: RowProblem, fp8: Format) -> Codec | None:
        """Fused quantiser: floor and v_rcp_f32 (RK:210, 304), or opus's two divisions (OK, rmsnorm_quant_opus)."""
        if not self.quantised:
            return None
        if self.takes_opus(problem):
            # A row of zeros has scale 0, for which the kernel takes 0 as the reciprocal.
            return Codec(fp8, Granularity.TOKEN, fp8.max, payload_rule=PayloadRule.RECIPROCAL, may_flush=True)
        return Codec(
            payload=fp8,
            granularity=Granularity.GROUP if self.group else Granularity.TOKEN,
            group=self.group,
            maximum=fp8.max,
            scale_rule=ScaleRule.RECIPROCAL,
            amax_floor=AMAX_FLOOR,
            payload_rule=PayloadRule.APPROXIMATE_RECIPROCAL,
            may_flush=True,
            scale_layout=ScaleLayout.TRANSPOSED_BYTES if self.transposed else ScaleLayout.ROW_MAJOR,
        )


def _hip_additions(hidden: int) -> int:
    """A thread's own elements one by one, then a tree over the threads (hip_reduce.h:395)."""
    shape = next((s for s in _HIP_NORM_SHAPES if hidden <= s[0]), _HIP_NORM_SHAPES[-1])
    # Grouped quantisers spread 6145 to 8192 columns over more threads with fewer elements each: no more additions.
    return shape[2] + _levels(shape[1])


def _opus_additions(problem: RowProblem) -> int:
    return _opus_vectors_per_thread(problem) * _opus_width(problem) + _levels(_opus_threads(problem))


def _opus_vectors_per_thread(problem: RowProblem) -> int:
    return -(-(problem.hidden // _opus_width(problem)) // _opus_threads(problem))


def _opus_width(problem: RowProblem) -> int:
    """Elements per load: 16 bytes of them where they divide the row (csrc/include/rmsnorm.h, launch_norm)."""
    vector = 16 // ROW_BYTES[problem.dtype]
    return 1 if problem.hidden % vector else vector


def _opus_threads(problem: RowProblem) -> int:
    """Threads of a row: a power of two from 64 on, two vectors each (rmsnorm.h, pick_dims)."""
    wanted = (problem.hidden // _opus_width(problem) + 1) // 2
    return min(max(64, 1 << max(wanted - 1, 0).bit_length()), _OPUS_THREADS)


def _levels(threads: int) -> int:
    return (threads - 1).bit_length()


def _hip_rows(granularity: Granularity, *, static: bool = False) -> CodecOf:
    """``data_to_per_row_scale`` and ``scaled_quant_impl`` (QK:179, 267): amax from 0, v_rcp_f32."""

    def codec(fp8: Format, hidden: int) -> Codec:
        if granularity is Granularity.TOKEN and hidden in GROUP_KERNEL_COLUMNS:
            return _hip_groups(0)(fp8, hidden)
        return Codec(
            payload=fp8,
            granularity=granularity,
            maximum=fp8.max,
            scale_rule=ScaleRule.RECIPROCAL,
            static=static,
            payload_rule=PayloadRule.APPROXIMATE_RECIPROCAL,
            # 0 * inf is NaN, which v_med3_f32 turns into a finite code.
            zero_codes_defined=False,
            may_flush=True,
        )

    return codec


def _hip_groups(group: int, *, e8m0: bool = False, layout: ScaleLayout = ScaleLayout.ROW_MAJOR) -> CodecOf:
    """``dynamic_per_group_scaled_quant_kernel`` (QK:28): floor 1e-10, ``1.0f / scale``; group 0 is one per row."""

    def codec(fp8: Format, hidden: int) -> Codec:
        return Codec(
            payload=fp8,
            granularity=Granularity.GROUP if group else Granularity.TOKEN,
            group=group,
            maximum=fp8.max,
            # The device multiplies by a rounded 1 / max; no float32 lies where that changes the power of two.
            scale_rule=ScaleRule.UP if e8m0 else ScaleRule.RECIPROCAL,
            scale_format=ScaleFormat.E8M0 if e8m0 else ScaleFormat.FLOAT32,
            amax_floor=AMAX_FLOOR,
            payload_rule=PayloadRule.RECIPROCAL,
            may_flush=True,
            scale_layout=layout,
        )

    return codec


def _hip_fp4(layout: ScaleLayout) -> CodecOf:
    """The same kernel with FP4 output: the conversion instruction divides by the power of two itself."""

    def codec(fp8: Format, hidden: int) -> Codec:
        return Codec(
            payload=E2M1,
            granularity=Granularity.GROUP,
            group=32,
            maximum=E2M1.max,
            scale_rule=ScaleRule.UP,
            scale_format=ScaleFormat.E8M0,
            amax_floor=AMAX_FLOOR,
            may_flush=True,
            scale_layout=layout,
        )

    return codec


def _torch_rows(granularity: Granularity, group: int = 0) -> CodecOf:
    """``pertoken_quant`` and ``per_tensor_quant`` (aiter/ops/quant.py:64, 318).

    On a GPU torch divides by a Python number by multiplying with its rounded reciprocal
    (aten/src/ATen/native/cuda/BinaryDivTrueKernel.cu), so that the scale is that of RECIPROCAL there.
    """

    def codec(fp8: Format, hidden: int) -> Codec:
        tensor = granularity is Granularity.TENSOR
        return Codec(
            payload=fp8,
            granularity=granularity,
            group=group,
            maximum=fp8.max,
            scale_rule=ScaleRule.RECIPROCAL,
            # per_tensor_quant has no guard: an all-zero tensor gives 0 / 0.
            zero_scale=ZeroScale.FORMULA if tensor else ZeroScale.ONE,
            zero_codes_defined=not tensor,
        )

    return codec


def _torch_fp4(fp8: Format, hidden: int) -> Codec:
    """``per_1x32_f4_quant`` (aiter/ops/quant.py:97) in its default round mode."""
    return Codec(
        payload=E2M1,
        granularity=Granularity.GROUP,
        group=32,
        maximum=E2M1.max,
        scale_rule=ScaleRule.UP,
        scale_format=ScaleFormat.E8M0,
    )


QUANTISERS = {
    "hip.per_tensor": Quantiser(_hip_rows(Granularity.TENSOR), takes_out=True),
    "hip.per_tensor_static": Quantiser(_hip_rows(Granularity.TENSOR, static=True), takes_out=True),
    "hip.per_token": Quantiser(_hip_rows(Granularity.TOKEN), takes_out=True),
    "hip.per_token_num_rows": Quantiser(_hip_rows(Granularity.TOKEN), takes_num_rows=True, takes_out=True),
    "hip.per_1x128": Quantiser(_hip_groups(128), takes_num_rows=True, takes_out=True),
    # With num_rows the bytes would be those of (G, num_rows): the kernel's stride is the device's count (QK:52, 145).
    # No caller of it does that, and the wrapper's shape cannot say so: not offered.
    "hip.per_1x128_transposed": Quantiser(_hip_groups(128, layout=ScaleLayout.TRANSPOSED_BYTES), takes_out=True),
    "hip.per_1x128_e8m0": Quantiser(_hip_groups(128, e8m0=True), takes_num_rows=True, takes_out=True),
    "hip.per_1x32_fp4": Quantiser(_hip_fp4(ScaleLayout.ROW_MAJOR), takes_num_rows=True, takes_out=True),
    "hip.per_1x32_fp4_shuffled": Quantiser(_hip_fp4(ScaleLayout.SWIZZLED), takes_num_rows=True, takes_out=True),
    "hip.per_1x32_fp8": Quantiser(_hip_groups(32), takes_num_rows=True, takes_out=True),
    "hip.per_1x32_fp8_e8m0": Quantiser(_hip_groups(32, e8m0=True), takes_num_rows=True, takes_out=True),
    "torch.per_tensor": Quantiser(_torch_rows(Granularity.TENSOR)),
    "torch.per_token": Quantiser(_torch_rows(Granularity.TOKEN), takes_empty=True),
    "torch.per_1x128": Quantiser(_torch_rows(Granularity.GROUP, 128)),
    "torch.per_1x32_fp4": Quantiser(_torch_fp4),
}

NORMS = {
    "rmsnorm": Norm(),
    "rmsnorm_t5": Norm(t5=True),
    "rmsnorm_add": Norm(residual=True),
    "rmsnorm_add_gemma": Norm(residual=True, gemma=True),
    "rmsnorm_add_t5": Norm(residual=True, t5=True),
    "rmsnorm_dynamicquant": Norm(quantised=True),
    "rmsnorm_add_dynamicquant": Norm(residual=True, quantised=True),
    "rmsnorm_add_dynamicquant_t5": Norm(residual=True, quantised=True, t5=True),
    "rmsnorm_dynamicquant_1x128": Norm(quantised=True, group=128),
    "rmsnorm_add_dynamicquant_1x128": Norm(residual=True, quantised=True, group=128),
    "rmsnorm_add_dynamicquant_1x128_transposed": Norm(residual=True, quantised=True, group=128, transposed=True),
    "rmsnorm_3d": Norm(opus_only=True),
    "rmsnorm_add_3d": Norm(residual=True, opus_only=True),
    "rms_norm_cu": Norm(opus_only=True),
    "fused_add_rms_norm_cu": Norm(residual=True, opus_only=True, in_place=True),
}
