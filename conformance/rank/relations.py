"""Relations between two calls of the experts that need no model: how the second call is made and what it must give.

Scope: each relation changes the input so that the mathematics says what becomes of the output, and changes the output
back. Where the contract promises bits, those of the first call; elsewhere the first call's acceptance, which holds
for any order of the terms. What holding relations do not prove: that either result is right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from accelerated.experts import ExpertContract
from conformance.cases import Relation
from conformance.rank.inputs import Inputs
from reference.expert_numerics import ExpertNumerics, SlotSum, WeightStage

#: Scaling by a power of two rounds nothing unless it leaves the range.
_FACTOR = -2.0
#: How much longer the buffer of a second call is: as many rows again, at least one.
_LARGER = 3


@dataclass
class Second:
    """The second call of a relation.

    Attributes:
        rows, ids, weights: what it is given.
        back: takes its output to what the first call's should be.
        same_bits: the first call's bits are promised, not only its acceptance.
        local_order: local experts in another order, or None.
    """

    rows: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    back: Callable[[torch.Tensor], torch.Tensor]
    same_bits: bool


def applies(relation: Relation, numerics: ExpertNumerics) -> bool:
    """Whether the mathematics promises anything."""
    # Before a non-linear activation a factor is not one afterwards.
    return relation != "scaled weights" or numerics.weight_stage is WeightStage.AFTER_W2


def second_call(
    relation: Relation, given: Inputs, valid: int, contract: ExpertContract, seed: int, *, counted: bool, room: int
) -> Second | None:
    """The second call of ``relation`` after one on ``given``, of which the first ``valid`` rows are valid.

    ``room`` is the largest buffer. None where it would be no call that the contract takes. ``expert order`` changes the
    weights, not the call: its second call is the first's.
    """
    device, count = given.rows.device, given.rows.shape[0]
    same = Second(given.rows.clone(), given.ids.clone(), given.weights.clone(), lambda out: out, contract.deterministic)
    if relation == "expert order":
        same.same_bits = False
        return same
    if relation == "repeat":
        return same
    if relation == "token order":
        # Only among themselves: what lies beyond the count stays there.
        order = torch.cat([other_order(valid, seed), torch.arange(valid, count)]).to(device)
        inverse = torch.argsort(order)
        bits = contract.deterministic and contract.rows_alone
        return Second(given.rows[order], given.ids[order], given.weights[order], lambda out: out[inverse[:valid]], bits)
    if relation == "zero routes":
        # A slot of weight zero may name any expert, or none.
        zero = given.weights == 0
        return Second(
            given.rows.clone(), torch.where(zero, -1, given.ids), given.weights.clone(), lambda out: out, False
        )
    if relation == "slot order":
        order = other_order(given.ids.shape[1], seed).to(device)
        return Second(given.rows.clone(), given.ids[:, order], given.weights[:, order], lambda out: out, False)
    if relation == "scaled weights":
        exact = contract.deterministic and contract.numerics(count).slot_sum is not SlotSum.ATOMIC
        return Second(given.rows.clone(), given.ids.clone(), given.weights * _FACTOR, lambda out: out / _FACTOR, exact)
    assert relation == "larger buffer"
    if not counted:
        return None
    extra = min(max(_LARGER * count, 1), room - count)
    if extra < 1:
        return None
    rows = torch.cat([given.rows, given.rows.new_full((extra, given.rows.shape[1]), torch.nan)])
    ids = torch.cat([given.ids, given.ids.new_zeros(extra, given.ids.shape[1])])
    weights = torch.cat([given.weights, given.weights.new_ones(extra, given.weights.shape[1])])
    bits = contract.deterministic and contract.bits_at_any_rows and not _crosses(contract, count, count + extra)
    return Second(rows, ids, weights, lambda out: out, bits)


def other_order(count: int, seed: int) -> torch.Tensor:
    """A permutation of 0 to ``count - 1``, another one than the identity if there is any; int64."""
    if count < 2:
        return torch.arange(count)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order.roll(1) if torch.equal(order, torch.arange(count)) else order


def _crosses(contract: ExpertContract, few: int, many: int) -> bool:
    """Whether a boundary lies between two numbers of rows."""
    return any(few <= boundary < many for boundary in contract.boundaries)
