"""Output buffers that the suite hands to a quantiser: a guard behind each, and what was written before still in them.

Scope: shapes and strides as the contract's layout promises; every call of one shape gets the same buffers. What an
untouched guard does not prove: that nothing was written elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from accelerated.operators import QuantResult
from reference.codecs import Codec, Granularity, ScaleFormat, ScaleLayout
from reference.layouts import swizzled_shape

_GUARD = 512
_POISON = 0xA5


@dataclass
class Guarded:
    """A buffer and the bytes behind it."""

    whole: torch.Tensor  # uint8
    used: int  # bytes

    def intact(self) -> bool:
        """Whether nothing was written behind the buffer."""
        return bool((self.whole[self.used :] == _POISON).all())


class OutBuffers:
    """Buffers by shape, on one device."""

    def __init__(self, codec: Codec, device: torch.device) -> None:
        self._codec, self._device = codec, device
        self._held: dict[tuple[int, int], tuple[QuantResult, tuple[Guarded, Guarded]]] = {}

    def of(self, rows: int, columns: int) -> QuantResult:
        """Buffers for ``rows [M, N]``: poisoned when new, dirty when used before."""
        if (rows, columns) not in self._held:
            codec = self._codec
            width = columns // 2 if codec.payload.bits == 4 else columns
            codes, behind_codes = self._new((rows, width), torch.uint8)
            kind = torch.uint8 if codec.scale_format is ScaleFormat.E8M0 else torch.float32
            scales, behind_scales = self._scales(rows, columns, kind)
            self._held[rows, columns] = QuantResult(codes, scales), (behind_codes, behind_scales)
        return self._held[rows, columns][0]

    def damaged(self) -> str:
        """Name of a buffer behind which something was written, or an empty text."""
        for (rows, columns), (_, guards) in self._held.items():
            for name, guard in zip(("codes", "scales"), guards, strict=True):
                if not guard.intact():
                    return f"{name} of {rows} x {columns}"
        return ""

    def _scales(self, rows: int, columns: int, kind: torch.dtype) -> tuple[torch.Tensor, Guarded]:
        codec = self._codec
        if codec.granularity is Granularity.TENSOR:
            return self._new((1,), kind)
        groups = codec.groups(columns)
        if codec.granularity is Granularity.BLOCK:
            rows = -(-rows // codec.block_rows)
        if codec.scale_layout is ScaleLayout.COLUMN_MAJOR:
            transposed, guard = self._new((groups, rows), kind)
            return transposed.T, guard
        shape = swizzled_shape(rows, groups) if codec.scale_layout is ScaleLayout.SWIZZLED else (rows, groups)
        return self._new(shape, kind)

    def _new(self, shape: tuple[int, ...], kind: torch.dtype) -> tuple[torch.Tensor, Guarded]:
        used = torch.Size(shape).numel() * kind.itemsize
        whole = torch.full((used + _GUARD,), _POISON, dtype=torch.uint8, device=self._device)
        return whole[:used].view(kind).view(shape), Guarded(whole, used)
