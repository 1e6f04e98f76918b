"""Routers: expert ids and weights from router logits, as an executable definition and as what is accepted.

Scope: :func:`route` carries out a :class:`RouterNumerics`; the ``accepted`` functions say which sets of ids are legal
and, given the ids that came back, in which interval each weight lies. Scores are intervals, so that a tie is open and
nothing else is: an expert whose score lies above that of every other candidate must be chosen. Where the choice of
groups is open as well, a set is legal if it is with one legal choice of groups. The order of ids is not looked at but
by :func:`in_order`. Sources: see :mod:`reference.router_numerics`. What an accepted result does not prove: that scores
which rank experts and scores which become weights are the same numbers.

Symbols: M tokens, E experts, k chosen, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from reference.formats import FLOAT32, Format
from reference.intervals import FLOAT32_NORMAL, Interval
from reference.problem import ProblemError
from reference.rounding import round_to_format
from reference.router_numerics import GroupScore, Ranking, Recovery, RouterNumerics, Score, Special
from reference.sums import add_up, unit_roundoff

_UNIT = unit_roundoff(FLOAT32)
#: Exponentials of less are zero in float32, subnormals included; float64 has them.
_LOWEST = -300.0
#: Sums of weights between which neither their reciprocal nor its product with a scale leaves float32.
_SUMS = (2.0**-100, 2.0**100)


# ------------------------------------------------------------------------------------------------------ definition
def route(
    logits: torch.Tensor, bias: torch.Tensor | None, numerics: RouterNumerics
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights ``[M, k]`` float32 and ids ``[M, k]`` int32, by descending choice.

    Args:
        logits: ``[M, E]``, any floating type.
        bias: ``[E]``, any floating type: added for the choice, not in the weights; or None.
        numerics: the router.

    Raises:
        ProblemError: the router has no answer for E experts.
    """
    _check(logits, bias, numerics)
    x = logits.float()
    score = _score(x, numerics)
    choice = x if numerics.ranking is Ranking.LOGIT else score
    if bias is not None:
        choice = _stored(choice + bias.float(), numerics)
    # NaN ranks last: the ids are distinct whatever the logits are.
    candidates, experts = _of_kept_groups(choice.masked_fill(choice.isnan(), -torch.inf), numerics)
    place = candidates.topk(numerics.top_k, dim=1).indices
    ids = experts.gather(1, place)
    if numerics.score is Score.CHOSEN_SOFTMAX:
        return _finished(torch.softmax(x.gather(1, ids), dim=1), numerics), ids.int()
    if numerics.recovery is Recovery.SUBTRACTED and bias is not None:
        weights = choice.gather(1, ids) - bias.float()[ids]
    else:
        weights = score.gather(1, ids)
    if numerics.renormalise:
        total = weights.sum(1, keepdim=True) + numerics.sum_added
        weights = weights / total.clamp(min=numerics.sum_floor)
    return _finished(weights, numerics), ids.int()


def _score(x: torch.Tensor, numerics: RouterNumerics) -> torch.Tensor:
    """``[M, E]`` float32."""
    if numerics.score is Score.SOFTMAX:
        return _stored(torch.softmax(x, dim=1), numerics)
    if numerics.score is Score.SIGMOID:
        return _stored(torch.sigmoid(x), numerics)
    if numerics.score is Score.SQRT_SOFTPLUS:
        return _stored((x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))).sqrt(), numerics)
    return x


def _of_kept_groups(choice: torch.Tensor, numerics: RouterNumerics) -> tuple[torch.Tensor, torch.Tensor]:
    """Choices of the experts in the groups that are kept, and who they are; ``[M, groups_kept * E / G]``."""
    count, experts = choice.shape
    size = experts // numerics.groups
    by_group = choice.view(count, numerics.groups, size)
    kept = _group_score(by_group, numerics).topk(numerics.groups_kept, dim=1).indices
    ids = (kept.unsqueeze(2) * size + torch.arange(size, device=choice.device)).flatten(1)
    return choice.gather(1, ids), ids


def _group_score(by_group: torch.Tensor, numerics: RouterNumerics) -> torch.Tensor:
    """``[M, G]``; non-decreasing in every choice."""
    if numerics.groups == 1:
        return by_group[:, :, 0]
    if numerics.group_score is GroupScore.MAX:
        return by_group.amax(2)
    return by_group.topk(2, dim=2).values.sum(2)


def _stored(values: torch.Tensor, numerics: RouterNumerics) -> torch.Tensor:
    """Float32 rounded to the format of scores."""
    return _rounded(values, numerics.score_store)


