"""Additivity of the experts: a token's slots one by one, and its shards' sums, against the whole.

Scope: a routing weight counts once and for its own slot, negative weights included, and expert parallelism changes
nothing. *Slots apart*: a call for each slot, in which it alone has its weight. Where the contract promises the same
bits for the same call, a slot's term is the same number in every call, and only the last roundings are left between the
calls' sum and the whole: far less than the acceptance of experts that do not say how they round. *Shards added*: the
shards' outputs add up to what one rank that holds every expert may give. What holding relations do not prove: that the
terms are right; each call is judged by its own acceptance for that.
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
    """Every legal whole ``[n, H]``, given what the slots alone came to.

    Args:
        outputs: ``[n, H]`` in ``dtype`` for each slot, of calls whose terms have the whole call's bits.
        weights: ``[n, k]`` of the whole call.
        numerics: of both; its ``inner_parts`` is 1, or a term is not one number.
        dtype: element type.
    """
    assert numerics.inner_parts == 1
    ends = [_before_the_store(output, numerics) for output in outputs]
    terms = Interval(*(torch.stack([getattr(end, name) for end in ends]) for name in ("value", "lower", "upper")))
    count = (weights != 0).sum(1, keepdim=True)
    return experts.sum_slots(terms, count, numerics, dtype)


def shards_together(outputs: Sequence[torch.Tensor], whole: Interval, numerics: ExpertNumerics) -> Interval:
    """What the shards' outputs ``[n, H]`` may add up to, given what one rank with every expert may give.

    Each output was rounded to the element type once more than the whole's terms were, and the whole once.
    """
    dtype = outputs[0].dtype
    slack = sum((_gaps(output, numerics) for output in outputs), torch.zeros_like(whole.value))
    low, high = (end.to(dtype) for end in (whole.lower, whole.upper))
    slack = slack + torch.maximum(_gaps(low, numerics), _gaps(high, numerics))
    return Interval(whole.value, whole.lower - slack, whole.upper + slack)


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
