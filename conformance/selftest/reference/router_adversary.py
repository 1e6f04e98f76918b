"""Routers as devices compute them, with every legal choice taken at random, and routers with one defect each.

Scope: numpy's float32 throughout: hardware exponentials, approximate reciprocals, sums in any order, flushed
subnormals, ties broken at random. It shares no code with reference/routers.py and reference/router_oracle.py. It proves
nothing by itself; test_routers.py and test_router_oracle.py use it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from reference.router_numerics import GroupScore, Ranking, Recovery, RouterNumerics, Score

Array = npt.NDArray[Any]
_LOG2E = np.float32(1.4426950408889634)
_NORMAL = np.float32(2.0**-126)


def single(value: Any) -> Array:
    """Float32."""
    made: Array = np.asarray(value, dtype=np.float32)
    return made


@dataclass
class Device:
    """One way of rounding; ``draw`` decides what is open.

    Attributes:
        draw: for ties, neighbours and orders.
        scaled: exponentials are powers of two of a rounded product.
        flushes: subnormals become zero.
    """

    draw: np.random.Generator
    scaled: bool = False
    flushes: bool = False

    def near(self, value: Array) -> Array:
        """The float32 of a result, or one of its neighbours."""
        rounded = single(value)
        towards = np.float32(np.inf) * single(self.draw.choice([-1, 1], rounded.shape))
        moved = np.where(self.draw.random(rounded.shape) < 0.5, np.nextafter(rounded, towards), rounded)
        kept = np.where(np.isfinite(moved), moved, rounded)
        return np.where(np.abs(kept) < _NORMAL, 0, kept).astype(np.float32) if self.flushes else kept

    def exp(self, x: Array) -> Array:
        with np.errstate(over="ignore", under="ignore"):
            exact = np.exp2(single(x * _LOG2E).astype(np.float64)) if self.scaled else np.exp(x.astype(np.float64))
            return np.asarray(np.maximum(self.near(exact), 0))

    def total(self, values: Array) -> Array:
        """Sum over the last axis in some order."""
        found = np.zeros(values.shape[:-1], dtype=np.float32)
        for index in self.draw.permutation(values.shape[-1]):
            found = single(found + values[..., index])
        return found

    def reciprocal(self, value: Array) -> Array:
        with np.errstate(divide="ignore"):
            return self.near(1 / value.astype(np.float64))


@dataclass
class Steps:
    """The stages of a router, each of which a defect may replace."""

    group_score: Callable[[Array, RouterNumerics], Array]
    excluded: float = -np.inf
    weight: Callable[[Array, Array], Array] = lambda score, bias: score
    seen: Callable[[Array], Array] = lambda score: score
    finish: Callable[[RouterNumerics], RouterNumerics] = lambda numerics: numerics


def by_declared_score(choice: Array, numerics: RouterNumerics) -> Array:
    """``[M, G]`` from ``[M, G, E / G]``."""
    if numerics.group_score is GroupScore.MAX:
        return np.asarray(choice.max(2))
    ordered = np.sort(choice, 2)
    return single(ordered[:, :, -1] + ordered[:, :, -2])


RIGHT = Steps(by_declared_score)


def route(
    logits: Array, bias: Array | None, numerics: RouterNumerics, device: Device, steps: Steps = RIGHT
) -> tuple[Array, Array]:
    """Weights and ids of finite logits."""
    x, rows = single(logits), np.arange(len(logits))[:, None]
    score = scores(x, numerics, device)
    choice = x if numerics.ranking is Ranking.LOGIT else steps.seen(score)
    if bias is not None:
        choice = single(choice + bias)
    candidates = choice
    if numerics.groups > 1:
        by_group = choice.reshape(len(x), numerics.groups, -1)
        kept = highest(steps.group_score(by_group, numerics), numerics.groups_kept, device)
        held = np.zeros((len(x), numerics.groups), dtype=bool)
        held[rows, kept] = True
        candidates = np.where(held[:, :, None], by_group, single(steps.excluded)).reshape(choice.shape)
    ids = highest(candidates, numerics.top_k, device)
    done = steps.finish(numerics)
    if numerics.score is Score.CHOSEN_SOFTMAX:
        chosen = np.take_along_axis(x, ids, 1)
        weights = device.exp(single(chosen - chosen.max(1, keepdims=True)))
    elif numerics.recovery is Recovery.SUBTRACTED and bias is not None:
        weights = single(np.take_along_axis(choice, ids, 1) - bias[ids])
    else:
        given = np.zeros(x.shape[1], dtype=np.float32) if bias is None else bias
        weights = np.take_along_axis(steps.weight(score, given), ids, 1)
    if done.renormalise:
        sums = np.maximum(device.total(weights), single(done.sum_floor))
        with np.errstate(over="ignore", invalid="ignore"):
            weights = single(single(weights * device.reciprocal(sums)[:, None]) * single(done.factor))
    else:
        weights = single(weights * single(done.factor))
    return weights, ids


def scores(x: Array, numerics: RouterNumerics, device: Device) -> Array:
    """``[M, E]``."""
    if numerics.score is Score.SOFTMAX:
        terms = device.exp(single(x - x.max(1, keepdims=True)))
        return single(terms * device.reciprocal(device.total(terms))[:, None])
    if numerics.score is Score.SIGMOID:
        return device.reciprocal(single(1 + device.exp(-x)))
    if numerics.score is Score.SQRT_SOFTPLUS:
        power = device.exp(np.minimum(x, single(80)))
        inner = single(1 + power).astype(np.float64) - 1 if numerics.softplus_error else power.astype(np.float64)
        inner = np.where(x > 20, x, np.maximum(device.near(np.log1p(inner)), 0))
        return device.near(np.sqrt(inner.astype(np.float64)))
    return x


def highest(values: Array, count: int, device: Device) -> Array:
    """Places of the largest, ties broken at random and in random order."""
    order = np.lexsort((device.draw.random(values.shape), -values), axis=1)[:, :count]
    return np.asarray(device.draw.permuted(order, axis=1))


#: Routers with one defect each.
DEFECTS: dict[str, Steps] = {
    "bias in the weight": replace(RIGHT, weight=lambda score, bias: single(score + bias)),
    "largest instead of the two largest": replace(RIGHT, group_score=lambda c, n: c.max(2)),
    "excluded groups at 0": replace(RIGHT, excluded=0.0),
    "no scale": replace(RIGHT, finish=lambda n: replace(n, scale=1.0)),
    "no renormalisation": replace(RIGHT, finish=lambda n: replace(n, renormalise=False)),
    "choice of bfloat16 scores": replace(
        RIGHT, seen=lambda s: single((s.view(np.uint32) & 0xFFFF0000).view(np.float32))
    ),
    "one group too many": replace(RIGHT, group_score=lambda c, n: -by_declared_score(c, n)),
}


def legal_sets(choice: Array, numerics: RouterNumerics) -> set[tuple[int, ...]]:
    """Every set that some way of breaking ties gives, of one row of choices."""
    size = len(choice) // numerics.groups
    groups = choice.reshape(1, numerics.groups, size).astype(np.float64)
    of_group = np.sort(groups, 2)[0]
    score = of_group[:, -1] if numerics.group_score is GroupScore.MAX else of_group[:, -1] + of_group[:, -2]
    found = set()
    for kept in highest_sets(score, numerics.groups_kept):
        members = [g * size + i for g in kept for i in range(size)]
        for chosen in highest_sets(choice[members], numerics.top_k):
            found.add(tuple(sorted(members[i] for i in chosen)))
    return found


def highest_sets(values: Array, count: int) -> list[tuple[int, ...]]:
    """Sets of so many places of which none is below one outside."""
    places = range(len(values))
    return [
        s
        for s in combinations(places, count)
        if min(values[list(s)]) >= max((values[p] for p in places if p not in s), default=-np.inf)
    ]
