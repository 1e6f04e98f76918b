"""Double of ``aiter.ops.flydsl.moe_common``: where gate and up lie in W1.

Scope: members and values of AITER e4048607. It proves nothing about AITER.
"""

from __future__ import annotations

import enum


class GateMode(str, enum.Enum):
    """How the stage-1 GEMM of a fused MoE finds gate and up."""

    SEPARATED = "separated"
    MOCK_GATE_ONLY = "mock_gate_only"
    GATE_ONLY = "gate_only"
    INTERLEAVE = "interleave"
