"""Weights of AITER's MoE kernels as they read them: unshuffled, decoded and scaled, a few experts at a time.

Scope: types and scale layouts of AITER e4048607 (aiter/fused_moe.py:3225-3330). A kernel takes scales for what it
expects, whatever type they have. A pass proves nothing about AITER's kernels.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch

from accelerated.standin.aiter_ops import defects, device, mx
from accelerated.standin.aiter_ops.experts_plan import Plan
from accelerated.standin.aiter_ops.ops.enum import QuantType
from accelerated.standin.aiter_ops.ops.shuffle import unshuffled, unshuffled_scales
from accelerated.standin.aiter_ops.utility import dtypes

#: Columns of W1 of which each part of a cut has a multiple (moe_cktile2stages_common.py:190, fused_moe.py:1268).
_TILE = 256
#: Elements of a matrix that is decoded once and kept, so that a case of many calls does not do it in each.
_KEPT = 1 << 21
_DECODED: dict[int, tuple[tuple[weakref.ref[torch.Tensor], ...], Hashable, torch.Tensor]] = {}
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass
class Weights:
    """Both matrices of the local experts.

    Attributes:
        w1: ``[E, 2 I, H]`` as it lies in memory, H halved where two elements share a byte.
        w2: ``[E, H, I]``, likewise.
        w1_scale: of any shape, or None.
        w2_scale: likewise.
        bias1: float32 ``[E, 2 I]``, or None.
        bias2: float32 ``[E, H]``, or None.
        quant: which elements share a scale: a ``QuantType``.
        plan: what the kernels do.
        late: the routing weight is applied to the result of W2.
        skipped: see :func:`accelerated.standin.aiter_ops.experts_plan.skipped`.
    """

    w1: torch.Tensor
    w2: torch.Tensor
    w1_scale: torch.Tensor | None
    w2_scale: torch.Tensor | None
    bias1: torch.Tensor | None
    bias2: torch.Tensor | None
    quant: object
    plan: Plan
    late: bool
    skipped: tuple[int, int, int, int] = (0, 0, 0, 0)
    experts: int = field(init=False)
    hidden: int = field(init=False)
    inner: int = field(init=False)

    def __post_init__(self) -> None:
        self.experts, self.hidden, _ = self.w2.shape
        self.inner = self.w1.shape[1] // 2

    @property
    def shares(self) -> int:
        """P, terms that a route adds."""
        return self.inner // self.plan.tile if self.plan.tile else 1

    @property
    def elements(self) -> int:
        """Of one expert."""
        return 3 * self.hidden * self.inner

    def times_w1(self, rows: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """``W1 x``, float32 ``[G, C, 2 I]``, gate before up; parts of H apart where the kernels cut it."""
        matrix = self._matrix(self.w1, self.w1_scale, chosen, self.plan.reads_shuffled[0], self.plan.interleaved)
        end = self.hidden - self.skipped[0]
        if self.plan.cuts == 1:
            return self._without_padding(rows[..., :end] @ matrix[..., :end].mT)
        width = -(-end // (self.plan.cuts * _TILE)) * _TILE
        cuts = [slice(at, min(at + width, end)) for at in range(0, end, width)]
        parts = [rows[..., cut] @ matrix[..., cut].mT for cut in cuts]
        stored = [part.to(self.plan.cut_type).to(self.plan.cut_sum) for part in parts]
        total = stored[0]
        for part in stored[1:]:
            total = total + part
        return self._without_padding(total.float())

    def _without_padding(self, product: torch.Tensor) -> torch.Tensor:
        """``[..., 2 I]`` with 0 where the kernel reads no rows of W1.

        CK-Tile shortens W1 by twice the padding (ck_tile/ops/flatmm/kernel/moe_flatmm_kernel.hpp, b_flat_tensor_view).
        Of rows that do not alternate that is the end of the ups, live ones among them, and none of the gates.
        """
        missing = self.skipped[1]
        if not missing or not self.plan.clears:
            return product
        if self.plan.cuts > 1 and defects.present(defects.UPS_CUT):
            product[..., 2 * (self.inner - missing) :] = 0
            return product
        product.view(*product.shape[:-1], 2, self.inner)[..., self.inner - missing :] = 0
        return product

    def times_w2(self, rows: torch.Tensor, weight: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """``W2 h``, biased and weighted, float32 ``[G, C, P, H]`` in P shares, of which each is added by itself."""
        end = self.inner - self.skipped[2]
        matrix = self._matrix(self.w2, self.w2_scale, chosen, self.plan.reads_shuffled[1], False)
        if self.plan.tile:
            groups, shares = len(chosen), self.shares
            first = rows.view(groups, -1, shares, self.plan.tile).transpose(1, 2)
            second = matrix.view(groups, self.hidden, shares, self.plan.tile).permute(0, 2, 3, 1)
            result = (first @ second).transpose(1, 2)
        else:
            result = (rows[..., :end] @ matrix[..., :end].mT)[:, :, None]
        result[..., self.hidden - self.skipped[3] :] = 0
        if self.bias2 is not None:
            result += self.bias2[chosen][:, None, None]
        return result * weight[:, :, None, None] if self.late else result

    def _matrix(
        self, stored: torch.Tensor, scale: torch.Tensor | None, chosen: torch.Tensor, shuffled: bool, interleaved: bool
    ) -> torch.Tensor:
        """Float32 ``[G, N, K]``, not to be written to."""
        if stored.numel() > _KEPT:
            return self._decoded(stored, scale, chosen, shuffled, interleaved)
        every = torch.arange(self.experts, device=chosen.device)
        how = (shuffled, interleaved, self.quant)
        whole = _kept(stored, scale, how, lambda: self._decoded(stored, scale, every, shuffled, interleaved))
        return whole[chosen]

    def _decoded(
        self, stored: torch.Tensor, scale: torch.Tensor | None, chosen: torch.Tensor, shuffled: bool, interleaved: bool
    ) -> torch.Tensor:
        if stored.dtype == dtypes.fp4x2:
            stored = stored.view(torch.uint8)
        part = _picked(stored, chosen)
        if shuffled:
            part = unshuffled(part.contiguous(), interleaved=interleaved)
        values = fp4_values(part) if part.dtype == torch.uint8 else part.float()
        return values if self.quant == QuantType.No else self._scaled(values, scale, chosen, interleaved)

    def _scaled(
        self, values: torch.Tensor, scale: torch.Tensor | None, chosen: torch.Tensor, interleaved: bool
    ) -> torch.Tensor:
        """``values [G, N, K]`` times their scales."""
        if scale is None:
            raise RuntimeError("memory access fault: the kernel follows a null pointer to the weights' scales")
        groups, rows, columns = values.shape
        if self.quant == QuantType.per_Token:
            return values.mul_(as_floats(scale, self.experts * rows).view(self.experts, rows, 1)[chosen])
        if self.quant == QuantType.per_1x128:
            high, wide = -(-rows // 128), -(-columns // 128)
            blocks = as_floats(scale, self.experts * high * wide).view(self.experts, high, wide)[chosen]
            of_rows = blocks.repeat_interleave(128, 1)[:, :rows]
            for block in range(wide):
                values[:, :, block * 128 : (block + 1) * 128] *= of_rows[:, :, block, None]
            return values
        codes = unshuffled_scales(scale, self.experts, rows, columns // 32, interleaved=interleaved)[chosen]
        values.view(groups, rows, -1, 32).mul_(mx.scale_values(codes)[..., None])
        return values


def as_floats(scale: torch.Tensor, count: int) -> torch.Tensor:
    """The first ``count`` float32 from where ``scale`` starts; behind its end is whatever memory holds."""
    raw = scale.contiguous().view(torch.uint8).view(-1)
    if raw.numel() < count * 4:
        raw = torch.cat((raw, device.empty((count * 4 - raw.numel(),), torch.uint8, raw.device)))
    return raw[: count * 4].view(torch.float32)


def fp4_values(packed: torch.Tensor) -> torch.Tensor:
    """Float32 ``[..., 2 N]`` of bytes ``[..., N]``, the even element in the lower half."""
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)], device=packed.device)
    pairs = torch.stack((table.repeat(16), table.repeat_interleave(16)), 1)
    return pairs[packed.long()].flatten(-2)


def _kept(
    stored: torch.Tensor, scale: torch.Tensor | None, how: Hashable, make: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """What ``make`` gives for two tensors, as long as both live and neither is written to."""
    both = (stored,) if scale is None else (stored, scale)
    if any(each.is_inference() for each in both):
        return make()  # their writes are not counted
    stamp = (how, tuple(each._version for each in both))
    known = _DECODED.get(id(stored))
    if (
        known is None
        or known[1] != stamp
        or len(known[0]) != len(both)
        or any(a() is not b for a, b in zip(known[0], both, strict=False))
    ):
        key = id(stored)
        references = tuple(weakref.ref(each, lambda _: _DECODED.pop(key, None)) for each in both)
        known = _DECODED[key] = (references, stamp, make())
    return known[2]


def _picked(stored: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Experts of a tensor, whose type torch may not know how to index."""
    raw = stored.view(torch.uint8) if stored.element_size() == 1 else stored
    return raw[chosen].view(stored.dtype)
