"""Load balancing on tensors: replica choice, load counting and the copies of a rebalance.

Scope: :mod:`reference.eplb` for ids ``[T, k]`` and for weights by rank. No communication: the weights of all ranks are
given, and where a deployment sends and receives, a rank's part is read. What agreement does not prove: that an
exchange between ranks delivers what is read here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from reference.eplb import HASH_MASK, HASH_MULTIPLIER, EplbError, LogicalMaps, Slot


def physical_ids(ids: torch.Tensor, maps: LogicalMaps) -> torch.Tensor:
    """Physical ids for logical ``ids [T, k]``, in their dtype; see :func:`reference.eplb.physical_id`."""
    counts = torch.tensor(maps.counts, dtype=torch.int64, device=ids.device)
    table = torch.tensor(maps.physical, dtype=torch.int64, device=ids.device)
    wide = ids.to(torch.int64)
    known = (wide >= 0) & (wide < len(maps.counts))
    expert = torch.where(known, wide, 0)
    tokens = torch.arange(ids.shape[0], dtype=torch.int64, device=ids.device)[:, None]
    chosen = ((tokens * HASH_MULTIPLIER) & HASH_MASK) % counts[expert]
    return torch.where(known, table[expert, chosen], -1).to(ids.dtype)


def physical_load(ids: torch.Tensor, physical: int, unpadded: int) -> torch.Tensor:
    """Load int64 ``[P]`` of physical ``ids [T, k]``, their first ``unpadded`` rows; see the function of that name.

    Raises:
        EplbError: ``unpadded`` is not a number of rows of ``ids``.
    """
    if not 0 <= unpadded <= ids.shape[0]:
        raise EplbError(f"unpadded is {unpadded}; there are {ids.shape[0]} rows")
    flat = ids[:unpadded].reshape(-1).to(torch.int64)
    return torch.bincount(flat[flat >= 0], minlength=physical)


def move_weights(by_rank: Sequence[torch.Tensor], sources: Sequence[Slot | None]) -> list[torch.Tensor]:
    """Weights of every rank after a rebalance; the old ones stay as they are.

    Args:
        by_rank: per rank ``[P / W, ...]``, one row per local slot.
        sources: of every physical slot, as :func:`reference.eplb.moves` gives them. Empty slots keep what they held.

    Raises:
        EplbError: the ranks do not have the slots that ``sources`` speaks of.
    """
    per_rank = len(sources) // len(by_rank)
    sizes = {weights.shape[0] for weights in by_rank}
    if sizes != {per_rank} or per_rank * len(by_rank) != len(sources):
        raise EplbError(
            f"{len(by_rank)} ranks have {sorted(sizes)} slots each and the moves {len(sources)} in all; give every "
            f"rank its {per_rank}"
        )
    moved = [weights.clone() for weights in by_rank]
    for slot, source in enumerate(sources):
        if source is not None:
            moved[slot // per_rank][slot % per_rank] = by_rank[source.rank][source.local]
    return moved
