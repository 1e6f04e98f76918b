"""Block scales of the MX formats as AITER computes and lays them out.

Scope: E8M0 bytes in the four rounding modes (csrc/include/mx_quant_utils.h, aiter/utility/fp4_utils.py) and the swizzle
of AITER's GEMMs. It proves nothing about AMD hardware.
"""

from __future__ import annotations

import torch

from accelerated.standin.aiter_ops import device

ROUND_DOWN, ROUND_UP, EVEN, CEIL = 0, 1, 2, 3

#: By payload: exponent of the largest power of two, largest value, mantissa bits.
FP4 = (2, 6.0, 1)
FP8 = {torch.float8_e4m3fn: (8, 448.0, 3), torch.float8_e4m3fnuz: (7, 240.0, 3)}


def scale_bytes(amax: torch.Tensor, payload: tuple[int, float, int], mode: int = ROUND_UP) -> torch.Tensor:
    """E8M0 bytes of float32 ``amax``, uint8. NaN and infinity give 255.

    The quotient is ``amax`` times a rounded reciprocal, in the device code and in torch on a GPU alike.

    Raises:
        ValueError: no such mode.
    """
    exponent, maximum, mantissa = payload
    if mode not in (ROUND_DOWN, ROUND_UP, EVEN, CEIL):
        raise ValueError(f"rounding mode {mode!r}; the modes are 0 (down), 1 (up), 2 (even) and 3 (ceil)")
    if mode == EVEN:
        bits = (amax.view(torch.int32) + (1 << (22 - mantissa))) & 0x7F800000
        amax = bits.view(torch.float32)
    divisor = maximum if mode == ROUND_UP else 2.0**exponent
    bits = (amax * reciprocal(divisor, amax.device)).view(torch.int32)
    byte = bits >> 23 & 0xFF
    if mode in (ROUND_UP, CEIL):
        byte = byte + ((byte < 0xFF) & (bits & 0x7FFFFF != 0))
    return byte.to(torch.uint8)


def reciprocal(number: float, on: torch.device) -> torch.Tensor:
    """``fl(1 / number)`` in float32."""
    return torch.tensor(1.0 / number, dtype=torch.float32, device=on)


def scale_values(bytes_: torch.Tensor) -> torch.Tensor:
    """Float32 values of E8M0 bytes: 0 is 2**-127, 255 is NaN (fp4_utils.py, e8m0_to_f32)."""
    bits = bytes_.to(torch.int32) << 23
    bits = torch.where(bytes_ == 0, 0x00400000, torch.where(bytes_ == 0xFF, 0x7F800001, bits))
    return bits.to(torch.int32).view(torch.float32)


def padded(rows: int, groups: int) -> tuple[int, int]:
    """Shape of a swizzled scale tensor."""
    return (rows + 255) // 256 * 256, (groups + 7) // 8 * 8


def swizzled_places(rows: int, groups: int, on: torch.device) -> torch.Tensor:
    """Flat place of scale [row, group] in the swizzled tensor, int64 [rows, groups] (mx_scale_shuffle_idx)."""
    x = torch.arange(rows, device=on)[:, None]
    y = torch.arange(groups, device=on)[None, :]
    width = padded(rows, groups)[1]
    tile = x // 32 * width * 32 + y // 8 * 256
    return tile + y % 4 * 64 + x % 16 * 4 + y % 8 // 4 * 2 + x % 32 // 16


def swizzle(scales: torch.Tensor) -> torch.Tensor:
    """``scales [M, G]`` uint8 in AITER's layout; padding is whatever was in memory (aiter/ops/shuffle.py:339)."""
    rows, groups = scales.shape
    result = device.empty(padded(rows, groups), torch.uint8, scales.device)
    places = swizzled_places(rows, groups, scales.device)
    return result.view(-1).scatter(0, places.reshape(-1), scales.reshape(-1)).view(result.shape)
