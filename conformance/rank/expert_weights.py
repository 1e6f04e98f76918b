"""Weights of the experts of a case: every expert distinct, made from its number alone.

Elements are small multiples of a power of two, or codes of the declared payload under scales that are powers of two for
even experts and arbitrary float32 for odd ones: whatever is confused (an expert, a block, gate and up, a scale) changes
the result, and sums of integers stay exact. What these weights do not have: the distribution of a trained model's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch

from reference.codecs import Codec, Granularity, ScaleFormat
from reference.expert_weights import ExpertWeights
from reference.formats import E2M1

#: Largest magnitude of an element before its scale.
_LARGEST = 7
#: Kept experts: enough for every expert of a rank in the gate tier, too few to fill the memory with large ones.
_KEPT = 512
_LARGE = 1 << 20


def weights_of(
    experts: Sequence[int],
    *,
    hidden: int,
    intermediate: int,
    codec: Codec | None,
    dtype: torch.dtype,
    biased: bool,
    device: torch.device,
) -> ExpertWeights:
    """Weights of these experts, in this order.

    Args:
        experts: logical numbers; shared experts come behind the routed ones.
        hidden: H.
        intermediate: I.
        codec: how they are stored, or None for ``dtype``.
        dtype: of unquantised weights.
        biased: with biases.
        device: where they are wanted.
    """
    # Large ones are made where they are needed: a real layer's do not fit twice.
    make = _kept if hidden * intermediate <= _LARGE else _expert
    made = [make(e, hidden, intermediate, codec, dtype, biased) for e in experts]
    if not made:
        return weights_of(
            [0], hidden=hidden, intermediate=intermediate, codec=codec, dtype=dtype, biased=biased, device=device
        ).pick([])

    def stacked(name: str) -> torch.Tensor | None:
        parts = [getattr(one, name) for one in made]
        return None if parts[0] is None else torch.cat(parts).to(device)

    w1, w2 = stacked("w1"), stacked("w2")
    assert w1 is not None
    assert w2 is not None
    return ExpertWeights(w1, w2, codec, stacked("w1_scales"), stacked("w2_scales"), stacked("bias1"), stacked("bias2"))


def _expert(
    expert: int, hidden: int, intermediate: int, codec: Codec | None, dtype: torch.dtype, biased: bool
) -> ExpertWeights:
    generator = torch.Generator().manual_seed(expert * 7919 + 13)
    w1, w1_scales = _matrix(2 * intermediate, hidden, codec, dtype, generator, expert)
    w2, w2_scales = _matrix(hidden, intermediate, codec, dtype, generator, expert)
    bias1 = torch.randn(1, 2 * intermediate, generator=generator) if biased else None
    bias2 = torch.randn(1, hidden, generator=generator) if biased else None
    return ExpertWeights(w1, w2, codec, w1_scales, w2_scales, bias1, bias2)


_kept = lru_cache(_KEPT)(_expert)


def _matrix(
    rows: int, columns: int, codec: Codec | None, dtype: torch.dtype, generator: torch.Generator, expert: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``[1, rows, columns]`` elements or codes, and scales of one expert, so that an output is about as large as x."""
    exponent = -2 - math.ceil(math.log2(columns) / 2)
    if codec is None:
        elements = torch.randint(-_LARGEST, _LARGEST + 1, (1, rows, columns), generator=generator, dtype=torch.int8)
        return elements.to(dtype) * 2.0**exponent, None
    codes = _codes(rows, columns, codec, generator)
    return codes.unsqueeze(0), _scales(rows, columns, codec, generator, expert, exponent).unsqueeze(0)


def _codes(rows: int, columns: int, codec: Codec, generator: torch.Generator) -> torch.Tensor:
    """Codes of six binades around one, or every code of a payload of four bits; uint8."""
    if codec.payload is E2M1:
        return torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8)
    bits = codec.payload.mantissa_bits
    # The code of 1/8: its exponent field is that of 1 less three.
    least = (1 - codec.payload.min_exponent - 3) << bits
    codes = torch.randint(least, least + (6 << bits), (rows, columns), generator=generator, dtype=torch.uint8)
    return codes | (torch.randint(0, 2, (rows, columns), generator=generator, dtype=torch.uint8) << 7)


def _scales(
    rows: int, columns: int, codec: Codec, generator: torch.Generator, expert: int, exponent: int
) -> torch.Tensor:
    """Float64, shaped as the codec's groups are."""
    shape = {
        Granularity.TENSOR: (1, 1),
        Granularity.TOKEN: (rows, 1),
        Granularity.GROUP: (rows, -(-columns // max(codec.group, 1))),
        Granularity.BLOCK: (-(-rows // max(codec.block_rows, 1)), -(-columns // max(codec.group, 1))),
    }[codec.granularity]
    steps = torch.randint(-1, 2, shape, generator=generator)
    scales = torch.exp2(steps.double() + exponent)
    if codec.scale_format is ScaleFormat.FLOAT32 and expert % 2:
        scales = (scales * (0.75 + 0.5 * torch.rand(shape, generator=generator))).float().double()
    return scales
