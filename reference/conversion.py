"""Checkpoints in E4M3FN on hardware that computes in E4M3FNUZ: same bytes, doubled scales.

Scope: weights and scales of a checkpoint, once, at loading. The formats differ by one in the bias, so a byte is worth
half as much in FNUZ and a doubled scale makes up for it, exactly. Two bytes mean something else and are mended: 0x80 is
-0 in FN and NaN in FNUZ, and becomes 0; 0x7F and 0xFF are NaN in FN and would be +-240 in FNUZ, and become FNUZ's NaN.
Sources: vLLM 0.33.0 ``normalize_e4m3fn_to_e4m3fnuz`` for everything but the NaNs, which vLLM lets pass as +-240: a
checkpoint that holds one is damaged, and a finite weight would hide that, so here NaN stays NaN and is counted. What a
pass does not prove: that a kernel reads the bytes as FNUZ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from reference.formats import E4M3FN, E4M3FNUZ

#: One byte, two meanings.
_MINUS_ZERO, _FNUZ_NAN = E4M3FN.sign_bit, E4M3FNUZ.sign_bit
_FN_NAN = E4M3FN.max_code + 1


@dataclass(frozen=True)
class FnuzWeight:
    """A converted weight.

    Attributes:
        codes: E4M3FNUZ bytes, uint8, shaped like the E4M3FN ones.
        scale: of the weight, twice what it was, in its element type.
        input_scale: of a static activation, twice what it was, or None.
        nans: number of NaNs in ``codes``; anything but 0 is a damaged checkpoint.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    input_scale: torch.Tensor | None
    nans: int


def codes_to_fnuz(codes: torch.Tensor) -> torch.Tensor:
    """E4M3FNUZ bytes of half the value of E4M3FN bytes ``codes`` (uint8), a new tensor; -0 becomes 0, NaN stays NaN.

    Raises:
        ValueError: ``codes`` is not uint8.
    """
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes are {codes.dtype}; give the uint8 view of float8_e4m3fn")
    nan = codes & (_MINUS_ZERO - 1) == _FN_NAN
    return codes.masked_fill(codes == _MINUS_ZERO, 0).masked_fill(nan, _FNUZ_NAN)


def doubled(scale: torch.Tensor) -> torch.Tensor:
    """``2 * scale`` in its element type, a new tensor; always exact.

    Raises:
        ValueError: not a floating tensor (double an E8M0 byte by adding 1), or a finite scale would overflow.
    """
    if not scale.is_floating_point():
        raise ValueError(f"scale is {scale.dtype}; give the floating type of the checkpoint")
    twice = scale * 2
    if bool((twice.isinf() & ~scale.isinf()).any()):
        raise ValueError(f"scale {float(scale.abs().max()):g} doubles beyond {scale.dtype}; give it in a wider type")
    return twice


def weight_to_fnuz(codes: torch.Tensor, scale: torch.Tensor, input_scale: torch.Tensor | None = None) -> FnuzWeight:
    """Convert a weight and its scales; nothing is written in place.

    Args:
        codes: uint8 view of a float8_e4m3fn weight, any shape.
        scale: of the weight: of a tensor, of channels or of blocks, any shape.
        input_scale: of the activations, where the checkpoint has a static one: the same tensor is read as FNUZ too.

    Raises:
        ValueError: element types, or a scale that cannot be doubled.
    """
    converted = codes_to_fnuz(codes)
    nan = converted == _FNUZ_NAN
    return FnuzWeight(converted, doubled(scale), None if input_scale is None else doubled(input_scale), int(nan.sum()))
