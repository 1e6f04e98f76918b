"""Routers a second time: one row in plain Python floats, as an objection to what came back.

Scope: it judges the specification and shares no code with :mod:`reference.routers`. Scores are exact but for float64;
each gets a closed-form error of the float32 computation that the numerics declare, and legal choices are found by
trying every choice of groups. What it does not decide: rows that nothing is promised of, beyond that NaN is chosen last
where that is declared. Ids are taken to be distinct and in range.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from reference.router_numerics import GroupScore, Ranking, Recovery, RouterNumerics, Score, Special

Range = tuple[float, float]
#: Half a unit in the last place of float32, relative.
_U = 2.0**-24
#: Least normal float32, below which a device may flush and exponentials overflow on the way.
_TINY = 2.0**-126
_DEEP = -200.0


@dataclass(frozen=True)
class Objection:
    """What is wrong with a row: about ``choice`` or ``weights``, and why."""

    about: str
    reason: str


def objection(
    logits: Sequence[float],
    bias: Sequence[float] | None,
    ids: Sequence[int],
    weights: Sequence[float],
    numerics: RouterNumerics,
) -> Objection | None:
    """Why a row's ids and weights cannot be the router's, or None.

    Args:
        logits: E of them.
        bias: E, or None.
        ids: k distinct experts.
        weights: k.
        numerics: the router.
    """
    finite = sum(math.isfinite(x) for x in logits)
    if finite < numerics.top_k or any(math.isnan(x) or x == math.inf for x in logits):
        return _special(logits, ids, numerics)
    scores = _scores(logits, numerics)
    ranks = _ranks(logits, scores, bias, numerics)
    reason = _illegal(ranks, set(ids), numerics)
    if reason:
        return Objection("choice", reason)
    for expert, got, (low, high) in zip(ids, weights, _weights(logits, scores, bias, ids, numerics), strict=True):
        if not low <= got <= high and not (math.isinf(low) and math.isinf(high)):
            return Objection("weights", f"expert {expert} has weight {got}; the oracle has [{low}, {high}]")
    return None


def _special(logits: Sequence[float], ids: Sequence[int], numerics: RouterNumerics) -> Objection | None:
    if numerics.special is not Special.NAN_LAST or numerics.groups > 1 or math.inf in logits:
        return None
    numbers = sum(not math.isnan(x) for x in logits)
    chosen = sum(math.isnan(logits[e]) for e in ids)
    if chosen > max(numerics.top_k - numbers, 0):
        return Objection("choice", f"{chosen} NaN logits were chosen, and {numbers} others could have been")
    return None


# ---------------------------------------------------------------------------------------------------------- scores
def _spread(value: float, relative: float, absolute: float = 0.0) -> Range:
    """A non-negative float32 and what it may be; a subnormal may be zero."""
    off = value * relative + absolute + 2.0**-149
    low = max(value - off, 0.0)
    return (0.0 if low < _TINY else low), value + off


def _units(numerics: RouterNumerics) -> float:
    """Roundings of an exponential's argument that grow with it."""
    return 2.0 if numerics.scaled_exponent else 0.0


def _exponential_error(argument: float, units: float, numerics: RouterNumerics) -> float:
    return math.expm1(1.01 * min(abs(argument), -_DEEP) * units * _U) + 2 * numerics.score_ulps * _U


def _scores(logits: Sequence[float], numerics: RouterNumerics) -> list[Range]:
    ulps = 2 * numerics.score_ulps * _U
    found: list[Range] = []
    if numerics.score in (Score.SOFTMAX, Score.CHOSEN_SOFTMAX):
        top, units = max(logits), _units(numerics) + 1
        terms = [math.exp(x - top) for x in logits]
        errors = [_exponential_error(x - top, units, numerics) for x in logits]
        total = math.fsum(terms)
        # What the sum is off by: its terms, each of them, and as many roundings as there are additions.
        of_sum = math.fsum(t * e for t, e in zip(terms, errors, strict=True)) / total + 1.01 * len(terms) * _U
        for term, error in zip(terms, errors, strict=True):
            found.append(_spread(term / total, 1.01 * (error + of_sum + ulps + _U)))
    else:
        for x in logits:
            if numerics.score is Score.SIGMOID:
                small = math.exp(-abs(max(x, _DEEP)))
                value = small / (1 + small) if x < 0 else 1 / (1 + small)
                error = _exponential_error(x, _units(numerics), numerics) * (1 - value if x > 0 else 1.0)
                found.append(_spread(value, 1.01 * (error + ulps + _U)))
            else:
                found.append(_root(x, ulps, numerics))
    step = 0.0 if numerics.score_store is None else 2.0 ** -(numerics.score_store.mantissa_bits + 1)
    return [(low * (1 - step), high * (1 + step)) for low, high in found]


