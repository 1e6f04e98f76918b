"""What routers promise of rows with NaN, +inf or too few finite logits, and of subnormal logits.

Scope: ``promised_ids`` and the ranking by logit in reference/routers.py. A pass does not prove that a library keeps it.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from reference.router_numerics import GroupScore, Ranking, RouterNumerics, Score, Special
from reference.routers import accepted_ids, promised_ids

NAN, INF = float("nan"), float("inf")
SIGMOID = RouterNumerics(Score.SIGMOID, 2)
#: Logits of four experts, two ids, and the promises that they keep.
CASES = {
    "plain": ([1, 2, 3, 4], [3, 2], {*Special}),
    "plain, twice": ([1, 2, 3, 4], [3, 3], set()),
    "plain, out of range": ([1, 2, 3, 4], [3, 4], set()),
    "two numbers": ([NAN, 2, 3, NAN], [1, 2], {*Special}),
    "two numbers, a NaN": ([NAN, 2, 3, NAN], [0, 2], {*Special} - {Special.ENOUGH}),
    "two numbers, twice": ([NAN, 2, 3, NAN], [1, 1], {Special.IN_RANGE, Special.ANYTHING}),
    "one number, twice": ([NAN, NAN, 3, NAN], [2, 2], {Special.ENOUGH, Special.IN_RANGE, Special.ANYTHING}),
    "one number, out of range": ([NAN, NAN, 3, NAN], [2, -1], {Special.ANYTHING}),
    "two masked ones, twice": ([-INF, -INF, 3, -INF], [2, 2], {Special.IN_RANGE, Special.ANYTHING}),
    "infinite, twice": ([INF, 2, 3, 4], [0, 0], {Special.IN_RANGE, Special.ANYTHING}),
}


@pytest.mark.parametrize("special", Special)
@pytest.mark.parametrize("name", CASES)
def test_what_is_promised(name: str, special: Special) -> None:
    logits, ids, kept = CASES[name]
    numerics = replace(SIGMOID, special=special)
    found = promised_ids(torch.tensor([logits], dtype=torch.float32), torch.tensor([ids]), numerics)
    assert bool(found) is (special in kept)


def test_groups_that_are_not_kept_hold_nothing() -> None:
    numerics = RouterNumerics(
        Score.SIGMOID, 2, groups=2, groups_kept=1, group_score=GroupScore.TOP2, special=Special.ENOUGH
    )
    logits, ids = torch.tensor([[NAN, 1.0, 2, 3, 4, 5]]), torch.tensor([[1, 1]])
    assert not promised_ids(logits, ids, numerics), "either group has two numbers"
    logits[0, 3] = NAN
    assert promised_ids(logits, ids, numerics), "one of three may be left"


def test_subnormal_logits_may_rank_as_zero() -> None:
    numerics = RouterNumerics(Score.CHOSEN_SOFTMAX, 1, ranking=Ranking.LOGIT)
    logits = torch.tensor([[1e-39, 2e-39, -1e-39, 0.0], [1e-38, 2e-38, -1e-38, 0.0]])
    for expert, legal in ((0, [True, False]), (1, [True, True]), (2, [True, False]), (3, [True, False])):
        ids = torch.tensor([[expert], [expert]])
        found = accepted_ids(logits, None, ids, numerics).legal
        assert found.tolist() == legal
