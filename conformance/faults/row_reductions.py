"""AllReduce + RMSNorm with one defect each, as replacements in the double of AITER.

Scope: addends, orders, roundings, limits between paths, layouts, and a caller that gives no zeros. They prove nothing
about signals between GPUs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from accelerated.operators import NormResult
from accelerated.standin.aiter_ops import device, reduction
from conformance.faults.row_replacements import Replacement, wrapped

Genuine = Callable[..., Any]
_CLASS = "custom_all_reduce:CustomAllreduce"
#: Bytes that all threads of a block move at once; ranks share the blocks.
BLOCK_BYTES = 8192
#: Largest input of the one-stage quantising kernels.
ONE_STAGE_BYTES = 128 * 1024
#: Threads of the warp that a block reduction counts in.
WARP = 32


def _kept_float32(genuine: Genuine, total: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The sum over ranks is not rounded before the residual is added."""
    return total


def _last_rank_missing(genuine: Genuine, parts: torch.Tensor, first: int = 0) -> torch.Tensor:
    result: torch.Tensor = genuine(parts[:-1], first)
    return result


def _from_oneself(genuine: Genuine, parts: torch.Tensor, first: int = 0) -> torch.Tensor:
    """Every rank begins its sum with its own addend."""
    result: torch.Tensor = genuine(parts, dist.get_rank() % parts.shape[0])
    return result


def _partition_tail(genuine: Genuine, parts: torch.Tensor) -> torch.Tensor:
    """Each rank reduces as many whole blocks as the others; what is left over nobody does."""
    total: torch.Tensor = genuine(parts)
    flat = total.view(-1)
    share = parts.shape[0] * BLOCK_BYTES // parts.element_size()
    flat[flat.numel() // share * share :] = torch.nan
    return total


_rows_before: list[tuple[weakref.ref[torch.Tensor], torch.Tensor]] = []


def _others_of_call_before(genuine: Genuine, rows: torch.Tensor, group: Any) -> torch.Tensor:
    """Other ranks' rows are still those of the call before, if its input lives: a case's inputs live until its end."""
    parts: torch.Tensor = genuine(rows, group)
    genuine_parts = parts.clone()
    if _rows_before and _rows_before[0][0]() is not None and _rows_before[0][1].shape == parts.shape:
        parts = _rows_before[0][1].clone()
        parts[dist.get_rank()] = rows
    _rows_before[:] = [(weakref.ref(rows), genuine_parts)]
    return parts


def _warm_up(genuine: Genuine, self: Any) -> bool:
    """Every call outside a capture is taken for a warm-up."""
    return True


def _limit_exclusive(genuine: Genuine, self: Any, input: torch.Tensor, *rest: Any, **named: Any) -> Any:
    """The largest input of the one-stage kernel takes the other one: ``<`` where ``<=`` is meant."""
    residual, weight, epsilon, one_stage, *others = rest
    fits = one_stage and input.numel() * input.element_size() < ONE_STAGE_BYTES
    return genuine(self, input, residual, weight, epsilon, fits, *others, **named)


def _whole_warps(genuine: Genuine, value: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
    """The threads of a warp that is not full are left out of the mean square.

    The genuine norm of rows whose last columns are zero has the wrong root; the right columns are put in after.
    """
    columns, per_thread = value.shape[-1], reduction.PACK_BYTES // 2
    full = columns // per_thread // WARP * WARP * per_thread
    weight, epsilon = rest
    kept = value.clone()
    kept[:, full:] = 0
    root = torch.rsqrt(device.mean_square(kept) + epsilon)
    return device.flush(value * root * (weight.float() + (1.0 if named.get("gemma") else 0.0)))


def _groups_of_64(genuine: Genuine, self: Any, input: torch.Tensor, *rest: Any, **named: Any) -> Any:
    """The group that the caller asks for is not looked at."""
    residual, weight, epsilon, _, *others = rest
    return genuine(self, input, residual, weight, epsilon, 64, *others, **named)


def _never_transposed(genuine: Genuine, self: Any, *rest: Any, transpose_scale: bool = False, **named: Any) -> Any:
    return genuine(self, *rest, transpose_scale=False, **named)


def _strided_when_compiled(genuine: Genuine, input_: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
    """What the compiler is told about the result is not what an eager call gives."""
    result: torch.Tensor = genuine(input_, *rest, **named)
    return result.t().contiguous().t() if torch.compiler.is_compiling() else result


def _uninitialised_residual(
    genuine: Genuine, self: Any, rows: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, epsilon: float
) -> NormResult:
    """The caller of an operator without a residual gives memory that nobody cleared, where zeros are wanted."""
    if residual is not None:
        result: NormResult = genuine(self, rows, residual, weight, epsilon)
        return result
    output, _ = self._calls.tensor_model_parallel_fused_allreduce_rmsnorm(
        rows, device.empty_like(rows), weight, epsilon
    )
    return NormResult(output=output)


REPLACED: dict[str, tuple[Replacement, ...]] = {
    "sum_kept_float32": (wrapped("fused_norm:reduced", _kept_float32),),
    "last_rank_missing": (wrapped("reduction:from_rank", _last_rank_missing),),
    "order_by_rank": (wrapped("reduction:from_rank", _from_oneself),),
    "partition_tail": (wrapped("reduction:from_owner", _partition_tail),),
    "others_of_call_before": (wrapped("reduction:gather", _others_of_call_before),),
    "zeros_of_warm_up": (wrapped(f"{_CLASS}._warming_up", _warm_up),),
    "limit_exclusive": (wrapped(f"{_CLASS}.custom_fused_ar_rms_quant", _limit_exclusive),),
    "last_warp_not_squared": (wrapped("fused_norm:norm", _whole_warps),),
    "groups_of_64": (wrapped(f"{_CLASS}.custom_fused_ar_rms_per_group_quant", _groups_of_64),),
    "never_transposed": (wrapped(f"{_CLASS}.custom_fused_ar_rms_per_group_quant", _never_transposed),),
    "strided_when_compiled": (wrapped("communication_op:tensor_model_parallel_all_reduce", _strided_when_compiled),),
    "uninitialised_residual": (
        wrapped("accelerated.aiter_ops.allreduce:AiterAllReduceNorm.normalise", _uninitialised_residual),
    ),
}
