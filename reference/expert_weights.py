"""Weights of the experts that one rank holds, by local slot, in logical layout.

Scope: W1 and W2 of every local expert as codes and scales, one code per element, gate rows before up rows; what a
kernel wants (packing, shuffling, interleaving) is made from these. What equal weights do not prove: that a library's
layout of them is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from reference.codecs import Codec
from reference.rounding import decode
from reference.scales import expand


@dataclass
class ExpertWeights:
    """Weights of n experts.

    Attributes:
        w1: ``[n, 2 I, H]``: a floating type, or int64 codes of ``codec``'s payload, unpacked.
        w2: ``[n, H, I]``, likewise.
        codec: how they are stored, or None for a floating type.
        w1_scales: float64 ``[n, ...]``, each expert's as :func:`reference.scales.amax` shapes them for a matrix
            ``[2 I, H]`` (``(2 I, 1)`` per output channel, ``(2 I / 128, H / 128)`` per block, ``(2 I, H / 32)`` per
            group); None without codec.
        w2_scales: likewise for ``[H, I]``.
        bias1: float32 ``[n, 2 I]``, added to ``W1 x``, or None.
        bias2: float32 ``[n, H]``, added to ``W2 h`` before the routing weight, or None.
    """

    w1: torch.Tensor
    w2: torch.Tensor
    codec: Codec | None = None
    w1_scales: torch.Tensor | None = None
    w2_scales: torch.Tensor | None = None
    bias1: torch.Tensor | None = None
    bias2: torch.Tensor | None = None

    @property
    def experts(self) -> int:
        """n."""
        return self.w1.shape[0]

    def pick(self, slots: Sequence[int]) -> ExpertWeights:
        """The experts of the given slots, in that order."""
        index = torch.tensor(list(slots), dtype=torch.int64, device=self.w1.device)

        def of(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor[index]

        return ExpertWeights(
            self.w1[index],
            self.w2[index],
            self.codec,
            of(self.w1_scales),
            of(self.w2_scales),
            of(self.bias1),
            of(self.bias2),
        )

    def dequantised(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``W1 [n, 2 I, H]`` and ``W2 [n, H, I]``, float64, exact."""
        return self._matrix(self.w1, self.w1_scales), self._matrix(self.w2, self.w2_scales)

    def _matrix(self, stored: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
        if self.codec is None or scales is None:
            return stored.double()
        values = decode(stored, self.codec.payload)
        per_element = [expand(of_one, self.codec, *stored.shape[1:]) for of_one in scales]
        return values * torch.stack(per_element) if per_element else values
