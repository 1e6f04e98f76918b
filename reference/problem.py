"""Sizes of one mixture-of-experts layer on W expert-parallel ranks, and their validation.

Scope: plain integers that every other module takes. Nothing here imports torch, so that test collection stays cheap.
What a valid problem does not prove: that a given backend can run it; ask the backend's contract.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

#: Element types of activations that cross the wire without quantisation, with their size in bytes.
ELEMENT_BYTES: dict[str, int] = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Wire:
    """How a dispatch carries quantised rows.

    Attributes:
        payload: ``"fp8"`` (one byte per element) or ``"fp4"`` (two elements per byte).
        group: elements of one scale; 0 for one scale per row.
        scale_bytes: 4 (float32) or 1 (E8M0 or raw bytes).
        count: scales of a row whatever its length, or -1 if the group says how many.
    """

    payload: str
    group: int
    scale_bytes: int
    count: int = -1

    def row_bytes(self, hidden: int) -> int:
        """Bytes of one row's codes."""
        return hidden if self.payload == "fp8" else hidden // 2

    def scales(self, hidden: int) -> int:
        """Scales of one row."""
        if self.count >= 0:
            return self.count
        return -(-hidden // self.group) if self.group else 1


#: Wire formats of a dispatch by name, as vLLM 0.33.0 chooses them for MoRI; "" carries rows in their element type.
#: With one scale per tensor (``fp8_tensor``) every rank knows it and no scale travels.
WIRES: dict[str, Wire] = {
    "fp8_token": Wire("fp8", 0, 4),
    "fp8_group": Wire("fp8", 128, 4),
    "mxfp4": Wire("fp4", 32, 1),
    "fp8_tensor": Wire("fp8", 0, 4, 0),
}
_RAW = re.compile(r"fp8_raw([1-9]\d{0,8})x([14])")

#: Formats in which combine carries rows between ranks; input and output keep their element type.
COMBINE_CODECS: tuple[str, ...] = ("fp8_direct_cast", "fp8_blockwise", "fp4_blockwise")

#: Ways of calling a dispatch and combine: expert rows are written into a buffer that the backend registered; no weights
#: are dispatched; a second dispatch repeats the first one's routing from a handle; received slots are counted per local
#: expert; the receive capacity is configured, for half of the tokens (:func:`most_tokens`) or above what is needed.
MODES: tuple[str, ...] = ("zero-copy", "weightless", "handle", "expert count", "capped", "capped above")


def wire_format(name: str) -> Wire:
    """The wire of a name: a key of :data:`WIRES`, or ``fp8_raw<n>x<b>``, FP8 with n raw scales of b = 1 or 4 bytes.

    Raises:
        ProblemError: no wire has that name.
    """
    if name in WIRES:
        return WIRES[name]
    if raw := _RAW.fullmatch(name):
        return Wire("fp8", 0, int(raw[2]), int(raw[1]))
    raise ProblemError(
        f'wire is {name!r}; choose one of {", ".join(WIRES)}, fp8_raw<n>x<1 or 4> with n below 10**9, or "" for none'
    )


class ProblemError(ValueError):
    """A size of a problem is out of its range. The message names the value, the limit and the fix."""


def most_tokens(capacity: int, modes: tuple[str, ...]) -> int:
    """Tokens that a rank may dispatch in one call: M, or ceil(M / 2) in the mode ``capped``, where no rank has room
    for more from each of its sources.
    """
    return -(-capacity // 2) if "capped" in modes else capacity


def block_width(hidden: int, blocks: int) -> int:
    """B = ceil(H / S): elements of one of the S ``blocks`` of a row; the last ones may be short or empty."""
    return -(-hidden // blocks)


def check_blocks(codec: str, hidden: int, blocks: int) -> None:
    """Raise unless ``codec`` can carry rows of ``hidden`` elements in ``blocks`` blocks.

    FP4 puts two elements into a byte, so a block must begin at an even one, and MoRI's kernel writes the last byte of
    an odd row once more for every empty block behind it (624002c8, device_primitives.hpp:2493-2519).

    Raises:
        ProblemError: a number of blocks that the codec does not take.
    """
    if (codec in ("fp8_blockwise", "fp4_blockwise")) != (blocks > 0) or blocks < 0:
        wanted = "at least 1" if codec.endswith("blockwise") else "0"
        raise ProblemError(f"scale_dim is {blocks} with codec {codec!r}; give {wanted}")
    if codec != "fp4_blockwise":
        return
    width = block_width(hidden, blocks)
    used = block_width(hidden, width)
    if width % 2:
        raise ProblemError(
            f"scale_dim is {blocks} with hidden = {hidden}: blocks of {width} elements, but fp4_blockwise packs pairs; "
            f"choose a scale_dim with an even ceil(hidden / scale_dim)"
        )
    if hidden % 2 and used < blocks:
        raise ProblemError(
            f"scale_dim is {blocks} with hidden = {hidden}: {used} blocks of {width} hold the row, and fp4_blockwise "
            f"takes no empty block behind an odd row; use a scale_dim of at most {used} or an even hidden"
        )


@dataclass(frozen=True)
class Problem:
    """One MoE layer on ``world_size`` ranks spread evenly over ``nodes`` nodes.

    Attributes:
        world_size: W, number of expert-parallel ranks.
        hidden: H, elements of one token's activation.
        experts: E, global number of experts; a multiple of ``world_size`` because MoRI derives the owner of expert e
            as ``e // (E // W)`` (MoRI 624002c8, intranode.hpp:128).
        top_k: k, experts a token is routed to.
        capacity: M, most tokens one rank may dispatch in one call; with a cap :attr:`most_tokens`.
        dtype: element type of the activations, a key of :data:`ELEMENT_BYTES`.
        nodes: N, nodes the ranks are spread over; ``world_size // nodes`` consecutive ranks share a node.
        wire: quantised format in which dispatch carries rows, as :func:`wire_format` takes it, or "" for the element
            type; combine returns the element type in any case.
        codec: format in which combine carries rows between ranks, one of :data:`COMBINE_CODECS`, or "" for the element
            type.
        scale_dim: S, blocks of a row for the blockwise codecs (MoRI's ``MORI_FP8_COMBINE_SCALE_DIM``); 0 without one.
        modes: how calls are made, of :data:`MODES`, in that order.

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
    codec: str = ""
    scale_dim: int = 0
    modes: tuple[str, ...] = ()

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
        if self.wire and self.hidden % max(wire_format(self.wire).group, 2):
            raise ProblemError(
                f"hidden is {self.hidden}; the wire {self.wire} takes multiples of "
                f"{max(wire_format(self.wire).group, 2)}"
            )
        if self.wire and wire_format(self.wire).scales(self.hidden) > self.hidden:
            raise ProblemError(
                f"wire is {self.wire!r}: {wire_format(self.wire).scales(self.hidden)} scales for rows of "
                f"{self.hidden} elements; give at most one for each element"
            )
        self._check_codec()
        if self.modes != tuple(mode for mode in MODES if mode in self.modes):
            raise ProblemError(f"modes are {list(self.modes)}; give some of {', '.join(MODES)}, in that order")

    def _check_codec(self) -> None:
        if self.codec not in ("", *COMBINE_CODECS):
            raise ProblemError(f'codec is {self.codec!r}; choose one of {", ".join(COMBINE_CODECS)}, or "" for none')
        if not isinstance(self.scale_dim, int):
            raise ProblemError(f"scale_dim is {self.scale_dim!r}; it must be an integer of at least 0")
        if self.codec and self.dtype != "bfloat16":
            raise ProblemError(f"dtype is {self.dtype!r} with codec {self.codec!r}; combine codes bfloat16 rows only")
        check_blocks(self.codec, self.hidden, self.scale_dim)

    @property
    def experts_per_rank(self) -> int:
        """EPR, experts that one rank owns."""
        return self.experts // self.world_size

    @property
    def ranks_per_node(self) -> int:
        """Consecutive ranks that share a node (MoRI's ``gpu_per_node``)."""
        return self.world_size // self.nodes

    @property
    def most_tokens(self) -> int:
        """Most tokens that a rank may dispatch in one call."""
        return most_tokens(self.capacity, self.modes)

    @property
    def most_rows(self) -> int:
        """R, most rows that a rank can receive: each source's tokens once."""
        return self.world_size * self.most_tokens

    @property
    def element_bytes(self) -> int:
        """Bytes of one activation element."""
        return ELEMENT_BYTES[self.dtype]
