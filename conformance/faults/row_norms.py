"""Norms with one defect each, as replacements in the double of AITER.

Scope: rounding points, the mean square, weights, outputs in each other's place. They prove nothing about timing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from accelerated.standin.aiter_ops import device
from accelerated.standin.aiter_ops.jit.utils.chip_info import get_gfx_runtime
from accelerated.standin.aiter_ops.ops import rmsnorm
from conformance.faults.row_replacements import Replacement, wrapped

Genuine = Callable[..., Any]
Pair = tuple[torch.Tensor, torch.Tensor]

#: Columns that are squared at a time; the rest of a row that is no multiple is left out.
VECTOR = 256
#: Columns that the registers of an opus block hold.
REGISTERS = 8192


def _epsilon_outside(
    genuine: Genuine,
    input: torch.Tensor,
    residual_in: torch.Tensor | None,
    residual_out: torch.Tensor | None,
    weight: torch.Tensor,
    epsilon: float,
    gemma: bool,
) -> torch.Tensor:
    """``x / (rms + eps)``."""
    total, _ = rmsnorm._added(input, residual_in, residual_out)
    inverse = 1.0 / (device.mean_square(total).sqrt() + epsilon)
    return device.flush(device.flush(total * inverse) * (weight.float() + (1.0 if gemma else 0.0)))


def _without_one(genuine: Genuine, *arguments: Any) -> torch.Tensor:
    """Gemma's weight is not raised by one."""
    result: torch.Tensor = genuine(*arguments[:-1], False)
    return result


def _of_rounded(genuine: Genuine, *arguments: Any) -> Pair:
    """What is normalised is residual out."""
    _, rounded = genuine(*arguments)
    return rounded, rounded


def _of_unrounded(genuine: Genuine, *arguments: Any) -> Pair:
    """What is normalised is the float32 sum."""
    total, _ = genuine(*arguments)
    return total, total


def _rounded_twice(
    genuine: Genuine, input: torch.Tensor, residual_in: torch.Tensor | None, residual_out: torch.Tensor | None
) -> Pair:
    """Residual out has been rounded to 11 bits before."""
    total, rounded = genuine(input, residual_in, residual_out)
    if residual_out is None:
        return total, rounded
    bits = total.view(torch.int32)
    short = (bits + 0xFFF + (bits >> 13 & 1) & ~0x1FFF).view(torch.float32)
    residual_out.copy_(device.store(short, input.dtype, get_gfx_runtime()))
    return total, residual_out.float()


def _truncating(genuine: Genuine, value: torch.Tensor, dtype: torch.dtype, arch: str) -> torch.Tensor:
    """The lower half of the float32 is cut off on every architecture."""
    result: torch.Tensor = genuine(value, dtype, "gfx942")
    return result


def _to_nearest(genuine: Genuine, value: torch.Tensor, dtype: torch.dtype, arch: str) -> torch.Tensor:
    """Rounded as if the device had a conversion to bfloat16."""
    return value.to(dtype)


def _swapped(
    genuine: Genuine,
    out: torch.Tensor,
    input: torch.Tensor,
    residual_in: torch.Tensor,
    residual_out: torch.Tensor,
    *rest: Any,
    **named: Any,
) -> None:
    """The two results in each other's buffers."""
    genuine(residual_out, input, residual_in, out, *rest, **named)


def _whole_vectors(genuine: Genuine, value: torch.Tensor) -> torch.Tensor:
    """Columns beyond the last whole vector are not squared."""
    columns = value.shape[-1]
    kept = value.clone()
    kept[..., columns // VECTOR * VECTOR :] = 0
    result: torch.Tensor = genuine(kept)
    return result


def _in_registers(genuine: Genuine, value: torch.Tensor) -> torch.Tensor:
    """Columns that the registers do not hold are not squared."""
    kept = value.clone()
    kept[..., REGISTERS:] = 0
    result: torch.Tensor = genuine(kept)
    return result


def _quantises_rounded(genuine: Genuine, *arguments: Any) -> torch.Tensor:
    """The quantiser sees the output in the element type."""
    return device.store(genuine(*arguments), arguments[0].dtype, get_gfx_runtime()).float()


_weight_before: list[weakref.ref[torch.Tensor]] = []


def _weight_of_call_before(
    genuine: Genuine, input: torch.Tensor, residual_in: Any, residual_out: Any, weight: torch.Tensor, *rest: Any
) -> torch.Tensor:
    """The weight is still that of the call before, if that lives: a case's inputs live until its end."""
    before = _weight_before[0]() if _weight_before else None
    _weight_before[:] = [weakref.ref(weight)]
    used = before if before is not None and before.shape == weight.shape else weight
    result: torch.Tensor = genuine(input, residual_in, residual_out, used, *rest)
    return result


REPLACED: dict[str, tuple[Replacement, ...]] = {
    "epsilon_outside": (wrapped("ops.rmsnorm:_hip_norm", _epsilon_outside),),
    "gemma_without_one": (wrapped("ops.rmsnorm:_hip_norm", _without_one),),
    "norm_of_rounded": (wrapped("ops.rmsnorm:_added", _of_rounded),),
    "norm_of_unrounded": (wrapped("ops.rmsnorm:_added", _of_unrounded),),
    "residual_rounded_twice": (wrapped("ops.rmsnorm:_added", _rounded_twice),),
    "truncated_store": (wrapped("device:store", _truncating),),
    "rounded_store": (wrapped("device:store", _to_nearest),),
    "outputs_swapped": (wrapped("ops.rmsnorm:rmsnorm2d_fwd_with_add", _swapped),),
    "last_vector_not_squared": (wrapped("device:mean_square", _whole_vectors),),
    "registers_only_squared": (wrapped("device:mean_square", _in_registers),),
    "quantised_from_rounded": (wrapped("ops.rmsnorm:_hip_norm", _quantises_rounded),),
    "weight_of_call_before": (wrapped("ops.rmsnorm:_hip_norm", _weight_of_call_before),),
}
