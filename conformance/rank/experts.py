"""The probe experts: one distinct affine map per expert, never the identity.

``f_e(x) = a_e x + b_e`` with ``a_e = 2 + e mod 13`` and ``b_e = e mod 61 - 30``: the pair is distinct for up to 793
experts, so a wrong expert, a swapped row and a dropped slot all change the result. A rank holds coefficients of its own
experts only, by local slot, as a real rank holds weights. What they do not probe: GEMMs and activations.
"""

from __future__ import annotations

import torch

from conformance.cases import Cell
from reference.placement import expert_map, owned_experts


def coefficients(expert: int) -> tuple[int, int]:
    """``(a_e, b_e)`` of a global expert."""
    return 2 + expert % 13, expert % 61 - 30


def scaling_coefficient(expert: int) -> float:
    """``a_e`` of a scaling expert."""
    return 2.0 ** (expert % 3 - 1)


def dense_experts(names: torch.Tensor, x: torch.Tensor, *, scaling: bool = False) -> torch.Tensor:
    """``f_e(x)`` row by row, in the precision of ``x [n, H]``; ``names [n]`` are global experts."""
    if scaling:
        return torch.exp2((names % 3 - 1).to(x.dtype)).unsqueeze(1) * x
    return (2 + names % 13).to(x.dtype).unsqueeze(1) * x + (names % 61 - 30).to(x.dtype).unsqueeze(1)


class LocalExperts:
    """The experts that one rank owns under a placement, applied to received rows."""

    def __init__(self, cell: Cell, rank: int, device: torch.device) -> None:
        owned = owned_experts(cell.experts, cell.world_size, rank, cell.placement)
        table = torch.tensor([coefficients(e) for e in owned], dtype=torch.float32, device=device)
        self._a, self._b = table[:, 0], table[:, 1]
        self._scaling = torch.tensor([scaling_coefficient(e) for e in owned], device=device)
        self._experts = cell.experts
        self._slot_of = _wire_map(cell, rank, device)

    def __call__(
        self, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, *, scaling: bool = False
    ) -> torch.Tensor:
        """Weighted sum over the local slots: ``[R, H]`` in the dtype of ``rows``, zero for rows without local slot.

        ``ids [R, k]`` are ids as dispatched; undefined rows (stale ids, NaN) give undefined results and never fault.
        """
        known = (ids >= 0) & (ids < self._experts)
        slot = self._slot_of[ids.clamp(0, self._experts - 1).long()]
        local = known & (slot >= 0)
        slot = slot.clamp(min=0)
        weight = torch.where(local, weights, 0.0)
        if scaling:
            # Products with powers of two are exact; what has no local slot is +0, whatever the row holds.
            scale = (weight * self._scaling[slot]).sum(1, keepdim=True)
            return torch.where(scale > 0, rows.float() * scale, 0.0).to(rows.dtype)
        scale = (weight * self._a[slot]).sum(1, keepdim=True)
        offset = (weight * self._b[slot]).sum(1, keepdim=True)
        return (rows.float() * scale + offset).to(rows.dtype)


def _wire_map(cell: Cell, rank: int, device: torch.device) -> torch.Tensor:
    """Local slot of every id as dispatched, -1 if not local: ``[E]`` int64."""
    if cell.placement == "round_robin":
        # Ids travel as physical positions: rank-major, so the local slot is the offset in the rank's block.
        per_rank = cell.experts // cell.world_size
        position = torch.arange(cell.experts, device=device) - rank * per_rank
        return torch.where((position >= 0) & (position < per_rank), position, -1)
    slots = expert_map(cell.experts, cell.world_size, rank, cell.placement)
    if slots is None:
        return torch.arange(cell.experts, device=device)
    return torch.tensor(slots, dtype=torch.int64, device=device)
