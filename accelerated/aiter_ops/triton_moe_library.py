"""The mixture-of-experts part of a loaded AITER source tree: kernels, their tile sizes, and routing.

Scope: imports, by name. Modules that need a module's function are kept as modules, so that a caller's replacement of an
attribute is seen. A library that loads is not proven to work.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

from accelerated.aiter_ops.triton_library import import_module

_ROOT = "aiter.ops.triton"


@dataclass(frozen=True)
class TritonMoe:
    """Functions of AITER that the adapters of experts and routers call.

    Attributes:
        align: ``moe_align_block_size_triton``.
        fused_moe: one GEMM over sorted pairs.
        fused_moe_silu: the first GEMM and the activation.
        e2e_moe: both GEMMs.
        fused_moe_mxfp4: the GEMM on MXFP4.
        silu_and_mul: activation in torch (utils/moe_common.py).
        act_mul_fp8: activation and quantiser per group.
        act_mul_mxfp4: activation and MXFP4 quantiser.
        config: ``get_optimal_moe_config_func``.
        triton_dtype: Triton's type of a torch type.
        routing_from_topk: counting sort of (token, slot) pairs.
        routing: module of ``routing``, ``RoutingData`` and ``ExptData``.
        gemm_a8w8: grouped GEMM, FP8 by FP8.
        gemm_a8w8_block: grouped GEMM, FP8 by FP8 with block scales.
        gemm_a8w4: grouped GEMM, FP8 by MXFP4.
        gemm_a4w4: grouped GEMM, MXFP4 by MXFP4.
        gemm_a16w4: grouped GEMM, BF16 by MXFP4.
        downcast_to_mxfp: MX quantiser that rounds scales up.
        mxfp4_quant: MXFP4 quantiser beside ``gemm_a4w4``.
    """

    align: Any
    fused_moe: Any
    fused_moe_silu: Any
    e2e_moe: Any
    fused_moe_mxfp4: Any
    silu_and_mul: Any
    act_mul_fp8: Any
    act_mul_mxfp4: Any
    config: Any
    triton_dtype: Any
    routing_from_topk: Any
    routing: Any
    gemm_a8w8: Any
    gemm_a8w8_block: Any
    gemm_a8w4: Any
    gemm_a4w4: Any
    gemm_a16w4: Any
    downcast_to_mxfp: Any
    mxfp4_quant: Any


def load() -> TritonMoe:
    """Import the modules from the tree that :func:`accelerated.aiter_ops.triton_library.load` loaded.

    Raises:
        LibraryError: a module does not import.
    """
    a4w4 = _module("moe.moe_op_gemm_a4w4")
    activation = _module("activation")
    return TritonMoe(
        align=_module("moe.moe_align_block_size").moe_align_block_size_triton,
        fused_moe=_module("moe.moe_op").fused_moe,
        fused_moe_silu=_module("moe.moe_op_silu_fused").fused_moe_silu,
        e2e_moe=_module("moe.moe_op_e2e").e2e_moe,
        fused_moe_mxfp4=_module("moe.moe_op_mxfp4").fused_moe_mxfp4,
        silu_and_mul=_module("utils.moe_common").torch_silu_and_mul_ref,
        act_mul_fp8=activation.act_mul_and_fp8_group_quant,
        act_mul_mxfp4=activation.act_mul_and_mxfp4_quant,
        config=_module("utils.moe_config_utils").get_optimal_moe_config_func,
        triton_dtype=_module("utils.types").torch_to_triton_dtype,
        routing_from_topk=_module("fusions.fused_routing_from_topk").fused_routing_from_topk,
        routing=_module("moe.moe_routing.routing"),
        gemm_a8w8=_module("moe.moe_op_gemm_a8w8").moe_gemm_a8w8,
        gemm_a8w8_block=_module("moe.moe_op_gemm_a8w8_blockscale").moe_gemm_a8w8_blockscale,
        gemm_a8w4=_module("moe.moe_op_gemm_a8w4").moe_gemm_a8w4,
        gemm_a4w4=a4w4.moe_gemm_a4w4,
        gemm_a16w4=_module("moe.moe_op_gemm_a16w4").moe_gemm_a16w4,
        downcast_to_mxfp=_module("moe.quant_moe").downcast_to_mxfp,
        mxfp4_quant=a4w4.mxfp4_quant,
    )


def _module(name: str) -> ModuleType:
    return import_module(f"{_ROOT}.{name}", "name a tree of AITER that has its Triton mixture-of-experts kernels")
