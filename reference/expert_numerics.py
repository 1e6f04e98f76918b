"""Numerics of the experts of a mixture-of-experts layer as data: every choice two correct kernels may make differently.

Scope: one token's way through one expert, ``W2 (act(W1 x))``, and the sum over its experts on one rank. Nothing here
imports torch, so that a contract can hold it in the driver; :mod:`reference.experts` carries it out. What a right
declaration does not prove: that a library keeps it.

Symbols: H hidden, I intermediate, k slots of a token.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from reference.codecs import Codec, Granularity
from reference.formats import Format
from reference.problem import ProblemError

#: Limit of gpt-oss' clamp (openai/gpt-oss config.json, ``swiglu_limit``).
SWIGLU_LIMIT = 7.0
#: Slope of the sigmoid in gpt-oss' activation.
SWIGLU_ALPHA = 1.702


class Activation(enum.Enum):
    """What the stage between the two GEMMs computes from the gate and up halves of ``W1 x``, in float32."""

    SILU = "gate * sigmoid(gate) * up"
    GELU = "gate * (1 + erf(gate / sqrt 2)) / 2 * up"
    # gpt-oss: gate is clamped from above, up on both sides
    SWIGLU = "min(gate, limit) * sigmoid(1.702 min(gate, limit)) * (clamp(up, limit) + 1)"


class GateLayout(enum.Enum):
    """Where gate and up lie in the 2 I rows of W1."""

    SEPARATED = "gate rows 0..I-1, then up rows"
    INTERLEAVED = "gate 0, up 0, gate 1, up 1, ..."


class WeightStage(enum.Enum):
    """Where the routing weight is applied."""

    AFTER_W2 = "to the expert's output"
    BEFORE_ACTIVATION = "to the product with W1, gate and up alike"
    ON_INPUT = "to the row before W1, weight and product rounded to the element type; for k = 1"


class SlotSum(enum.Enum):
    """How the outputs of a token's experts on one rank are added up. E is the element type of the rows."""

    FLOAT32 = "in float32 in any order, rounded to E once"
    ROUNDED_TERMS = "each rounded to E, added in float32 in any order, rounded to E once"
    ATOMIC = "each rounded to E and added in E to a zero, in any order"


@dataclass(frozen=True)
class ExpertNumerics:
    """Rounding points of the experts, in the order of the data flow.

    Attributes:
        activation: between the GEMMs.
        limit: gate and up are clamped to it (SWIGLU: see :class:`Activation`; SILU: gate from above, up on both sides),
            or None.
        input_codec: quantiser of the rows before W1, or None: they are multiplied as they come.
        weight_codec: how W1 and W2 are stored: payload and scales, per output channel (TOKEN), block or group; None:
            in the rows' element type.
        weight_stage: where the routing weight is applied.
        gemm1_store: format in which ``W1 x`` is stored before the activation, or None: it stays float32.
        intermediate_store: format in which the activation's result is stored, or None: it stays float32.
        intermediate_codec: quantiser of the activation's result before W2, or None.
        slot_sum: how a token's experts on one rank are added up.
        accumulator_ulps: error of each addition in a GEMM, in units in the last place: 0.5 rounds to nearest, 1 may
            give either neighbour (matrix cores do not say).
        scale_roundings: roundings that a term of a GEMM meets beside the additions over the inner dimension: its
            product, the products with the scales, the additions of blocks scaled apart.
        function_ulps: error of the float32 sigmoid or erf, in units in the last place of its result.
        store_ulps: error of a rounding to one of the formats above or to the element type, in units in the last place:
            0.5 rounds to nearest, 1 may give either neighbour (truncation, or a kernel that does not say). An addition
            in the element type (ATOMIC) rounds to nearest in any case.
        gemm1_partial: split-K: ``W1 x`` is the sum of partial sums, each rounded to this, added in ``gemm1_store`` in
            any order (float32 if None); None: no split, or partial sums that are not rounded.
        late_bias: W1's bias is added after ``gemm1_store``, in float32, in place of before it.
        gemm1_parts: most partial sums that ``W1 x`` is made of, any consecutive elements of the row each.
        inner_parts: most parts of the intermediate that a kernel takes one by one: each part's product with W2 is a
            term of ``slot_sum`` of its own. Which elements a part holds is not known.
        intermediate_any_group: the groups of ``intermediate_codec``'s scales are not known: any part of the group that
            the codec declares, with the element in it.

    Raises:
        ProblemError: fields that contradict each other.
    """

    activation: Activation = Activation.SILU
    limit: float | None = None
    input_codec: Codec | None = None
    weight_codec: Codec | None = None
    weight_stage: WeightStage = WeightStage.AFTER_W2
    gemm1_store: Format | None = None
    intermediate_store: Format | None = None
    intermediate_codec: Codec | None = None
    slot_sum: SlotSum = SlotSum.FLOAT32
    accumulator_ulps: float = 1.0
    scale_roundings: int = 4
    function_ulps: float = 8.0
    store_ulps: float = 0.5
    gemm1_partial: Format | None = None
    gemm1_parts: int = 1
    late_bias: bool = False
    inner_parts: int = 1
    intermediate_any_group: bool = False

    def __post_init__(self) -> None:
        if self.activation is Activation.SWIGLU and self.limit is None:
            raise ProblemError(f"SWIGLU without a limit; gpt-oss has {SWIGLU_LIMIT}")
        if self.limit is not None and not self.limit > 0:
            raise ProblemError(f"limit is {self.limit}; give a positive one, or None")
        if not self.accumulator_ulps >= 0.5 or not self.function_ulps >= 0.5:
            raise ProblemError(
                f"accumulator_ulps is {self.accumulator_ulps}, function_ulps {self.function_ulps}; nothing rounds "
                f"better than 0.5"
            )
        if self.store_ulps not in (0.5, 1.0):
            raise ProblemError(f"store_ulps is {self.store_ulps}; give 0.5 (to nearest) or 1 (either neighbour)")
        if self.gemm1_parts < 1 or self.inner_parts < 1:
            raise ProblemError(
                f"gemm1_parts is {self.gemm1_parts}, inner_parts {self.inner_parts}; a whole is one part"
            )
        if (self.gemm1_partial is None) != (self.gemm1_parts == 1):
            raise ProblemError(
                f"gemm1_parts is {self.gemm1_parts}, gemm1_partial {self.gemm1_partial}; a split names the format of "
                f"its partial sums"
            )
        if self.inner_parts > 1 and self.slot_sum is SlotSum.FLOAT32:
            raise ProblemError("inner_parts with SlotSum.FLOAT32 says nothing: float32 additions may have any order")
        if self.intermediate_any_group and self.intermediate_codec is None:
            raise ProblemError("intermediate_any_group without intermediate_codec; name the quantiser")
        for name in ("input_codec", "intermediate_codec"):
            codec: Codec | None = getattr(self, name)
            if codec is not None and codec.granularity is Granularity.BLOCK:
                raise ProblemError(f"{name} has scales of several rows; a row's result must not depend on another row")