def _finished(weights: torch.Tensor, numerics: RouterNumerics) -> torch.Tensor:
    return _rounded(weights * numerics.factor, numerics.weight_store)


def _rounded(values: torch.Tensor, to: Format | None) -> torch.Tensor:
    if to is None:
        return values
    finite = values.isfinite()
    return torch.where(finite, round_to_format(values.double().masked_fill(~finite, 0.0), to).float(), values)


# ---------------------------------------------------------------------------------------------------------- scores
def plain_rows(logits: torch.Tensor, numerics: RouterNumerics) -> torch.Tensor:
    """Rows ``[M]`` of which everything is promised: no NaN, no +inf, at least k finite logits."""
    beyond = logits.isnan() | (logits == torch.inf)
    return ~beyond.any(1) & (logits.isfinite().sum(1) >= numerics.top_k)


def accepted_scores(logits: torch.Tensor, numerics: RouterNumerics) -> Interval:
    """Scores ``[M, E]`` that experts may have; of rows with NaN or +inf, those of zeros in their place.

    A score that is subnormal in float32 may be zero: an exponential overflows there.
    """
    x = _ordinary(logits)
    if numerics.score is Score.CHOSEN_SOFTMAX:
        raise ProblemError("a softmax over the chosen logits has no scores before the choice; ask for choices")
    if numerics.score is Score.SOFTMAX:
        terms = _exponentials(x, numerics)
        total = add_up(terms, dim=1).apply(lambda end: end.unsqueeze(1))
        score = (terms / total).within_ulps(numerics.score_ulps)
    elif numerics.score is Score.SIGMOID:
        one = Interval.exact(torch.ones_like(x))
        score = (one / (one + _exponential(-x, numerics)).widened(_UNIT)).within_ulps(numerics.score_ulps)
    else:
        score = _softplus(x, numerics).flushed().sqrt(ulps=numerics.score_ulps)
    score = score.flushed().apply(lambda end: end.clamp(min=0))
    return score if numerics.score_store is None else score.store(numerics.score_store)


def _ordinary(logits: torch.Tensor) -> torch.Tensor:
    """Float64, with 0 for NaN and +inf, of which nothing is said, and a number whose exponential is 0 for -inf."""
    x = logits.double()
    return torch.where(x.isnan() | (x == torch.inf), 0.0, x).clamp(min=-FLOAT32.max)


def _exponentials(x: torch.Tensor, numerics: RouterNumerics) -> Interval:
    """``exp(x - max)``, the difference rounded, along dimension 1."""
    return _exponential(x - x.amax(1, keepdim=True), numerics, argument_units=1.0)


def _exponential(x: torch.Tensor, numerics: RouterNumerics, argument_units: float = 0.0) -> Interval:
    """``exp(x)`` as float32 functions give it, without their overflow.

    Its argument is off by ``argument_units`` units, and by two more where it is multiplied by a rounded log2 e.
    """
    x = x.clamp(_LOWEST, -_LOWEST)
    units = argument_units + (2.0 if numerics.scaled_exponent else 0.0)
    # The units' products are second-order: a thousandth more covers them, and float64.
    moved = torch.expm1(x.abs() * (units * _UNIT * 1.001)) * (1 + 2.0**-40) + 2.0**-45
    value = torch.exp(x)
    off = Interval(value, value, value).widened(relative=moved)
    return off.within_ulps(numerics.score_ulps).flushed().apply(lambda end: end.clamp(min=0))


def _softplus(x: torch.Tensor, numerics: RouterNumerics) -> Interval:
    """``log(1 + exp(x))``: an exponential and a logarithm, both with their errors, or x itself where it is large."""
    exact = x.clamp(min=0) + torch.log1p(torch.exp(-x.abs().clamp(max=-_LOWEST)))
    # |d log softplus / d log exp(x)| is at most 1, and where x is positive at most 1 / x.
    scaled = 2.0 * _UNIT * 1.001 * ((-x).clamp(min=1.0, max=-_LOWEST) + 1.0) if numerics.scaled_exponent else 0.0
    relative = scaled + 4.0 * numerics.score_ulps * _UNIT + 2.0**-45
    return (
        Interval(exact, exact, exact)
        .widened(relative, absolute=numerics.softplus_error + 2.0 * numerics.score_ulps * FLOAT32.smallest)
        .apply(lambda end: end.clamp(min=0))
    )


