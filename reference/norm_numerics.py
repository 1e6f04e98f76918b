"""The rounding points of (AllReduce +) residual add + RMSNorm, as data.

Scope: what correct kernels do differently; :mod:`reference.rms_norm` carries it out and bounds it. Nothing here imports
torch. Sources: AITER e4048607 csrc/include/custom_all_reduce.cuh, csrc/kernels/rmsnorm_quant_kernels.cu,
aiter/ops/triton/normalization/; vLLM 0.33.0 rms_norm. What a right declaration does not prove: that a kernel keeps it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from reference.formats import Ties


class SumOrder(enum.Enum):
    """Order of the float32 additions over ranks."""

    RANK = "rank 0 to W - 1"
    ROTATED = "from some rank on, ascending and around"  # a reduce-scatter: the first rank follows from the element
    ANY = "any"


class NormInput(enum.Enum):
    """What is normalised."""

    UNROUNDED = "the float32 sum with the residual"
    ROUNDED = "that sum rounded to the element type, i.e. residual out"
    EITHER = "one of the two, by path or by element"


class WeightProduct(enum.Enum):
    """How x, the inverse root mean square r and the weight w are multiplied, in float32."""

    NORM_FIRST = "(x * r) * w"
    WEIGHT_FIRST = "(x * w) * r"
    EITHER = "one of the two, by path"
    ROUNDED_NORM = "round(x * r) * w"  # T5, vLLM's native form: the normalised row is rounded to the element type first


class QuantisedFrom(enum.Enum):
    """What a fused quantiser sees."""

    FLOAT32 = "the unrounded float32 output"
    ROUNDED = "the output rounded to the element type"


@dataclass(frozen=True)
class NormNumerics:
    """One kernel's rounding points.

    Attributes:
        sum_order: of the AllReduce; not looked at with one rank.
        round_reduced: the reduced sum is rounded to the element type before the residual is added.
        norm_input: what the mean square and the product are taken of.
        product: order of the two multiplications and whether there is a rounding between them.
        gemma: the weight is ``1 + w``, added in float32.
        quantised_from: what a fused quantiser sees; not looked at without one.
        store: how float32 is rounded to the element type, residual out included. AITER's gfx942 kernels truncate to
            bfloat16 (csrc/include/opus/opus.hpp:1219, OPUS_FP32_to_BF16_DEFAULT = 2).
        residual_store: how residual out is rounded where that differs from ``store``: AITER's two-stage kernels add the
            residual with the compiler's bfloat16 addition, which rounds to nearest (custom_all_reduce.cuh:2838).
        may_flush: float32 subnormals may be taken for zero.
        square_additions: most float32 additions that a square passes through on its way into the mean square: those of
            a thread, then the levels of the tree over threads; 0 is any order, i.e. N - 1. At N = 7,168 any order
            leaves the root open by 2**-12, three times what a variance over N - 1 is off by.
    """

    sum_order: SumOrder = SumOrder.RANK
    round_reduced: bool = True
    norm_input: NormInput = NormInput.UNROUNDED
    product: WeightProduct = WeightProduct.NORM_FIRST
    gemma: bool = False
    quantised_from: QuantisedFrom = QuantisedFrom.FLOAT32
    store: Ties = Ties.EVEN
    residual_store: Ties | None = None
    may_flush: bool = False
    square_additions: int = 0
