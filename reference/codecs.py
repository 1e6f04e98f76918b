"""Quantisers as data: every choice that two correct quantisers may make differently is a field here.

Scope: the declaration, and the codecs in use by name (:data:`STANDARD`); :mod:`reference.quantisation` carries them
out. Nothing here imports torch, so a contract can hold a codec in the driver. Where a library leaves a choice open, the
value says so and the acceptance set is exactly that choice. What a right declaration does not prove: that a library
keeps it.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, replace

from reference.formats import E2M1, E4M3FN, E4M3FNUZ, Format, Ties
from reference.problem import ProblemError


class Granularity(enum.Enum):
    """Elements that share one scale."""

    TENSOR = "tensor"
    TOKEN = "token"  # one row
    GROUP = "group"  # `group` consecutive columns of one row: 1x128, 1x32
    BLOCK = "block"  # `block_rows` rows by `group` columns: 128x128


class ScaleFormat(enum.Enum):
    """How a scale is stored."""

    FLOAT32 = "float32"
    E8M0 = "e8m0"  # one byte, a power of two
    UE8M0_FLOAT32 = "ue8m0 in float32"  # a power of two stored as float32 (DeepGEMM's unpacked form)


class ScaleRule(enum.Enum):
    """How a scale follows from the largest magnitude ``amax`` of its elements."""

    DIVIDE = "amax / max, rounded to float32"
    RECIPROCAL = "amax * fl(1 / max), both rounded to float32"
    # powers of two, by integer arithmetic on the bits of float32; 2**k is the largest power of two not above max
    DOWN = "floor_pow2(amax / 2**k)"  # OCP MX 1.0 §6.3
    UP = "ceil_pow2(amax / max)"
    EVEN = "floor_pow2(round(amax to the payload's mantissa, ties away) / 2**k)"
    EVEN_ONE_BIT = "EVEN with one mantissa bit whatever the payload"  # AITER's Triton MXFP8: FP4's rounding constant
    CEIL = "ceil_pow2(amax / 2**k)"
    CEIL_OF_FLOAT32 = "ceil_pow2(float32 scale of DIVIDE)"  # UE8M0 as DeepGEMM and vLLM compute it
    CEIL_OF_RECIPROCAL = "ceil_pow2(float32 scale of RECIPROCAL)"


_FROM_BITS = (ScaleRule.DOWN, ScaleRule.UP, ScaleRule.EVEN, ScaleRule.EVEN_ONE_BIT, ScaleRule.CEIL)


class ZeroScale(enum.Enum):
    """Scale of a group for which the rule gives zero: its elements are zero, or too small for a float32 scale."""

    FORMULA = "what the rule gives after the floors"
    ONE = "one"


class PayloadRule(enum.Enum):
    """What is rounded to the payload format."""

    DIVIDE = "x / scale"
    RECIPROCAL = "x * fl(1 / scale)"
    APPROXIMATE_RECIPROCAL = "x * r, r within one unit in the last place of 1 / scale (v_rcp_f32)"


class ScaleLayout(enum.Enum):
    """Where scale [row, group] lies in the scale tensor that comes back."""

    ROW_MAJOR = "shape (M, G), stride (G, 1)"
    COLUMN_MAJOR = "shape (M, G), stride (1, M)"
    TRANSPOSED_BYTES = "shape (M, G), contiguous, and the bytes are those of (G, M)"
    SWIZZLED = "AITER's e8m0 shuffle: padded to (256, 8), then tiles of 32 x 8"


@dataclass(frozen=True)
class Codec:
    """One quantiser's numerics.

    Attributes:
        payload: format of the codes; E2M1 codes lie two per byte, the even element in the low nibble.
        granularity: which elements share a scale; ``group`` and ``block_rows`` size it.
        group: columns per scale of GROUP and BLOCK. The last group of a row may be shorter.
        block_rows: rows per scale of BLOCK.
        maximum: what amax is mapped to and codes saturate at: the payload's largest value, or 224 on FNUZ (vLLM).
        scale_format: how the scale is stored.
        scale_rule: how it is computed. Not looked at where ``static``.
        static: the caller gives the scale.
        amax_floor: amax is raised to this, rounded to float32, before the rule.
        scale_floor: the float32 scale is raised to this, rounded to float32, before it becomes a power of two.
        zero_scale: scale of a group where the rule gives zero.
        payload_rule: what is rounded.
        ties: rounding of the payload.
        zero_codes_defined: False where the codes of a group with scale 0 are garbage (0 * inf) and only the
            dequantised zero counts.
        may_flush: float32 subnormals (inputs, scales, quotients) may be taken for zero
            (``-fgpu-flush-denormals-to-zero``).
        scale_layout: of the scale tensor.

    Raises:
        ProblemError: fields that contradict each other.
    """

    payload: Format
    granularity: Granularity
    maximum: float
    scale_rule: ScaleRule = ScaleRule.DIVIDE
    group: int = 0
    block_rows: int = 0
    scale_format: ScaleFormat = ScaleFormat.FLOAT32
    static: bool = False
    amax_floor: float = 0.0
    scale_floor: float = 0.0
    zero_scale: ZeroScale = ZeroScale.FORMULA
    payload_rule: PayloadRule = PayloadRule.DIVIDE
    ties: Ties = Ties.EVEN
    zero_codes_defined: bool = True
    may_flush: bool = False
    scale_layout: ScaleLayout = ScaleLayout.ROW_MAJOR

    def __post_init__(self) -> None:
        grouped = self.granularity in (Granularity.GROUP, Granularity.BLOCK)
        if grouped != (self.group > 0):
            raise ProblemError(
                f"group is {self.group} with granularity {self.granularity.value}; give columns per group"
            )
        if (self.granularity is Granularity.BLOCK) != (self.block_rows > 0):
            raise ProblemError(f"block_rows is {self.block_rows}; give it for granularity block, and only there")
        if not 0 < self.maximum <= self.payload.max:
            raise ProblemError(f"maximum is {self.maximum}; {self.payload.name} holds at most {self.payload.max}")
        power = self.scale_rule not in (ScaleRule.DIVIDE, ScaleRule.RECIPROCAL)
        if not self.static and power == (self.scale_format is ScaleFormat.FLOAT32):
            raise ProblemError(f"scale rule {self.scale_rule.name} does not give a {self.scale_format.value} scale")
        if self.scale_floor and self.scale_rule in _FROM_BITS:
            raise ProblemError(
                f"scale_floor is {self.scale_floor} with scale rule {self.scale_rule.name}, which has no float32 scale;"
                " give amax_floor"
            )

    @property
    def power(self) -> int:
        """k: 2**k is the largest power of two that is not above ``maximum``."""
        return math.frexp(self.maximum)[1] - 1

    def groups(self, columns: int) -> int:
        """Scales per row of ``columns`` elements (per ``block_rows`` rows for BLOCK)."""
        return -(-columns // self.group) if self.group else 1


def _standard() -> dict[str, Codec]:
    codecs: dict[str, Codec] = {}
    # vLLM 0.33.0 takes 224 for FNUZ where AITER takes 240.
    for kind, payload, maximum in (("fn", E4M3FN, 448.0), ("fnuz", E4M3FNUZ, 240.0), ("fnuz224", E4M3FNUZ, 224.0)):
        tensor = Codec(payload, Granularity.TENSOR, maximum)
        token = Codec(payload, Granularity.TOKEN, maximum)
        group = Codec(payload, Granularity.GROUP, maximum, group=128, amax_floor=1e-10)
        block = Codec(payload, Granularity.BLOCK, maximum, group=128, block_rows=128, zero_scale=ZeroScale.ONE)
        float_power = replace(group, scale_rule=ScaleRule.CEIL_OF_FLOAT32, scale_format=ScaleFormat.UE8M0_FLOAT32)
        codecs |= {
            f"tensor_static_{kind}": replace(tensor, static=True),
            f"tensor_{kind}": tensor,
            f"token_{kind}": replace(token, zero_scale=ZeroScale.ONE),  # AITER pertoken_quant
            f"token_floor_{kind}": replace(token, scale_floor=1 / (maximum * 512)),  # vLLM
            f"group128_{kind}": group,
            f"group128_floor_{kind}": replace(group, amax_floor=0.0, scale_floor=1 / (maximum * 512)),  # vLLM native
            f"group128_reciprocal_{kind}": replace(group, scale_rule=ScaleRule.RECIPROCAL),  # vLLM's kernel
            f"block128_{kind}": block,
            f"ue8m0_{kind}": float_power,
            f"ue8m0_reciprocal_{kind}": replace(float_power, scale_rule=ScaleRule.CEIL_OF_RECIPROCAL),
        }
        if maximum != 224:
            device = replace(token, scale_rule=ScaleRule.RECIPROCAL, may_flush=True, zero_codes_defined=False)
            grouped = replace(group, scale_rule=ScaleRule.RECIPROCAL, payload_rule=PayloadRule.RECIPROCAL)
            codecs |= {
                f"token_hip_{kind}": replace(device, payload_rule=PayloadRule.APPROXIMATE_RECIPROCAL),
                f"group128_hip_{kind}": replace(grouped, may_flush=True),
                f"token_triton_{kind}": replace(token, payload_rule=PayloadRule.RECIPROCAL, zero_codes_defined=False),
            }
    for kind, payload in (("mxfp4", E2M1), ("mxfp8_fn", E4M3FN), ("mxfp8_fnuz", E4M3FNUZ)):
        for rule in _FROM_BITS:
            if rule is ScaleRule.EVEN_ONE_BIT and payload is E2M1:
                continue  # the same as EVEN
            codecs[f"{kind}_{rule.name.lower()}"] = Codec(
                payload, Granularity.GROUP, payload.max, rule, group=32, scale_format=ScaleFormat.E8M0
            )
    return codecs


#: The quantisers of AITER e4048607 and vLLM 0.33.0, and the OCP rules, by name.
STANDARD = _standard()