def accepted_choices(
    logits: torch.Tensor, bias: torch.Tensor | None, numerics: RouterNumerics, scores: Interval | None = None
) -> Interval:
    """What experts may be ranked by, ``[M, E]``; a NaN logit ranks last. ``scores``: the accepted ones, if known."""
    if numerics.ranking is Ranking.LOGIT:
        choice = Interval.exact(logits.masked_fill(logits.isnan(), -torch.inf)).flushed()
    else:
        choice = accepted_scores(logits, numerics) if scores is None else scores
    if bias is not None:
        choice = (choice + Interval.exact(bias)).round_float32()
        choice = choice if numerics.score_store is None else choice.store(numerics.score_store)
    last = logits.isnan()
    return choice.apply(lambda end: end.masked_fill(last, -torch.inf)) if bool(last.any()) else choice


# ------------------------------------------------------------------------------------------------------------- ids
def valid_ids(ids: torch.Tensor, experts: int) -> torch.Tensor:
    """Rows ``[M]`` of which the ids are distinct and lie in ``[0, E)``."""
    ordered = ids.sort(dim=1).values
    return ((ids >= 0) & (ids < experts)).all(1) & (ordered[:, 1:] != ordered[:, :-1]).all(1)


def promised_ids(logits: torch.Tensor, ids: torch.Tensor, numerics: RouterNumerics) -> torch.Tensor:
    """Rows ``[M]`` of which the ids are what is promised of them whatever ranks them: in range, distinct, no NaN's.

    Rows without NaN or +inf and with k finite logits have valid ids from every router; of the others
    :class:`Special` says what they have.
    """
    experts, special = logits.shape[1], numerics.special
    in_range, valid = ((ids >= 0) & (ids < experts)).all(1), valid_ids(ids, experts)
    plain = plain_rows(logits, numerics)
    if special in (Special.UNIQUE, Special.NAN_LAST):
        return valid
    if special is Special.ENOUGH:
        nan = logits.isnan()
        left = numerics.groups_kept * (experts // numerics.groups) - nan.sum(1)
        chosen = nan.gather(1, ids.long().clamp(0, experts - 1)).any(1)
        return torch.where(left >= numerics.top_k, valid & ~chosen, in_range)
    return torch.where(plain, valid, in_range if special is Special.IN_RANGE else ~plain)


@dataclass
class Verdicts:
    """Which rows have a legal set of ids.

    Attributes:
        legal: ``[M]``; also true where nothing is promised.
        judged: ``[M]``, where something is.
        scores: ``[M, E]``, or None where experts have none before the choice.
        choices: what experts may be ranked by, ``[M, E]``.
        least: ``[M]`` the most that the least chosen expert may have; an expert that was not chosen, of a group that
            must be kept, and that surely has more, is missing.
    """

    legal: torch.Tensor
    judged: torch.Tensor
    scores: Interval | None
    choices: Interval
    least: torch.Tensor


def accepted_ids(
    logits: torch.Tensor, bias: torch.Tensor | None, ids: torch.Tensor, numerics: RouterNumerics
) -> Verdicts:
    """Whether each row's set of ids is legal; ids are taken to be valid (:func:`valid_ids`).

    A set S of k experts is legal if there are choices within their intervals, and ``groups_kept`` groups T, so that T
    are the highest-ranked groups and S the highest-ranked experts of T. Group scores are intervals by themselves: that
    the same choices would have to give both is not used, which accepts more, never less.

    Raises:
        ProblemError: the router has no answer for E experts.
    """
    _check(logits, bias, numerics)
    scores = None if numerics.score is Score.CHOSEN_SOFTMAX else accepted_scores(logits, numerics)
    choices = accepted_choices(logits, bias, numerics, scores)
    judged = plain_rows(logits, numerics)
    if numerics.special is Special.NAN_LAST:
        judged = judged | (logits.isnan().any(1) & ~(logits == torch.inf).any(1))
    chosen = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device).scatter_(1, ids.long(), True)
    least = choices.upper.masked_fill(~chosen, torch.inf).amin(1)
    # A group with an expert that should have been chosen before the least chosen one cannot have been kept.
    surely = choices.lower.masked_fill(chosen, -torch.inf)
    better = (surely > least.unsqueeze(1)).view(len(ids), numerics.groups, -1).any(2)
    used = chosen.view(len(ids), numerics.groups, -1).any(2)
    return Verdicts(_groups_exist(choices, used, ~better, numerics) | ~judged, judged, scores, choices, least)


