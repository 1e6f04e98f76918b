"""Double of ``aiter.utility.dtypes``: element types, with FP8 that of the live device.

Scope: the names that quantisers and norms use. ``fp8`` is looked up at every access, where AITER computes it once at
import. It proves nothing about the device that is really present.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from accelerated.standin.aiter_ops.jit.utils.chip_info import get_gfx_runtime

if TYPE_CHECKING:
    fp8: torch.dtype

fp4x2: torch.dtype = torch.float4_e2m1fn_x2
fp8_e8m0: torch.dtype = torch.float8_e8m0fnu
fp16 = torch.float16
bf16 = torch.bfloat16
fp32 = torch.float32
i32 = torch.int32
i8 = torch.int8
u8 = torch.uint8

_FP8 = {"gfx942": torch.float8_e4m3fnuz, "gfx950": torch.float8_e4m3fn, "gfx1250": torch.float8_e4m3fn}


def get_dtype_fp8() -> torch.dtype:
    """FP8 type of the live device; ``torch.uint8`` for one that AITER does not know (dtypes.py:11-30)."""
    return _FP8.get(get_gfx_runtime(), torch.uint8)


def __getattr__(name: str) -> torch.dtype:
    if name == "fp8":
        return get_dtype_fp8()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
