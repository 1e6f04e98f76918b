"""The codecs of a combine carried out: rows of BF16 into what travels, and what travelled into a sum.

Scope: MoRI 624002c8, include/mori/core/transport/p2p/device_primitives.hpp (WarpQuantizeToFp8Blockwise 1418,
WarpQuantizeToFp4Blockwise 2465, WarpCastBf16ToCombineInternalFp8 2800, the WarpAccum* beside them). A row is coded on
the rank whose experts made it, and decoded and summed on the token's rank. A contribution is ``value * scale`` with the
value of a code; a kernel adds it by a fused multiply-add (the vector loops) or multiplies, rounds and adds (the scalar
tails, 1692-1705): :func:`add_product` does either, and no more freedom is left. Every code, scale and product below is
computed to the bit, with float64 only where it is exact or rounds once more without harm.
What a pass does not prove: anything about layouts in a staging buffer, or about rows of infinities, which are refused
where they have a scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from reference.combine_numerics import BlockScale, CombineCodec
from reference.formats import FLOAT32, Format, Overflow
from reference.rounding import decode, encode, round_to_format


@dataclass
class CodedRows:
    """What travels of some rows.

    Attributes:
        codes: ``[R, C]`` uint8: C = H for FP8, ``ceil(H / 2)`` for FP4 with the even element in the low nibble.
        scales: ``[R, S]`` float32 or None. The first is negated where a block of the row is scaled: a row whose first
            scale is not negative is read without scales.
    """

    codes: torch.Tensor
    scales: torch.Tensor | None


def code_rows(rows: torch.Tensor, codec: CombineCodec) -> CodedRows:
    """Code ``rows [R, H]`` bfloat16. NaN is passed over in a block's largest magnitude and becomes the payload's NaN.

    Raises:
        ProblemError: H does not fit the codec's blocks.
        ValueError: rows are not bfloat16; an infinity in a block that has a scale; or a block whose factor overflows
            float32 (FP4, a largest magnitude between 0 and 1.8e-38).
    """
    if rows.dtype != torch.bfloat16:
        raise ValueError(f"rows are {rows.dtype}; a combine codes bfloat16 rows, convert them first")
    codec.check(rows.shape[1])
    scales, factors = block_scales(rows, codec)
    wide = rows.double()
    if factors is not None:
        # A product of two float32 is exact in float64.
        wide = (wide * _by_element(factors, codec, rows.shape[1]).double()).float().double()
    codes = encode(wide, codec.payload)
    if codec.payload.bits == 4:
        padded = torch.nn.functional.pad(codes, (0, rows.shape[1] % 2))
        codes = padded[:, ::2] | padded[:, 1::2] << 4
    if scales is not None:
        scaled = (largest(rows, codec) > codec.payload.max).any(1) | (codec.scale is BlockScale.ALWAYS)
        scales[:, 0] = torch.where(scaled, -scales[:, 0], scales[:, 0])
    return CodedRows(codes.to(torch.uint8), scales)


def decode_rows(coded: CodedRows, codec: CombineCodec, hidden: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Values of the codes and the scale of every element, float32 ``[R, hidden]`` each; None without scales.

    A contribution is their product, of at most 28 significant bits: exact in float64, not in float32.
    """
    codes = coded.codes.long()
    if codec.payload.bits == 4:
        codes = torch.stack([codes & 0xF, codes >> 4], dim=2).flatten(1)[:, :hidden]
    values = decode(codes, codec.payload).float()
    if coded.scales is None:
        return values, None
    used = torch.where(coded.scales[:, :1] < 0, coded.scales.abs(), 1.0)
    return values, _by_element(used, codec, hidden)


def block_scales(rows: torch.Tensor, codec: CombineCodec) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Scales, all positive, and factors of the blocks of ``rows [R, H]``: float32 ``[R, S]`` each, or None twice.

    Raises:
        ValueError: as :func:`code_rows`.
    """
    if codec.scale is BlockScale.NONE:
        return None, None
    amax, top = largest(rows, codec), codec.payload.max
    if bool(amax.isinf().any()):
        raise ValueError(f"a block of {codec.name} holds an infinity, of which only NaN comes back; use finite rows")
    # Quotients of float32 numbers that float64 rounds first (Figueroa, When is double rounding innocuous?, 1995).
    factor = (top / amax.double()).float()
    if codec.scale is BlockScale.WHERE_BEYOND:
        inverse = torch.tensor(1 / top, dtype=torch.float32).double()
        beyond = amax > top
        one = torch.ones_like(amax)
        return torch.where(beyond, (amax.double() * inverse).float(), one), torch.where(beyond, factor, one)
    zero = amax == 0
    if bool((factor.isinf() & ~zero).any()):
        least = float(amax[factor.isinf() & ~zero].min())
        raise ValueError(
            f"a block of {codec.name} has the largest magnitude {least:g}, of which {top:g} / amax overflows float32 "
            f"and 0 * inf is NaN; use 0, or at least {top / FLOAT32.max:.3g}"
        )
    return torch.where(zero, 1.0, (amax.double() / top).float()), torch.where(zero, 0.0, factor)


def largest(rows: torch.Tensor, codec: CombineCodec) -> torch.Tensor:
    """Largest magnitude of every block of ``rows [R, H]``, NaN passed over, 0 of an empty block; float32 ``[R, S]``."""
    width = codec.width(rows.shape[1])
    size = rows.float().abs().nan_to_num(nan=0.0, posinf=torch.inf)
    padded = torch.nn.functional.pad(size, (0, codec.blocks * width - rows.shape[1]))
    return padded.reshape(rows.shape[0], codec.blocks, width).amax(2)


def add_product(total: torch.Tensor, value: torch.Tensor, scale: torch.Tensor, *, fused: bool) -> torch.Tensor:
    """``total + value * scale`` in float32: rounded once if ``fused``, else after each operation.

    Args:
        total: float32.
        value: float32 numbers of a payload format.
        scale: float32.
        fused: as one fused multiply-add.
    """
    product = value.double() * scale.double()
    if not fused:
        return total + product.float()
    # The product has 28 bits. One of at least 2**-25 of the total makes a sum that float64 holds; one below is less
    # than half of the spacing on either side of the total: rounding twice does no harm.
    return (total.double() + product).float()


def saturated(total: torch.Tensor, to: Format) -> torch.Tensor:
    """Float32 ``total`` rounded to the payload format and saturated there, as float32."""
    return round_to_format(total, to, overflow=Overflow.SATURATE).float()


def _by_element(of_blocks: torch.Tensor, codec: CombineCodec, hidden: int) -> torch.Tensor:
    """``[R, S]`` numbers of blocks as ``[R, hidden]``."""
    return of_blocks.repeat_interleave(codec.width(hidden), dim=1)[:, :hidden]