def _groups_exist(
    choices: Interval, used: torch.Tensor, possible: torch.Tensor, numerics: RouterNumerics
) -> torch.Tensor:
    """Rows ``[M]`` with a legal choice of groups that holds the ``used`` ones and only ``possible`` ones, ``[M, G]``.

    Kept groups T are legal if some threshold t lies at or above the least score of every group outside T, and at or
    below the most of every group in T. The most of a group of T will do for t, so that G thresholds are enough.
    """
    by_group = choices.apply(lambda end: end.view(len(used), numerics.groups, -1))
    scores = by_group.apply(lambda end: _group_score(end, numerics))
    if numerics.groups > 1 and numerics.group_score is GroupScore.TOP2:
        scores = scores.round_float32()
        scores = scores if numerics.score_store is None else scores.store(numerics.score_store)
    threshold = scores.upper.unsqueeze(2)  # [M, threshold, group]
    needed = (scores.lower.unsqueeze(1) > threshold) | used.unsqueeze(1)
    allowed = (scores.upper.unsqueeze(1) >= threshold) & possible.unsqueeze(1)
    enough = (needed.sum(2) <= numerics.groups_kept) & (allowed.sum(2) >= numerics.groups_kept)
    return (enough & ~(needed & ~allowed).any(2)).any(1)


def in_order(choices: Interval, ids: torch.Tensor) -> torch.Tensor:
    """Rows ``[M]`` of which the ids may be in order of descending choice."""
    high = choices.upper.gather(1, ids.long()).cummin(1).values
    return (high >= choices.lower.gather(1, ids.long())).all(1)


# --------------------------------------------------------------------------------------------------------- weights
def accepted_weights(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    ids: torch.Tensor,
    numerics: RouterNumerics,
    scores: Interval | None = None,
) -> tuple[Interval, torch.Tensor]:
    """Weights ``[M, k]`` of the ids that came back (valid ones), and the rows ``[M]`` of which something is promised.

    Nothing is where a logit is special, and where the sum that a renormalisation divides by may be zero, or so small
    that its reciprocal overflows. ``scores``: the accepted ones of all experts, if known.
    """
    chosen = _chosen(logits, bias, ids.long(), numerics, scores)
    judged = plain_rows(logits, numerics)
    factor, ulps = numerics.factor, numerics.scale_ulps
    if numerics.renormalise:
        total = add_up(chosen, dim=1)
        if numerics.sum_added:
            total = (total + Interval.exact(total.value.new_tensor(numerics.sum_added).float())).round_float32()
        total = total.apply(lambda end: end.clamp(min=numerics.sum_floor).unsqueeze(1))
        known = (total.lower >= _SUMS[0]) & (total.upper <= _SUMS[1])
        judged = judged & known.squeeze(1)
        chosen = chosen / total.apply(lambda end: torch.where(known, end, 1.0))
    if factor != 1.0 or numerics.renormalise:
        chosen = (chosen * Interval.exact(chosen.value.new_tensor(factor).float())).within_ulps(ulps).flushed()
    return (chosen if numerics.weight_store is None else chosen.store(numerics.weight_store)), judged


def _chosen(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    ids: torch.Tensor,
    numerics: RouterNumerics,
    scores: Interval | None,
) -> Interval:
    """Scores of the chosen experts, before renormalisation and scale."""
    if numerics.score is Score.CHOSEN_SOFTMAX:
        return _exponentials(_ordinary(logits).gather(1, ids), numerics)
    if numerics.recovery is Recovery.SUBTRACTED and bias is not None:
        choices = accepted_choices(logits.masked_fill(logits.isnan(), 0.0), bias, numerics, scores)
        return (choices.apply(lambda end: end.gather(1, ids)) - Interval.exact(bias[ids])).round_float32()
    if numerics.score is Score.SOFTMAX and numerics.renormalise and numerics.score_store is None:
        # The sum over all experts is one number for the whole row: it drops out, but for the rounding of each quotient.
        terms = _exponentials(_ordinary(logits), numerics).apply(lambda end: end.gather(1, ids))
        lost = FLOAT32_NORMAL * 2.0 * logits.shape[1]
        near = terms.widened(2.0 * numerics.score_ulps * _UNIT, absolute=lost)
        return near.apply(lambda end: end.clamp(min=0))
    scores = accepted_scores(logits, numerics) if scores is None else scores
    return scores.apply(lambda end: end.gather(1, ids))


def _check(logits: torch.Tensor, bias: torch.Tensor | None, numerics: RouterNumerics) -> None:
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ProblemError(f"logits are {list(logits.shape)} {logits.dtype}; give floating [M, E]")
    if refusal := numerics.refusal(logits.shape[1]):
        raise ProblemError(refusal)
    if bias is not None and (bias.shape != logits.shape[1:] or numerics.ranking is Ranking.LOGIT):
        raise ProblemError(
            f"bias is {list(bias.shape)} with {numerics.ranking.name}; give [E] to a router that ranks by CHOICE"
        )
