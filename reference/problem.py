"""Sizes of one mixture-of-experts layer on W expert-parallel ranks, and their validation.

Scope: plain integers that every other module takes. Nothing here imports torch, so that test collection stays cheap.
What a valid problem does not prove: that a given backend can run it; ask the backend's contract.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Element types of activations that cross the wire without quantisation, with their size in bytes.
ELEMENT_BYTES: dict[str, int] = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Wire:
    """How a dispatch carries quantised rows.

    Attributes:
        payload: ``"fp8"`` (one byte per element) or ``"fp4"`` (two elements per byte).
        group: elements of one scale; 0 for one scale per row.
        scale_bytes: 4 (float32) or 1 (E8M0).
    """

    payload: str
    group: int
    scale_bytes: int

    def row_bytes(self, hidden: int) -> int:
        """Bytes of one row's codes."""
        return hidden if self.payload == "fp8" else hidden // 2

    def scales(self, hidden: int) -> int:
        """Scales of one row."""
        return -(-hidden // self.group) if self.group else 1


#: Wire formats of a dispatch by name, as vLLM 0.33.0 chooses them for MoRI; "" carries rows in their element type.
WIRES: dict[str, Wire] = {
    "fp8_token": Wire("fp8", 0, 4),
    "fp8_group": Wire("fp8", 128, 4),
    "mxfp4": Wire("fp4", 32, 1),
}


class ProblemError(ValueError):
    """A size of a problem is out of its range. The message names the value, the limit and the fix."""


@dataclass(frozen=True)
class Problem:
    """One MoE layer on ``world_size`` ranks spread evenly over ``nodes`` nodes.

    Attributes:
        world_size: W, number of expert-parallel ranks.
        hidden: H, elements of one token's activation.
        experts: E, global number of experts; a multiple of ``world_size`` because MoRI derives the owner of expert e
            as ``e // (E // W)`` (MoRI 624002c8, intranode.hpp:128).
        top_k: k, experts a token is routed to.
        capacity: M, most tokens one rank may dispatch in one call.
        dtype: element type of the activations, a key of :data:`ELEMENT_BYTES`.
        nodes: N, nodes the ranks are spread over; ``world_size // nodes`` consecutive ranks share a node.
        wire: quantised format in which dispatch carries rows, a key of :data:`WIRES`, or "" for the element type;
            combine carries the element type in any case.

    Raises:
        ProblemError: a size is out of range.
    """

    world_size: int
    hidden: int
    experts: int
    top_k: int
    capacity: int
    dtype: str = "bfloat16"
    nodes: int = 1
    wire: str = ""

    def __post_init__(self) -> None:
        for name in ("world_size", "hidden", "experts", "top_k", "capacity", "nodes"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ProblemError(f"{name} is {value!r}; it must be an integer of at least 1")
        if self.experts % self.world_size:
            raise ProblemError(
                f"experts is {self.experts}, which {self.world_size} ranks do not divide; "
                f"use a multiple of {self.world_size} or another EP size"
            )
        if self.top_k > self.experts:
            raise ProblemError(f"top_k is {self.top_k}; it cannot exceed experts = {self.experts}")
        if self.world_size % self.nodes:
            raise ProblemError(f"nodes is {self.nodes}; it must divide world_size = {self.world_size}")
        if self.dtype not in ELEMENT_BYTES:
            raise ProblemError(f"dtype is {self.dtype!r}; choose one of {', '.join(sorted(ELEMENT_BYTES))}")
        if self.wire and self.wire not in WIRES:
            raise ProblemError(f'wire is {self.wire!r}; choose one of {", ".join(WIRES)}, or "" for none')
        if self.wire and self.hidden % max(WIRES[self.wire].group, 2):
            raise ProblemError(
                f"hidden is {self.hidden}; the wire {self.wire} takes multiples of {max(WIRES[self.wire].group, 2)}"
            )

    @property
    def experts_per_rank(self) -> int:
        """EPR, experts that one rank owns."""
        return self.experts // self.world_size

    @property
    def ranks_per_node(self) -> int:
        """Consecutive ranks that share a node (MoRI's ``gpu_per_node``)."""
        return self.world_size // self.nodes

    @property
    def element_bytes(self) -> int:
        """Bytes of one activation element."""
        return ELEMENT_BYTES[self.dtype]
