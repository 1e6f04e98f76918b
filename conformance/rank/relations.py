"""Relations between two calls of the experts that need no model: how the second call is made and what it must give.

Scope: each relation changes the input so that the mathematics says what becomes of the output, and changes the output
back. Where the contract promises bits, those of the first call; elsewhere the first call's acceptance, which holds
for any order of the terms. Which relations say something about a cell is
:func:`conformance.layer_rules.relations_of`'s to know. What holding relations do not prove: that either result is
right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from accelerated.experts import ExpertContract
from conformance.cases import Relation
from conformance.rank.inputs import Inputs
from reference.expert_numerics import SlotSum

#: Scaling by a power of two rounds nothing unless it leaves the range.
_FACTOR = -2.0
#: How many rows more the buffer of a second call has, for each of the first's; at least one.
_LARGER = 3


@dataclass
class Second:
    """The second call of a relation.

    Attributes:
        rows, ids, weights: what it is given.
        back: takes its output to what the first call's should be.
        same_bits: the first call's bits are promised, not only its acceptance.
    """

    rows: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    back: Callable[[torch.Tensor], torch.Tensor]
    same_bits: bool


def second_call(
    relation: Relation, given: Inputs, valid: int, contract: ExpertContract, seed: int, *, experts: int, room: int
) -> Second:
    """The second call of ``relation`` after one on ``given``, of which the first ``valid`` rows are valid.

    Args:
        relation: one of two calls. ``expert order`` changes the weights, not the call: its second call is the first's.
        given: ids of the first call are below ``experts``.
        valid: rows.
        contract: says what is promised.
        seed: of orders.
        experts: routed ones, of all ranks.
        room: rows of the largest buffer.

    Raises:
        ValueError: no such relation of two calls, or no room for a larger buffer.
    """
    device, count = given.rows.device, given.rows.shape[0]
    rows, ids, weights = given.rows.clone(), given.ids.clone(), given.weights.clone()
    if relation == "repeat":
        return Second(rows, ids, weights, _as_it_is, contract.deterministic)
    if relation == "expert order":
        return Second(rows, ids, weights, _as_it_is, False)
    if relation == "token order":
        # Only among themselves: what lies beyond the count stays there.
        order = torch.cat([other_order(valid, seed), torch.arange(valid, count)]).to(device)
        inverse = torch.argsort(order)
        bits = contract.deterministic and contract.rows_alone
        return Second(rows[order], ids[order], weights[order], lambda out: out[inverse[:valid]], bits)
    if relation == "zero routes":
        return Second(rows, _other_experts(ids, weights, experts), weights, _as_it_is, False)
    if relation == "masked routes":
        # A slot that names no expert has no weight to apply, whatever stands there.
        gone = weights == 0
        return Second(
            rows, torch.where(gone, -1, ids), torch.where(gone, torch.ones_like(weights), weights), _as_it_is, False
        )
    if relation == "slot order":
        order = other_order(ids.shape[1], seed).to(device)
        return Second(rows, ids[:, order], weights[:, order], _as_it_is, False)
    if relation == "scaled weights":
        exact = contract.deterministic and contract.numerics(count).slot_sum is not SlotSum.ATOMIC
        return Second(rows, ids, weights * _FACTOR, lambda out: out / _FACTOR, exact)
    if relation != "larger buffer":
        raise ValueError(f"{relation!r} is no relation of two calls")
    extra = min(max(_LARGER * count, 1), room - count)
    if extra < 1:
        raise ValueError(f"the buffer has {count} rows and room for {room}; a larger one needs a row more")
    bits = contract.deterministic and contract.bits_at_any_rows and not _crosses(contract, count, count + extra)
    return Second(
        torch.cat([rows, rows.new_full((extra, rows.shape[1]), torch.nan)]),
        torch.cat([ids, ids.new_zeros(extra, ids.shape[1])]),
        torch.cat([weights, weights.new_ones(extra, weights.shape[1])]),
        _as_it_is,
        bits,
    )


def other_order(count: int, seed: int) -> torch.Tensor:
    """A permutation of 0 to ``count - 1``, another one than the identity if there is any; int64."""
    if count < 2:
        return torch.arange(count)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order.roll(1) if torch.equal(order, torch.arange(count)) else order


def _as_it_is(output: torch.Tensor) -> torch.Tensor:
    return output


def _other_experts(ids: torch.Tensor, weights: torch.Tensor, experts: int) -> torch.Tensor:
    """Ids with every routed slot of weight zero named anew: an expert that its row does not name, if there is one."""
    changed = ids.clone()
    for row, slot in (weights == 0).nonzero().tolist():
        named = set(changed[row].tolist())
        mine = int(changed[row, slot])
        if mine < experts:  # a shared expert keeps its column
            free = ((mine + step) % experts for step in range(1, experts))
            changed[row, slot] = next((e for e in free if e not in named), mine)
    return changed


def _crosses(contract: ExpertContract, few: int, many: int) -> bool:
    """Whether a boundary lies between two numbers of rows."""
    return any(few <= boundary < many for boundary in contract.boundaries)
