"""Additivity of the experts: a token's slots one by one, and its shards' outputs, against the whole.

Scope: a routing weight counts once and for its own slot, negative weights included, and expert parallelism changes
nothing. *Slots apart*: a call for each slot, in which it alone has its weight. *Shards added*: every shard has one slot
of a token, and one rank that holds every expert has them all. A slot's term is one number where the contract says that
it has the same bits in either call, and only the last roundings are left between the sum and the whole: far less than
the acceptance of experts that do not say how they round. Where bits are not promised each call is judged by its own
acceptance, and nothing else. What holding relations do not prove: that the terms are right; the acceptances judge that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from conformance.rank.inputs import Inputs
from reference import experts
from reference.expert_numerics import ExpertNumerics, SlotSum
from reference.intervals import Interval


def slot_calls(given: Inputs) -> list[Inputs]:
    """Calls ``given`` taken apart: in call j every weight is zero but that of slot j."""
    calls = []
    for slot in range(given.weights.shape[1]):
        alone = torch.zeros_like(given.weights)
        alone[:, slot] = given.weights[:, slot]
        calls.append(Inputs(given.rows.clone(), given.ids.clone(), alone))
    return calls


def slots_together(
    outputs: Sequence[torch.Tensor], weights: torch.Tensor, numerics: ExpertNumerics, dtype: torch.dtype
) -> Interval:
    """Every legal whole ``[n, H]``, given what single slots came to.

    Args:
        outputs: ``[n, H]`` in ``dtype``, one slot of every row in each, of calls whose terms have the whole call's
            bits.
        weights: ``[n, k]`` of the whole call.
        numerics: of both; its ``inner_parts`` is 1, or a term is not one number.
        dtype: element type.
    """
    assert numerics.inner_parts == 1
    ends = [_before_the_store(output, numerics) for output in outputs]
    terms = Interval(*(torch.stack([getattr(one, end) for one in ends]) for end in ("value", "lower", "upper")))
    return experts.sum_slots(terms, (weights != 0).sum(1, keepdim=True), numerics, dtype)


def one_slot_each(ids: torch.Tensor, weights: torch.Tensor, shard_of: torch.Tensor) -> torch.Tensor:
    """Weights ``[n, k]`` of which every shard has one in a row: its first slot's; the others are zero.

    Args:
        ids: ``[n, k]`` global ids; -1 has no shard.
        weights: ``[n, k]``.
        shard_of: int64 ``[ids]``.
    """
    shard = torch.where(ids >= 0, shard_of[ids.long().clamp(min=0)], -1)
    earlier = (shard.unsqueeze(2) == shard.unsqueeze(1)).tril(-1).any(2)
    return torch.where(earlier, 0.0, weights)


def _before_the_store(output: torch.Tensor, numerics: ExpertNumerics) -> Interval:
    """What a slot's term was before it was stored; terms that are rounded before they are added are as they came."""
    value = output.double()
    if numerics.slot_sum is not SlotSum.FLOAT32:
        return Interval.exact(value)
    gap = _gaps(output, numerics)
    return Interval(value, value - gap, value + gap)


def _gaps(output: torch.Tensor, numerics: ExpertNumerics) -> torch.Tensor:
    """How far a rounding may have moved each element: half the larger gap to a neighbour, or all of it. Float64."""
    value = output.double()
    up = torch.nextafter(output, torch.full_like(output, torch.inf)).double()
    down = torch.nextafter(output, torch.full_like(output, -torch.inf)).double()
    return torch.maximum(up - value, value - down) * numerics.store_ulps
