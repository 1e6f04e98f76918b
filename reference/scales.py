"""Scales of quantised groups: the largest magnitude of each group, and what every scale rule makes of it.

Scope: :class:`reference.codecs.ScaleRule`. Float32 rules are computed in float64 and rounded to float32 after each
operation. That is exact: a product of two float32 fits float64, and a quotient is, unless it is one, further from
every midpoint of float32 than float64 rounds (a divisor times a midpoint has 49 bits, so it misses the dividend by
2**-49 or more). Powers of two are integer arithmetic on the bits of float32; no logarithm is taken. Sources: AITER
e4048607 csrc/include/mx_quant_utils.h, aiter/utility/fp4_utils.py, aiter/ops/triton/_triton_kernels/quant/quant.py; OCP
MX 1.0 §6.3; vLLM 0.33.0 per_token_group_quant.
What a pass does not prove: that a device divides or takes maxima correctly.
"""

from __future__ import annotations

import torch

from reference.codecs import Codec, Granularity, ScaleFormat, ScaleRule, ZeroScale
from reference.formats import E8M0_NAN
from reference.rounding import decode_e8m0

_EXPONENT_SHIFT, _MANTISSA = 23, (1 << 23) - 1
#: Magnitude below which a float32 is subnormal.
SMALLEST_NORMAL = 2.0**-126


def to_float32(value: torch.Tensor) -> torch.Tensor:
    """``value`` rounded once to float32, returned as float64."""
    return value.float().double()


def _tiles(rows: torch.Tensor, codec: Codec) -> torch.Tensor:
    """``rows [M, N]`` filled up with zeros to ``[R, block_rows, G, group]``."""
    block_rows, group = max(codec.block_rows, 1), codec.group
    below, right = -rows.shape[0] % block_rows, -rows.shape[1] % group
    filled = torch.nn.functional.pad(rows, (0, right, 0, below))
    return filled.reshape(filled.shape[0] // block_rows, block_rows, filled.shape[1] // group, group)


def amax(rows: torch.Tensor, codec: Codec) -> torch.Tensor:
    """Largest magnitude of each group of ``rows [M, N]``, float64.

    ``[1, 1]`` per tensor, ``[M, 1]`` per token, ``[M, G]`` per group, ``[ceil(M / block_rows), G]`` per block. NaN
    where the group holds NaN, 0 for an empty one. The last group and block may be ragged.
    """
    magnitude = rows.double().abs()
    if codec.granularity is Granularity.TENSOR:
        return magnitude.max().reshape(1, 1) if magnitude.numel() else magnitude.new_zeros(1, 1)
    if codec.granularity is Granularity.TOKEN:
        return magnitude.amax(1, keepdim=True) if rows.shape[1] else magnitude.new_zeros(rows.shape[0], 1)
    return _tiles(magnitude, codec).amax((1, 3))


def scales_of(largest: torch.Tensor, codec: Codec) -> torch.Tensor:
    """Scales of groups with these largest magnitudes, float64 of the same shape.

    A NaN or infinite magnitude gives NaN in E8M0 (code 255) and what float32 arithmetic gives otherwise.

    Raises:
        ValueError: the codec is static; its scale is the caller's.
    """
    if codec.static:
        raise ValueError("the codec is static: its scale is given by the caller, not computed")
    largest = to_float32(largest)
    largest = torch.where(largest.isnan(), largest, largest.clamp(min=_float32(codec.amax_floor)))
    scale = _power_of_two(largest, codec) if codec.scale_format is not ScaleFormat.FLOAT32 else _linear(largest, codec)
    return torch.where(scale == 0, 1.0, scale) if codec.zero_scale is ZeroScale.ONE else scale


def _float32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()


def unrounded(largest: torch.Tensor, codec: Codec) -> torch.Tensor:
    """The float32 operation of the scale rule before it is rounded; where there is none (EVEN), ``largest`` itself."""
    rule = codec.scale_rule
    if rule in (ScaleRule.RECIPROCAL, ScaleRule.CEIL_OF_RECIPROCAL):
        return largest * _float32(1 / codec.maximum)
    if rule in (ScaleRule.EVEN, ScaleRule.EVEN_ONE_BIT):
        return largest
    return largest / (2.0**codec.power if rule in (ScaleRule.DOWN, ScaleRule.CEIL) else codec.maximum)


def _linear(largest: torch.Tensor, codec: Codec) -> torch.Tensor:
    """The float32 scale, or what the power of two is taken of."""
    scale = to_float32(unrounded(largest, codec))
    return torch.where(scale.isnan(), scale, scale.clamp(min=_float32(codec.scale_floor)))


def _power_of_two(largest: torch.Tensor, codec: Codec) -> torch.Tensor:
    """The scale that is a power of two."""
    rule = codec.scale_rule
    if rule in (ScaleRule.EVEN, ScaleRule.EVEN_ONE_BIT):
        # Half a unit of the payload's last place carries into the exponent, even beyond float32's largest.
        kept = 1 if rule is ScaleRule.EVEN_ONE_BIT else codec.payload.mantissa_bits
        code = ((_bits(largest) + (1 << (_EXPONENT_SHIFT - 1 - kept))) >> _EXPONENT_SHIFT) - codec.power
    else:
        bits = _bits(_linear(largest, codec))
        code = bits >> _EXPONENT_SHIFT
        if rule is not ScaleRule.DOWN:
            # The least power of two not below; a subnormal goes to the least normal.
            code = code + (bits & _MANTISSA != 0).long()
    code = torch.where(largest.isfinite(), code.clamp(0, E8M0_NAN - 1), E8M0_NAN)
    scale = decode_e8m0(code)
    # Code 0 is 2**-127 as a byte; as the exponent field of a float32 it is zero.
    return torch.where(code == 0, 0.0, scale) if codec.scale_format is ScaleFormat.UE8M0_FLOAT32 else scale


def _bits(value: torch.Tensor) -> torch.Tensor:
    return value.float().view(torch.int32).long()


def expand(scales: torch.Tensor, codec: Codec, rows: int, columns: int) -> torch.Tensor:
    """Per-group values as one value per element, ``[rows, columns]``.

    Raises:
        ValueError: ``scales`` is not shaped as :func:`amax` shapes it for so many rows and columns.
    """
    by_row = {Granularity.TENSOR: 1, Granularity.BLOCK: -(-rows // max(codec.block_rows, 1))}
    wanted = (by_row.get(codec.granularity, rows), codec.groups(columns))
    if tuple(scales.shape) != wanted:
        raise ValueError(
            f"scales are {tuple(scales.shape)}; {codec.granularity.value} scales of {rows} x {columns} are {wanted}"
        )
    if codec.block_rows:
        scales = scales.repeat_interleave(codec.block_rows, 0)[:rows]
    if codec.group:
        scales = scales.repeat_interleave(codec.group, 1)[:, :columns]
    return scales.expand(rows, columns)
