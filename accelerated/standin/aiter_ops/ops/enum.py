"""Double of ``aiter.ops.enum``: quantisation types.

Scope: members and values of AITER e4048607 (csrc/include/aiter_enum.h:16). They compare with their own kind only, as
pybind members do. It proves nothing about AITER.
"""

from __future__ import annotations


class _Member:
    """One value of a pybind-like enumeration."""

    def __init__(self, name: str, value: int) -> None:
        self.name = name
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Member) and self.value == other.value

    def __hash__(self) -> int:
        return hash(self.value)

    def __int__(self) -> int:
        return self.value

    def __repr__(self) -> str:
        return f"<QuantType.{self.name}: {self.value}>"


class QuantType:
    """Which elements share a scale."""

    No = _Member("No", 0)
    per_Tensor = _Member("per_Tensor", 1)
    per_Token = _Member("per_Token", 2)
    per_1x32 = _Member("per_1x32", 3)
    per_1x128 = _Member("per_1x128", 4)
    per_128x128 = _Member("per_128x128", 5)
    per_256x128 = _Member("per_256x128", 6)
    per_1024x128 = _Member("per_1024x128", 7)
