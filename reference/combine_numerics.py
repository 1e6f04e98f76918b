"""What travels back in a combine, as data: the codecs that MoRI's combine may put on the wire between two BF16 ends.

Scope: the declaration, and the three codecs of MoRI 624002c8 by name (:func:`combine_codec`);
:mod:`reference.combine_codecs` carries them out and :mod:`reference.combine_bounds` bounds them. Nothing here imports
torch, so a contract can hold a codec in the driver. Which of them a kernel type takes is the contract's to say: MoRI's
IntraNode and IntraNodeLL take all three from an external buffer, AsyncLL the two of FP8, InterNodeV1 and V1LL
``fp8_direct_cast`` only, there with ``rounds_partials``. Sources: include/mori/core/transport/p2p/
device_primitives.hpp, src/ops/dispatch_combine/{intranode.hpp,internode_v1.cpp,low_latency_async.cpp}.
What a right declaration does not prove: that a kernel keeps it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from reference.formats import E2M1, E4M3FN, E4M3FNUZ, FORMATS, Format
from reference.problem import COMBINE_CODECS, ProblemError, block_width, check_blocks


class BlockScale(enum.Enum):
    """Scale s of a block with the largest magnitude ``amax`` (NaN ignored), and the factor f its elements get."""

    NONE = "no scale: elements are rounded and saturated as they are"
    WHERE_BEYOND = "s = amax * fl(1 / max), f = fl(max / amax) where amax > max; 1 and 1 elsewhere"
    ALWAYS = "s = fl(amax / max), f = fl(max / amax); 1 and 0 where amax is 0"


@dataclass(frozen=True)
class CombineCodec:
    """One combine codec.

    Attributes:
        name: MoRI's ``quant_type``, one of :data:`reference.problem.COMBINE_CODECS`.
        payload: format of the codes: rounded to nearest even, saturated at its largest finite value. E2M1 codes lie two
            per byte, the even element in the low nibble.
        scale: rule of the float32 scales.
        blocks: S, scales per row (``MORI_FP8_COMBINE_SCALE_DIM``); 0 without scales. Each stands for
            ``ceil(H / S)`` elements, so the last blocks may be short or empty.
        rounds_partials: each node's float32 sum is rounded and saturated to ``payload`` before the sum over nodes, with
            one node too (InterNodeV1 and V1LL, internode_v1.cpp:802, 852, 1314).

    Raises:
        ProblemError: fields that contradict each other.
    """

    name: str
    payload: Format
    scale: BlockScale = BlockScale.NONE
    blocks: int = 0
    rounds_partials: bool = False

    def __post_init__(self) -> None:
        if (self.scale is BlockScale.NONE) != (self.blocks == 0):
            raise ProblemError(
                f"blocks is {self.blocks} with scale rule {self.scale.name}; give the scales of a row for a rule, "
                "0 for none"
            )
        if self.rounds_partials and self.blocks:
            raise ProblemError(
                f"rounds_partials with {self.name}; no kernel re-rounds partial sums of blocks, use fp8_direct_cast"
            )

    def width(self, hidden: int) -> int:
        """B, elements of one block of a row of ``hidden``."""
        return block_width(hidden, self.blocks)

    def check(self, hidden: int) -> None:
        """Raise ProblemError unless rows of ``hidden`` elements can be coded (FP4 packs pairs)."""
        check_blocks(self.name, hidden, self.blocks)


def combine_codec(
    name: str, *, fp8: Format | str, scale_dim: int = 0, rounds_partials: bool = False
) -> CombineCodec | None:
    """The codec that MoRI calls ``name``; None for "" (rows return in their element type).

    Args:
        name: one of :data:`reference.problem.COMBINE_CODECS`, or "".
        fp8: the architecture's 8-bit float, E4M3FN or E4M3FNUZ or its torch name
            (``reference.catalogue.architecture(arch).fp8.dtype``); not looked at by ``fp4_blockwise``.
        scale_dim: S, scales of a row of the blockwise codecs; 0 otherwise.
        rounds_partials: True on InterNodeV1 and InterNodeV1LL.

    Raises:
        ProblemError: an unknown name or format, or a ``scale_dim`` that does not fit the name.
    """
    if not name:
        return None
    if name not in COMBINE_CODECS:
        raise ProblemError(f'codec is {name!r}; choose one of {", ".join(COMBINE_CODECS)}, or "" for none')
    payload = FORMATS.get(fp8) if isinstance(fp8, str) else fp8
    if payload not in (E4M3FN, E4M3FNUZ):
        raise ProblemError(f"fp8 is {fp8!r}; use {E4M3FN.name} or {E4M3FNUZ.name}, as the architecture has it")
    if name == "fp8_direct_cast":
        return CombineCodec(name, payload, blocks=scale_dim, rounds_partials=rounds_partials)
    if name == "fp8_blockwise":
        return CombineCodec(name, payload, BlockScale.WHERE_BEYOND, scale_dim, rounds_partials)
    return CombineCodec(name, E2M1, BlockScale.ALWAYS, scale_dim, rounds_partials)
