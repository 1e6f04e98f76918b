"""Double of ``aiter.ops.enum``: activations and quantisation types.

Scope: members and values of AITER e4048607 (csrc/include/aiter_enum.h:7, 16). They compare with their own kind only, as
pybind members do. It proves nothing about AITER.
"""

from __future__ import annotations


class _Member:
    """One value of a pybind-like enumeration."""

    def __init__(self, kind: str, name: str, value: int) -> None:
        self.kind = kind
        self.name = name
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Member) and (self.kind, self.value) == (other.kind, other.value)

    def __hash__(self) -> int:
        return hash(self.value)

    def __int__(self) -> int:
        return self.value

    def __repr__(self) -> str:
        return f"<{self.kind}.{self.name}: {self.value}>"


class ActivationType:
    """What stands between the two GEMMs of an expert."""

    No = _Member("ActivationType", "No", -1)
    Silu = _Member("ActivationType", "Silu", 0)
    Gelu = _Member("ActivationType", "Gelu", 1)
    Swiglu = _Member("ActivationType", "Swiglu", 2)
    Situv2 = _Member("ActivationType", "Situv2", 3)


class QuantType:
    """Which elements share a scale."""

    No = _Member("QuantType", "No", 0)
    per_Tensor = _Member("QuantType", "per_Tensor", 1)
    per_Token = _Member("QuantType", "per_Token", 2)
    per_1x32 = _Member("QuantType", "per_1x32", 3)
    per_1x128 = _Member("QuantType", "per_1x128", 4)
    per_128x128 = _Member("QuantType", "per_128x128", 5)
    per_256x128 = _Member("QuantType", "per_256x128", 6)
    per_1024x128 = _Member("QuantType", "per_1024x128", 7)
