"""Number formats as data: the element types of activations, payloads and scales.

Scope: the parameters from which :mod:`reference.rounding` encodes and decodes. Sources: OCP 8-bit Floating Point
Specification 1.0 (E4M3, E5M2), OCP Microscaling Formats (MX) Specification 1.0 (E2M1, E8M0), IEEE 754-2019 (binary16,
binary32), and for the FNUZ types the definition that LLVM's APFloat gives (Float8E4M3FNUZ, Float8E5M2FNUZ). Nothing
here imports torch. What a right table does not prove: that a device's casts agree with it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """A binary floating-point format: 1 sign bit, exponent, mantissa.

    Attributes:
        name: torch's name of the type, or what it would be.
        exponent_bits: width of the exponent field.
        mantissa_bits: width of the stored significand.
        bias: of the exponent.
        max_code: magnitude bits of the largest finite value.
        infinity_code: magnitude bits of infinity, or None if the format has none.
        nan_code: bits of the NaN that is written, sign excluded, or None if the format has none.
        negative_zero: False if the bits of minus zero are the format's only NaN (FNUZ).
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    max_code: int
    infinity_code: int | None
    nan_code: int | None
    negative_zero: bool = True

    @property
    def bits(self) -> int:
        """Width of a code."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def sign_bit(self) -> int:
        """Mask of the sign in a code."""
        return 1 << (self.bits - 1)

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number; subnormals share its spacing."""
        return 1 - self.bias

    @property
    def max(self) -> float:
        """Largest finite value."""
        exponent, mantissa = divmod(self.max_code, 1 << self.mantissa_bits)
        return float((1 + mantissa / 2.0**self.mantissa_bits) * 2.0 ** (exponent - self.bias))

    @property
    def smallest(self) -> float:
        """Smallest positive value, a subnormal: the spacing of all subnormals."""
        return float(2.0 ** (self.min_exponent - self.mantissa_bits))


FLOAT32 = Format("float32", 8, 23, 127, 0x7F7FFFFF, 0x7F800000, 0x7FC00000)
BFLOAT16 = Format("bfloat16", 8, 7, 127, 0x7F7F, 0x7F80, 0x7FC0)
FLOAT16 = Format("float16", 5, 10, 15, 0x7BFF, 0x7C00, 0x7E00)
#: OCP FP8 with 4 exponent bits: no infinity, S.1111.111 is NaN.
E4M3FN = Format("float8_e4m3fn", 4, 3, 7, 0x7E, None, 0x7F)
#: gfx942's FP8: bias 8, no infinity, 0x80 is the only NaN.
E4M3FNUZ = Format("float8_e4m3fnuz", 4, 3, 8, 0x7F, None, 0x80, negative_zero=False)
E5M2 = Format("float8_e5m2", 5, 2, 15, 0x7B, 0x7C, 0x7F)
E5M2FNUZ = Format("float8_e5m2fnuz", 5, 2, 16, 0x7F, None, 0x80, negative_zero=False)
#: MX FP4: neither infinity nor NaN.
E2M1 = Format("float4_e2m1fn", 2, 1, 1, 0x7, None, None)

FORMATS = {f.name: f for f in (FLOAT32, BFLOAT16, FLOAT16, E4M3FN, E4M3FNUZ, E5M2, E5M2FNUZ, E2M1)}
#: E8M0, the scale of an MX block, has no sign and no mantissa: code c is 2**(c - 127), 255 is NaN.
E8M0_BIAS = 127
E8M0_NAN = 255


class Ties(enum.Enum):
    """What becomes of a value halfway between two codes, or of every inexact one."""

    EVEN = "to nearest, ties to even"
    AWAY = "to nearest, ties away from zero"
    TRUNCATE = "towards zero"


class Overflow(enum.Enum):
    """What becomes of a value that rounds beyond the largest finite one, infinity included."""

    SATURATE = "the largest finite value"
    IEEE = "infinity, or NaN in a format without; an error in one with neither"
