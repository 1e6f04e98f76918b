"""Routers with one defect each, as replacements in the double of AITER.

Scope: groups, scores, weights, ids that repeat or do not exist, rows that feel others. They synchronise the host where
that is convenient and prove nothing about timing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from accelerated.standin.aiter_ops.routing_kernels import read, sigmoid
from conformance.faults.row_replacements import Replacement, wrapped

Genuine = Callable[..., Any]
#: Groups of DeepSeek-V3's router, of which half are kept, and its experts, for which there is a kernel of their own.
GROUPS, V3_EXPERTS = 8, 256
#: Changes weights and ids, given logits, bias, scale and whether weights are renormalised.
Change = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float, bool], None]


def _afterwards(change: Change) -> Replacement:
    """What the biased grouped kernel wrote is changed."""

    def wrapper(
        genuine: Genuine,
        logits: torch.Tensor,
        bias: torch.Tensor,
        weights: torch.Tensor,
        ids: torch.Tensor,
        groups: int,
        kept: int,
        renormalise: bool,
        scale: float = 1.0,
    ) -> None:
        genuine(logits, bias, weights, ids, groups, kept, renormalise, scale)
        change(weights, ids, logits, bias, scale, renormalise)

    return wrapped("ops.topk:biased_grouped_topk_hip", wrapper)


def _grouped(score: Callable[[torch.Tensor], torch.Tensor], excluded: float) -> Replacement:
    """Another score of groups, or another value in the place of experts of groups that are not kept."""

    def change(
        weights: torch.Tensor, ids: torch.Tensor, logits: torch.Tensor, bias: torch.Tensor, scale: float, renorm: bool
    ) -> None:
        scores = sigmoid(read(logits))
        by_group = (scores + bias.float()).nan_to_num(nan=-torch.inf).view(len(logits), GROUPS, -1)
        kept = score(by_group).topk(GROUPS // 2, dim=1).indices
        held = torch.zeros(by_group.shape[:2], dtype=torch.bool).scatter_(1, kept, True)
        candidates = by_group.masked_fill(~held.unsqueeze(2), excluded).flatten(1)
        ids.copy_(candidates.topk(ids.shape[1], dim=1).indices)
        # As the kernel recovers them.
        subtracted = scores + bias.float() - bias.float() if logits.shape[1] == V3_EXPERTS else scores
        _weigh(weights, subtracted.gather(1, ids.long()), scale, renorm)

    return _afterwards(change)


def _weigh(weights: torch.Tensor, chosen: torch.Tensor, scale: float, renormalise: bool) -> None:
    weights.copy_(chosen * scale / (chosen.sum(1, keepdim=True) if renormalise else 1.0))


def _two_largest(by_group: torch.Tensor) -> torch.Tensor:
    return by_group.topk(2, dim=2).values.sum(2)


def _bias_in_weight(
    weights: torch.Tensor, ids: torch.Tensor, logits: torch.Tensor, bias: torch.Tensor, scale: float, renorm: bool
) -> None:
    choices = sigmoid(read(logits)) + bias.float()
    _weigh(weights, choices.gather(1, ids.long()), scale, renorm)


def _unscaled(
    weights: torch.Tensor, ids: torch.Tensor, logits: torch.Tensor, bias: torch.Tensor, scale: float, renorm: bool
) -> None:
    weights.div_(scale)


def _not_renormalised(
    weights: torch.Tensor, ids: torch.Tensor, logits: torch.Tensor, bias: torch.Tensor, scale: float, renorm: bool
) -> None:
    _weigh(weights, sigmoid(read(logits)).gather(1, ids.long()), scale, False)


def _repeats_under_nan(
    weights: torch.Tensor, ids: torch.Tensor, logits: torch.Tensor, bias: torch.Tensor, scale: float, renorm: bool
) -> None:
    """An argmax that a NaN ends hands out the expert before once more."""
    ids[:, 1] = torch.where(logits.isnan().any(1), ids[:, 0], ids[:, 1])


def _spoils_the_next(
    weights: torch.Tensor, ids: torch.Tensor, logits: torch.Tensor, bias: torch.Tensor, scale: float, renorm: bool
) -> None:
    """The row after one with a NaN gets its neighbours' experts."""
    after = torch.cat((torch.zeros(1, dtype=torch.bool), logits.isnan().any(1)[:-1]))
    ids.copy_(torch.where(after.unsqueeze(1), (ids + 1) % logits.shape[1], ids))