def _root(x: float, ulps: float, numerics: RouterNumerics) -> Range:
    """sqrt(softplus(x)): the logarithm's errors are halved by the root, absolute ones are not."""
    inner = max(x, 0.0) + math.log1p(math.exp(-abs(max(x, _DEEP) if x < 0 else min(x, -_DEEP))))
    relative = 2 * ulps + _units(numerics) * _U * (min(max(-x, 1.0), -_DEEP) + 1) * 1.01
    off = inner * relative + numerics.softplus_error + 2 * numerics.score_ulps * 2.0**-149
    low = inner - off
    root = math.sqrt(inner + off)
    return (math.sqrt(low) * (1 - ulps) if low >= _TINY else 0.0), root * (1 + ulps)


def _ranks(
    logits: Sequence[float], scores: Sequence[Range], bias: Sequence[float] | None, numerics: RouterNumerics
) -> list[Range]:
    """What each expert is ranked by."""
    if numerics.ranking is Ranking.LOGIT:
        return [(x, x) for x in logits]
    if bias is None:
        return list(scores)
    step = _U + (0.0 if numerics.score_store is None else 2.0 ** -(numerics.score_store.mantissa_bits + 1))
    ends = ((low + b, high + b) for (low, high), b in zip(scores, bias, strict=True))
    return [(low - abs(low) * step, high + abs(high) * step) for low, high in ends]


# ---------------------------------------------------------------------------------------------------------- choice
def _illegal(ranks: Sequence[Range], chosen: set[int], numerics: RouterNumerics) -> str:
    """Why the chosen experts cannot be the highest-ranked of the highest-ranked groups; empty if they can."""
    size = len(ranks) // numerics.groups
    members = [range(g * size, (g + 1) * size) for g in range(numerics.groups)]
    least = min(ranks[e][1] for e in chosen)
    beaten = [max((ranks[e][0] for e in m if e not in chosen), default=-math.inf) for m in members]
    scores = [_group_range([ranks[e] for e in m], numerics) for m in members]
    for kept in combinations(range(numerics.groups), numerics.groups_kept):
        others = set(range(numerics.groups)) - set(kept)
        if any(e // size in others for e in chosen) or any(beaten[g] > least for g in kept):
            continue
        if min(scores[g][1] for g in kept) >= max((scores[g][0] for g in others), default=-math.inf):
            return ""
    return f"no choice of {numerics.groups_kept} of {numerics.groups} groups makes {sorted(chosen)} the highest-ranked"


def _group_range(ranks: Sequence[Range], numerics: RouterNumerics) -> Range:
    if numerics.groups == 1:
        return 0.0, 0.0
    lows, highs = (sorted(ends, reverse=True) for ends in zip(*ranks, strict=True))
    if numerics.group_score is GroupScore.MAX:
        return lows[0], highs[0]
    low, high = lows[0] + lows[1], highs[0] + highs[1]
    return low - abs(low) * _U, high + abs(high) * _U


# --------------------------------------------------------------------------------------------------------- weights
def _weights(
    logits: Sequence[float],
    scores: Sequence[Range],
    bias: Sequence[float] | None,
    ids: Sequence[int],
    numerics: RouterNumerics,
) -> list[Range]:
    """What the weights of the chosen experts may be; everything where a renormalisation divides by what may be zero."""
    if numerics.score is Score.CHOSEN_SOFTMAX:
        parts = _scores([logits[e] for e in ids], numerics)
    else:
        parts = [scores[e] for e in ids]
        if numerics.recovery is Recovery.SUBTRACTED and bias is not None:
            parts = [_subtracted(part, bias[e]) for part, e in zip(parts, ids, strict=True)]
    if numerics.renormalise:
        totals = tuple(math.fsum(end) for end in zip(*parts, strict=True))
        low, high = (max(total + numerics.sum_added, numerics.sum_floor) for total in totals)
        if low < 2.0**-99 or high > 2.0**99:
            return [(-math.inf, math.inf)] * len(ids)
        roundings = 1.01 * (len(ids) + (numerics.sum_added != 0)) * _U
        parts = [(a / high * (1 - roundings), b / low * (1 + roundings)) for a, b in parts]
    step = 2 * numerics.scale_ulps * _U if numerics.renormalise or numerics.factor != 1.0 else 0.0
    step += 0.0 if numerics.weight_store is None else 2.0 ** -(numerics.weight_store.mantissa_bits + 1)
    return [_scaled(part, numerics.factor, 1.01 * step) for part in parts]


def _subtracted(part: Range, bias: float) -> Range:
    """(score + bias) - bias with a rounding after each."""
    low, high = part
    off = _U * max(abs(low + bias), abs(high + bias)) * 1.01
    return low - off - _U * abs(low - off), high + off + _U * abs(high + off)


def _scaled(part: Range, factor: float, step: float) -> Range:
    low, high = part[0] * factor, part[1] * factor
    slack = step * max(abs(low), abs(high)) + (2.0**-149 if step else 0.0)
    low = low - slack
    return (min(low, 0.0) if abs(low) < _TINY else low), high + slack
