"""What travels back in combine when a codec is on: codes and scales of bfloat16 rows, and the sum over them.

Scope: ``fp8_direct_cast``, ``fp8_blockwise`` and ``fp4_blockwise`` of MoRI 624002c8
(include/mori/core/transport/p2p/device_primitives.hpp), each step in the float32 arithmetic of the source. Where the
library leaves a choice open the double takes one: the kernels with a vector path fuse multiplication and addition,
the generic FP8 one multiplies and then adds. Rows with NaN or infinities are coded as the arithmetic has it; the
library promises nothing for them. It proves nothing about the conversion instructions of a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

#: Magnitudes of E2M1, by code.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
#: A magnitude above the bound has passed this many codes (ties go down), at or above it that many (ties go up).
_TIES_DOWN, _TIES_UP = (0.25, 1.25, 2.5, 5.0), (0.75, 1.75, 3.5)


def fp8_type(arch: str) -> torch.dtype:
    """The E4M3 flavour of combine: FNUZ on gfx942, OCP elsewhere."""
    return torch.float8_e4m3fnuz if arch.startswith("gfx942") else torch.float8_e4m3fn


def to_fp8(values: torch.Tensor, flavour: torch.dtype) -> torch.Tensor:
    """Round float32 ``values`` to nearest even and saturate at the largest finite value."""
    largest = torch.finfo(flavour).max
    return values.clamp(-largest, largest).to(flavour)


def to_e2m1(values: torch.Tensor) -> torch.Tensor:
    """Round float32 ``values`` to nearest even, saturating at 6; codes 0 to 15 as uint8."""
    size = values.abs()
    code = torch.zeros_like(values, dtype=torch.uint8)
    for bound in _TIES_DOWN:
        code += size > bound
    for bound in _TIES_UP:
        code += size >= bound
    return code | (torch.signbit(values).to(torch.uint8) << 3)


def from_e2m1(codes: torch.Tensor) -> torch.Tensor:
    """Float32 values of uint8 ``codes`` 0 to 15."""
    table = torch.tensor([*_E2M1, *(-size for size in _E2M1)], device=codes.device)
    return table[codes.long()]


def multiply_add(values: torch.Tensor, scales: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """``values * scales + total`` of float32 tensors with one rounding.

    ``values`` have at most 24 - 1 bits fewer than a float64 product holds, so the product is exact there; the sum is
    rounded to odd, after which rounding to float32 is right.
    """
    product = values.double() * scales.double()
    addend = total.double()
    found = product + addend
    part = found - product
    error = (product - (found - part)) + (addend - part)
    bits = found.view(torch.int64)
    up = (error > 0) == (found > 0)
    odd = bits + torch.where(up, 1, -1) * ((error != 0) & (bits & 1 == 0) & found.isfinite()).long()
    return odd.view(torch.float64).float()


@dataclass(frozen=True)
class Codec:
    """One ``quant_type`` at run time.

    Attributes:
        name: ``fp8_direct_cast``, ``fp8_blockwise`` or ``fp4_blockwise``.
        flavour: FP8 type of the architecture.
        scale_dim: S, blocks of a row; 0 for fp8_direct_cast.
        odd_blocks: fp4_blockwise packs odd blocks as upstream, into their neighbour's bytes.
        empty_blocks: an empty block past an odd end codes the last element again, as upstream.
    """

    name: str
    flavour: torch.dtype
    scale_dim: int = 0
    odd_blocks: bool = True
    empty_blocks: bool = True

    @property
    def blockwise(self) -> bool:
        """Scales travel with the codes."""
        return self.name != "fp8_direct_cast"

    def code_bytes(self, hidden: int) -> int:
        """Bytes of the codes of one row."""
        return (hidden + 1) // 2 if self.name == "fp4_blockwise" else hidden

    def row_bytes(self, hidden: int) -> int:
        """Bytes of one staged row without weights."""
        return self.code_bytes(hidden) + 4 * self.scale_dim

    def block(self, hidden: int) -> int:
        """Elements of one block, the last one shorter or empty."""
        return -(-hidden // self.scale_dim)

    # ---- sender ---------------------------------------------------------------------------------------------------

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """Return ``[q, bytes]`` uint8 for bfloat16 ``rows [q, h]``: codes, padded to words, then float32 scales."""
        if not self.blockwise:
            return to_fp8(rows.float(), self.flavour).view(torch.uint8)
        values = rows.float()
        scales, inverse = self._scales(values)
        owner = self._coded_by(rows.size(1), rows.device)
        scaled = values * inverse[:, owner]
        if self.name == "fp8_blockwise":
            codes = to_fp8(scaled, self.flavour).view(torch.uint8)
            any_scaled = (scales != 1.0).any(1)
        else:
            codes = self._packed(to_e2m1(scaled))
            any_scaled = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        # The sign of the first scale tells the receiver that the row has scales at all.
        scales[:, 0] = torch.where(any_scaled, -scales[:, 0], scales[:, 0])
        padding = codes.new_zeros(len(codes), -codes.size(1) % 4)
        return torch.cat([codes, padding, scales.view(torch.uint8)], 1)

    @property
    def _largest(self) -> float:
        return 6.0 if self.name == "fp4_blockwise" else float(torch.finfo(self.flavour).max)

    def _scales(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and factor, ``[q, S]`` float32 each, of ``values [q, h]``."""
        block, hidden = self.block(values.size(1)), values.size(1)
        size = values.abs().nan_to_num(nan=0.0, posinf=float("inf"))
        filled = torch.nn.functional.pad(size, (0, block * self.scale_dim - hidden))
        amax = filled.view(-1, self.scale_dim, block).amax(2)
        largest = torch.tensor(self._largest, device=values.device)
        if self.name == "fp8_blockwise":
            scaled = amax > largest
            return torch.where(scaled, amax * (1.0 / largest), 1.0), torch.where(scaled, largest / amax, 1.0)
        some = amax > 0
        return torch.where(some, amax / largest, 1.0), torch.where(some, largest / amax, 0.0)

    def _coded_by(self, hidden: int, device: torch.device) -> torch.Tensor:
        """Block whose factor codes element i: its own, or under odd packing the block that wrote its byte last."""
        block = self.block(hidden)
        index = torch.arange(hidden, device=device)
        owner = index // block
        if self.name == "fp4_blockwise" and self.odd_blocks:
            shared = (block % 2 == 1) & (index % 2 == 0) & (index % block == block - 1) & (index + 1 < hidden)
            owner = owner + shared.long()
        empty = hidden % 2 == 1 and self.scale_dim - 1 > (hidden - 1) // block
        if self.name == "fp4_blockwise" and self.empty_blocks and empty:
            owner[-1] = self.scale_dim - 1  # an empty block past an odd end writes the last byte again
        return owner

    @staticmethod
    def _packed(codes: torch.Tensor) -> torch.Tensor:
        if codes.size(1) % 2:
            codes = torch.nn.functional.pad(codes, (0, 1))
        return codes[:, 0::2] | (codes[:, 1::2] << 4)

    # ---- receiver -------------------------------------------------------------------------------------------------

    def decode(
        self, wire: torch.Tensor, hidden: int, width: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return float32 values ``[q, h]`` and the scale of each, or None where no scales travel.

        ``width`` is the block that a receiver takes where it is not the sender's; a scale past the last is poison.
        """
        count = self.code_bytes(hidden)
        codes = wire[:, :count]
        if self.name == "fp4_blockwise":
            values = from_e2m1(torch.stack([codes & 15, codes >> 4], 2).flatten(1)[:, :hidden])
        else:
            values = codes.contiguous().view(self.flavour).float()
        if not self.blockwise:
            return values, None
        start = -(-count // 4) * 4
        scales = wire[:, start : start + 4 * self.scale_dim].contiguous().view(torch.float32)
        marked = scales[:, :1] < 0
        used = torch.where(marked, scales.abs(), 1.0)
        owner = torch.arange(hidden, device=wire.device) // (width or self.block(hidden))
        if width is not None:
            used = torch.cat([used, torch.where(marked, math.nan, 1.0)], 1)
            owner.clamp_(max=self.scale_dim)
        return values, used[:, owner]

    def fold(self, values: torch.Tensor, scales: torch.Tensor | None, fused: bool) -> torch.Tensor:
        """Add ``[k, n, h]`` float32 terms one slot after the other; ``fused`` rounds each step once."""
        total = torch.zeros_like(values[0])
        for slot, value in enumerate(values):
            if scales is None:
                total += value
            elif fused or self.name == "fp4_blockwise":
                total = multiply_add(value, scales[slot], total)
            else:
                total += value * scales[slot]
        return total


def kernel_name(codec: Codec, hidden: int, top_k: int, world: int, weights: bool) -> tuple[str, bool]:
    """Return the symbol that a blockwise combine launches on IntraNode and IntraNodeLL, and whether it is a fast one.

    Fast: no weights, rows of whole 512 elements, 8 or 9 slots, more than 4 ranks, blocks of 128 or 256.
    """
    name = f"EpCombineIntraNodeKernel_bf16_nop2p_{codec.name}"
    block = codec.block(hidden)
    fast = not weights and hidden % 512 == 0 and top_k in (8, 9) and world > 4 and block in (128, 256)
    if fast:
        name += f"_noweight_block{block}_vec8" + ("_top9" if top_k == 9 else "")
    return name, fast
