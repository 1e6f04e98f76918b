"""What the doubles of AITER's kernels share with a GPU: memory that nobody cleared, flushed subnormals, conversions.

Scope: torch arithmetic on any device, vectorised, without a host synchronisation. Codes are found by comparison with
the midpoints between neighbouring values, so that no cast of torch enters. It proves nothing about AMD hardware.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import torch

#: Bytes of fresh memory: NaN in every format that has one, and -6 in FP4.
POISON = 0xFF

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
#: Bias of the exponent and largest code of each 8-bit float with 4 exponent bits.
_E4M3 = {torch.float8_e4m3fn: (7, 0x7E), torch.float8_e4m3fnuz: (8, 0x7F)}


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Fresh memory of :data:`POISON`, where ``torch.empty`` would often give zeros."""
    width = torch.empty((), dtype=dtype).element_size()
    raw = torch.full((*shape[:-1], shape[-1] * width), POISON, dtype=torch.uint8, device=device)
    return raw.view(dtype)


def empty_like(tensor: torch.Tensor) -> torch.Tensor:
    """Fresh contiguous memory like ``tensor``."""
    return empty(tuple(tensor.shape), tensor.dtype, tensor.device)


def flush(value: torch.Tensor) -> torch.Tensor:
    """Float32 subnormals to zero, sign kept, as kernels built with ``-fgpu-flush-denormals-to-zero`` see them."""
    return torch.where(value.abs() < torch.finfo(torch.float32).tiny, value * 0.0, value)


def largest(dtype: torch.dtype) -> float:
    """Largest finite value of an FP8 type."""
    return float(_table(dtype)[-1])


def fp8_codes(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Codes of float32 ``value`` clamped to the finite range, uint8; NaN gives the most negative code (v_med3_f32)."""
    code, negative = _nearest(value, _table(dtype)), torch.signbit(value)
    nan = value.isnan()
    code = torch.where(nan, _E4M3[dtype][1], code)
    negative |= nan
    if dtype == torch.float8_e4m3fnuz:
        # 0x80 is this format's NaN: it has no minus zero.
        negative &= code != 0
    return (code | negative.to(torch.uint8) << 7).to(torch.uint8)


def fp4_bytes(value: torch.Tensor) -> torch.Tensor:
    """E2M1 codes of float32 ``value [..., N]``, saturated, two per byte with the even element low: uint8 [..., N/2]."""
    code = _nearest(value, _E2M1) | torch.signbit(value).to(torch.uint8) << 3
    return code[..., 0::2] | code[..., 1::2] << 4


def mean_square(value: torch.Tensor) -> torch.Tensor:
    """Mean of the squares of rows, kept as a last dimension of 1; half onto half, as no thread order is promised."""
    total = value * value
    if torch.compiler.is_compiling():
        # TorchInductor 2.11 gives wrong sums for the loop below when a compiled function meets another width.
        return total.mean(-1, keepdim=True)
    while total.shape[-1] > 1:
        half = (total.shape[-1] + 1) // 2
        total = total[..., :half] + torch.nn.functional.pad(total[..., half:], (0, 2 * half - total.shape[-1]))
    return total / value.shape[-1]


def store(value: torch.Tensor, dtype: torch.dtype, arch: str) -> torch.Tensor:
    """Float32 as an element type. gfx942 has no conversion to bfloat16: AITER's norms cut the lower half off there."""
    if dtype == torch.bfloat16 and arch == "gfx942":
        return (value.view(torch.int32) & -0x10000).view(torch.float32).to(dtype)
    return value.to(dtype)


def _nearest(value: torch.Tensor, table: Sequence[float]) -> torch.Tensor:
    """Index in ascending ``table`` of the value nearest to ``|value|``, ties to the even index, uint8."""
    middles = torch.tensor([(a + b) / 2 for a, b in pairwise(table)], device=value.device)
    magnitude = value.abs().contiguous()
    index = torch.bucketize(magnitude, middles, out_int32=True)
    # Of a middle the lower index came back; from an odd one it goes up.
    middle = middles[index.clamp(max=len(middles) - 1)] == magnitude
    return (index + (index & middle)).to(torch.uint8)


@cache
def _table(dtype: torch.dtype) -> tuple[float, ...]:
    """Non-negative values of an FP8 type by code."""
    bias, top = _E4M3[dtype]
    return tuple(
        (code % 8) / 8 * 2.0 ** (1 - bias) if code < 8 else (1 + code % 8 / 8) * 2.0 ** (code // 8 - bias)
        for code in range(top + 1)
    )
