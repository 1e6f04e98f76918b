"""Rounding of float32 to narrower element types, at bit level.

Scope: round to nearest even from float32 to bfloat16, as IEEE 754-2019 §4.3.1 defines it, written on integers because
library casts have been wrong on new architectures. What a pass does not prove: anything about a device's own casts.
"""

from __future__ import annotations

import torch


def round_to_bfloat16(value: torch.Tensor) -> torch.Tensor:
    """Round float32 to the nearest bfloat16, ties to even; returned as float32 of the same shape. NaN stays NaN.

    Raises:
        ValueError: ``value`` is not float32; its bits would be misread.
    """
    if value.dtype != torch.float32:
        raise ValueError(f"value is {value.dtype}; round float32 tensors only")
    bits = value.view(torch.int32)
    # Adding half a unit less one, plus the lowest kept bit, carries exactly when the value must round up.
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    return torch.where(value.isnan(), value, rounded.view(torch.float32))


def round_to(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round float32 ``value`` to ``dtype`` (bfloat16 or float32), returned as float32.

    Raises:
        ValueError: another element type.
    """
    if dtype == torch.float32:
        return value
    if dtype == torch.bfloat16:
        return round_to_bfloat16(value)
    raise ValueError(f"no rounding to {dtype} is modelled; use torch.bfloat16 or torch.float32")