def _of_padding(
    genuine: Genuine, weights: torch.Tensor, ids: torch.Tensor, logits: torch.Tensor, *rest: Any, **named: Any
) -> None:
    """Columns up to the next power of two hold -inf and win every tie."""
    genuine(weights, ids, logits, *rest, **named)
    experts = logits.shape[1]
    padded = 1 << (experts - 1).bit_length()
    if padded > experts:
        nothing = ~(logits.float() > -torch.inf).any(1, keepdim=True)
        beyond = padded - 1 - torch.arange(ids.shape[1], dtype=ids.dtype)
        ids.copy_(torch.where(nothing, beyond, ids))


def _narrow_scores(
    genuine: Genuine,
    weights: torch.Tensor,
    ids: torch.Tensor,
    order: torch.Tensor,
    logits: torch.Tensor,
    renormalise: bool,
) -> None:
    """Experts are ranked by probabilities rounded to bfloat16, of equal ones the last first."""
    genuine(weights, ids, order, logits, renormalise)
    scores = torch.softmax(logits.float(), 1).nan_to_num(nan=0.0)
    ranked = torch.sort(scores.bfloat16().flip(1), dim=1, descending=True, stable=True).indices[:, : ids.shape[1]]
    _rewritten(weights, ids, logits.shape[1] - 1 - ranked, scores, renormalise)


def _beyond_the_tie(
    genuine: Genuine,
    weights: torch.Tensor,
    ids: torch.Tensor,
    order: torch.Tensor,
    logits: torch.Tensor,
    renormalise: bool,
) -> None:
    """Where the last chosen expert has an equal that is not, neither is: the lowest-ranked takes its place."""
    genuine(weights, ids, order, logits, renormalise)
    top_k = ids.shape[1]
    ranked = torch.sort(logits.float().nan_to_num(nan=-torch.inf), dim=1, descending=True, stable=True)
    tied = ranked.values[:, top_k - 1] == ranked.values[:, top_k]
    chosen = ranked.indices[:, :top_k].clone()
    chosen[:, -1] = torch.where(tied, ranked.indices[:, -1], chosen[:, -1])
    _rewritten(weights, ids, chosen, torch.softmax(logits.float(), 1), renormalise)


def _rewritten(
    weights: torch.Tensor, ids: torch.Tensor, chosen: torch.Tensor, scores: torch.Tensor, renormalise: bool
) -> None:
    ids.copy_(chosen)
    _weigh(weights, scores.gather(1, chosen), 1.0, renormalise)


def _other_order(
    genuine: Genuine,
    weights: torch.Tensor,
    ids: torch.Tensor,
    order: torch.Tensor,
    logits: torch.Tensor,
    renormalise: bool,
) -> None:
    """Weights in ascending, ids in descending order."""
    genuine(weights, ids, order, logits, renormalise)
    weights.copy_(weights.flip(1))


REPLACED: dict[str, tuple[Replacement, ...]] = {
    "bias_in_weight": (_afterwards(_bias_in_weight),),
    "groups_by_largest": (_grouped(lambda by_group: by_group.amax(2), -torch.inf),),
    "excluded_groups_at_zero": (_grouped(_two_largest, 0.0),),
    "scale_left_out": (_afterwards(_unscaled),),
    "not_renormalised": (_afterwards(_not_renormalised),),
    "ids_repeat_under_nan": (_afterwards(_repeats_under_nan),),
    "nan_spoils_next_row": (_afterwards(_spoils_the_next),),
    "ids_of_padding": (wrapped("ops.topk:topk_gating", _of_padding),),
    "ranked_by_bfloat16": (wrapped("ops.moe_op:topk_softmax", _narrow_scores),),
    "tie_broken_outside": (wrapped("ops.moe_op:topk_softmax", _beyond_the_tie),),
    "weights_in_other_order": (wrapped("ops.moe_op:topk_softmax", _other_order),),
}
