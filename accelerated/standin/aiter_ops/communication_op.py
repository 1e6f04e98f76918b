"""Double of ``aiter.dist.communication_op``: the public functions of the tensor-parallel group.

Scope: all-reduce and its fusions with RMSNorm and quantisers. It proves nothing about AMD hardware.
"""

from __future__ import annotations

from typing import Any

import torch

from accelerated.standin.aiter_ops.parallel_state import get_tp_group

_ALIASES = {
    "per_token": ("fp8", "fp8_per_token", "per-token", "per_token", "per_token_fp8"),
    "per_group": ("fp8_per_group", "per-group", "per_group", "per_group_fp8", "per_1x128"),
    "mxfp4": ("fp4", "fp4_e2m1", "mx_fp4", "mxfp4", "per_1x32"),
}
#: Values of QuantType.
_VALUES = {2: "per_token", 4: "per_group", 5: "per_group", 3: "mxfp4"}


def tensor_model_parallel_all_reduce(
    input_: torch.Tensor, use_new: bool = True, open_fp8_quant: bool = False, prefill_support: bool = False
) -> torch.Tensor:
    """Sum over ranks; one rank gets its own tensor back."""
    group = get_tp_group()
    if group.world_size == 1:
        return input_
    return group.communicator().all_reduce(input_, use_new, open_fp8_quant, prefill_support)


def tensor_model_parallel_fused_allreduce_rmsnorm(
    input_: torch.Tensor,
    residual_inp_: torch.Tensor,
    weight_: torch.Tensor,
    eps: float,
    prefill_support: bool = False,
    x_pad_to_multiple: int = 0,
    gemma_norm: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, residual out)."""
    return (
        get_tp_group()
        .communicator()
        .fused_allreduce_rmsnorm(
            input_, residual_inp_, weight_, eps, prefill_support, x_pad_to_multiple, gemma_norm=gemma_norm
        )
    )


def tensor_model_parallel_fused_allreduce_rmsnorm_quant(
    input_: torch.Tensor,
    residual_inp_: torch.Tensor,
    weight_: torch.Tensor,
    eps: float,
    prefill_support: bool = False,
    quant_type: Any = "per_token",
    group_size: int = 128,
    emit_bf16: bool = False,
    transpose_scale: bool = False,
    gemma_norm: bool = False,
) -> tuple[torch.Tensor, ...]:
    """(codes, residual out, scales[, output]). Per group, ``gemma_norm`` is lost on the way (communication_op.py:209).

    Raises:
        ValueError: no such quantiser.
    """
    kind = _kind(quant_type)
    communicator = get_tp_group().communicator()
    if kind == "per_group":
        return communicator.fused_allreduce_rmsnorm_quant_per_group(
            input_, residual_inp_, weight_, eps, group_size, prefill_support, emit_bf16, transpose_scale
        )
    return communicator.fused_allreduce_rmsnorm_quant(
        input_,
        residual_inp_,
        weight_,
        eps,
        prefill_support,
        quant_type=kind,
        group_size=group_size,
        emit_bf16=emit_bf16,
        transpose_scale=transpose_scale,
        gemma_norm=gemma_norm,
    )


def tensor_model_parallel_fused_allreduce_rmsnorm_mxfp4_quant(
    input_: torch.Tensor,
    residual_inp_: torch.Tensor,
    weight_: torch.Tensor,
    eps: float,
    prefill_support: bool = False,
    emit_bf16: bool = False,
) -> tuple[torch.Tensor, ...]:
    """The same with ``quant_type="mxfp4"``."""
    return tensor_model_parallel_fused_allreduce_rmsnorm_quant(
        input_, residual_inp_, weight_, eps, prefill_support, quant_type="mxfp4", emit_bf16=emit_bf16
    )


def _kind(quant_type: Any) -> str:
    if isinstance(quant_type, str):
        found = next((kind for kind, names in _ALIASES.items() if quant_type.lower() in names), None)
    else:
        found = _VALUES.get(getattr(quant_type, "value", quant_type))
    if found is None:
        raise ValueError(f"no fused quantiser is called {quant_type!r}; per_token, per_group and mxfp4 are")
    return found
