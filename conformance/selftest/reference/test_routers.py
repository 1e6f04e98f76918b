"""Routers: legal sets are those that some way of breaking ties gives, no legal device is refused, every defect is.

Scope: reference/routers.py and reference/router_numerics.py against enumeration and numpy devices with a random legal
choice everywhere (router_adversary.py). A pass does not prove that a library's declared numerics are its own.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch

from accelerated.routers import FORMS
from conformance.selftest.reference import router_adversary as adversary
from conformance.selftest.reference.router_adversary import DEFECTS, Device, legal_sets
from reference import routers
from reference.formats import BFLOAT16
from reference.problem import ProblemError
from reference.router_numerics import GroupScore, Ranking, Recovery, RouterNumerics, Score, Special

SMALL = RouterNumerics(Score.SIGMOID, 3, renormalise=False, groups=4, groups_kept=2)
TOP2 = replace(SMALL, group_score=GroupScore.TOP2)
V3 = FORMS["grouped_g8t4k8"].numerics


def logits_of(kind: str, rows: int = 40, experts: int = 64, seed: int = 0) -> torch.Tensor:
    drawn = torch.randn(rows, experts, generator=torch.Generator().manual_seed(seed))
    made = {"normal": drawn, "large": drawn * 20, "tied": drawn.round(), "tiny": drawn * 1e-38, "huge": drawn * 2e37}
    return made[kind]


def bias_of(kind: str, experts: int = 64) -> torch.Tensor | None:
    drawn = torch.randn(experts, generator=torch.Generator().manual_seed(9))
    return {"none": None, "small": drawn / 16, "large": drawn * 64, "negative": -1 - drawn.abs()}[kind]


def accepts(logits: torch.Tensor, bias: torch.Tensor | None, weights: Any, ids: Any, numerics: RouterNumerics) -> str:
    """What is objected to: "ids", "choice", "weights" or nothing."""
    ids, weights = torch.as_tensor(ids).int(), torch.as_tensor(weights)
    if not bool(routers.valid_ids(ids, logits.shape[1]).all()):
        return "ids"
    if not bool(routers.accepted_ids(logits, bias, ids, numerics).legal.all()):
        return "choice"
    accepted, judged = routers.accepted_weights(logits, bias, ids, numerics)
    return "weights" if bool((accepted.error_over_bound(weights)[judged] > 1).any()) else ""


# ---------------------------------------------------------------------------------------------------------- choice
@pytest.mark.parametrize("numerics", [SMALL, TOP2, replace(SMALL, groups=1, groups_kept=1)], ids=["max", "top2", "one"])
def test_legal_sets_are_those_of_some_way_to_break_ties(numerics: RouterNumerics) -> None:
    levels = torch.tensor([-1.0, 0.0, 0.5, 2.0])
    drawn = torch.randint(0, 4, (25, 8), generator=torch.Generator().manual_seed(3))
    sets = torch.tensor(list(combinations(range(8), 3)))
    refused = 0
    for row in levels[drawn]:
        legal = routers.accepted_ids(row.expand(len(sets), -1), None, sets, numerics).legal
        wanted = legal_sets(torch.sigmoid(row.double()).numpy(), numerics)
        assert {tuple(s.tolist()) for s in sets[legal]} == wanted
        refused += len(sets) - len(wanted)
    assert refused > 500, "most sets are illegal"


def test_a_difference_below_the_error_is_open_and_one_above_is_not() -> None:
    numerics = RouterNumerics(Score.SIGMOID, 1)
    for above, legal in ((2.0**-25, True), (2.0**-12, False)):
        row = torch.tensor([[0.0, above, -3.0]])
        got = routers.accepted_ids(row.expand(3, -1), None, torch.tensor([[0], [1], [2]]), numerics).legal
        assert got.tolist() == [legal, True, False]
    exact = replace(numerics, ranking=Ranking.LOGIT)
    close = torch.tensor([[0.0, 2.0**-25]])
    assert not bool(routers.accepted_ids(close, None, torch.tensor([[0]]), exact).legal), "the order of logits is exact"


def test_a_group_that_is_surely_kept_cannot_be_left_out() -> None:
    """Three groups, two kept: the first is surely among them, so that the third cannot stand beside the second."""
    row = torch.tensor([[9.0, 1.0, 2.0, 1.9, 2.0, 1.8]]).expand(3, -1)
    numerics = RouterNumerics(Score.SIGMOID, 2, groups=3, groups_kept=2)
    got = routers.accepted_ids(row, None, torch.tensor([[0, 2], [0, 4], [2, 4]]), numerics).legal
    assert got.tolist() == [True, True, False]


# --------------------------------------------------------------------------------------------------------- devices
@pytest.mark.parametrize("name", FORMS)
def test_no_legal_device_is_refused(name: str) -> None:
    form = FORMS[name]
    experts = form.experts[0] if form.experts else 64
    for kind in ("normal", "large", "tied", "tiny"):
        for biased in ("small", "large", "negative") if form.biased else ("none",):
            for number, (scaled, flushes) in enumerate(((False, False), (True, True))):
                numerics = replace(form.numerics, scaled_exponent=scaled, softplus_error=2.0**-24 if scaled else 0.0)
                logits, bias = logits_of(kind, experts=experts), bias_of(biased, experts)
                device = Device(np.random.default_rng(number), scaled, flushes)
                given = None if bias is None else bias.numpy()
                weights, ids = adversary.route(logits.numpy(), given, numerics, device)
                assert accepts(logits, bias, weights, ids, numerics) == "", (kind, biased, scaled)
                assert accepts(logits, bias, *routers.route(logits, bias, numerics), numerics) == ""


def test_a_device_is_refused_where_less_is_declared() -> None:
    """What a rounded argument of the exponential, or a lost logarithm, is allowed is not allowed without it."""
    logits = logits_of("normal") - 60
    scaled = RouterNumerics(Score.SIGMOID, 4, renormalise=False, scaled_exponent=True)
    weights, ids = adversary.route(logits.numpy(), None, scaled, Device(np.random.default_rng(1), scaled=True))
    assert accepts(logits, None, weights, ids, scaled) == ""
    assert accepts(logits, None, weights, ids, replace(scaled, scaled_exponent=False)) == "weights"
    lost = RouterNumerics(Score.SQRT_SOFTPLUS, 2, renormalise=False, softplus_error=2.0**-24)
    low = torch.full((3, 64), -18.0)
    weights, ids = adversary.route(low.numpy(), None, lost, Device(np.random.default_rng(1)))
    assert accepts(low, None, weights, ids, lost) == ""
    assert accepts(low, None, weights, ids, replace(lost, softplus_error=0.0)) == "weights"


@pytest.mark.parametrize("defect", DEFECTS)
def test_every_defect_is_refused(defect: str) -> None:
    caught = "weights" if defect in ("bias in the weight", "no scale", "no renormalisation") else "choice"
    found = {
        accepts(logits_of("normal"), bias_of(biased), *_with(defect, "normal", biased), V3)
        for biased in ("small", "negative")
    }
    assert found - {""} == {caught}


def _with(defect: str, kind: str, biased: str) -> tuple[Any, Any]:
    given = bias_of(biased)
    assert given is not None
    return adversary.route(
        logits_of(kind).numpy(), given.numpy(), V3, Device(np.random.default_rng(2)), DEFECTS[defect]
    )


def test_a_neighbouring_weight_and_a_far_one() -> None:
    logits = logits_of("normal")
    weights, ids = routers.route(logits, None, FORMS["softmax_k8"].numerics)
    for factor, objection in ((1 + 2.0**-22, ""), (1 + 2.0**-17, "weights")):
        assert accepts(logits, None, weights * factor, ids, FORMS["softmax_k8"].numerics) == objection


# --------------------------------------------------------------------------------------------------------- weights
def test_cancellation_is_accepted_where_it_is_declared() -> None:
    logits, bias = logits_of("normal"), torch.full((64,), 2.0**12)
    subtracted = RouterNumerics(Score.SIGMOID, 4, renormalise=False, recovery=Recovery.SUBTRACTED)
    weights, ids = routers.route(logits, bias, subtracted)
    assert bool((weights * 2.0**11 == (weights * 2.0**11).round()).all()), "multiples of the bias' last place"
    assert accepts(logits, bias, weights, ids, subtracted) == ""
    assert accepts(logits, bias, weights, ids, replace(subtracted, recovery=Recovery.KEPT)) == "weights"


def test_a_sum_that_may_be_zero_leaves_the_weights_open() -> None:
    numerics = RouterNumerics(Score.SIGMOID, 2)
    logits, ids = torch.full((2, 8), -200.0), torch.tensor([[0, 1], [2, 3]])
    assert not bool(routers.accepted_weights(logits, None, ids, numerics)[1].any())
    accepted, judged = routers.accepted_weights(logits, None, ids, replace(numerics, sum_floor=1e-20))
    assert bool(judged.all())
    # A sigmoid of less than the least normal number, which is 2**-126, may be rounded up to it, and two roundings.
    assert float(accepted.upper.max()) <= 2.0**-126 / 1e-20 * (1 + 3 * 2.0**-24), "a floor makes them zero"
    assert accepts(logits, None, torch.full((2, 2), 0.5), ids, replace(numerics, sum_floor=1e-20)) == "weights"


def test_scores_and_weights_may_be_stored_in_a_narrower_format() -> None:
    logits, plain = logits_of("normal"), RouterNumerics(Score.SQRT_SOFTPLUS, 4, renormalise=False)
    stored = replace(plain, score_store=BFLOAT16, weight_store=BFLOAT16)
    weights, ids = routers.route(logits, None, stored)
    assert torch.equal(weights, weights.bfloat16().float())
    assert accepts(logits, None, weights, ids, stored) == ""
    assert accepts(logits, None, weights, ids, plain) != ""


def test_the_scale_applies_as_declared() -> None:
    logits = logits_of("normal")
    plain = RouterNumerics(Score.SIGMOID, 4, renormalise=False, scale=2.5)
    weights, ids = routers.route(logits, None, plain)
    assert torch.equal(ids.long(), logits.topk(4).indices)
    assert torch.equal(weights, torch.sigmoid(logits).topk(4).values * 2.5)
    unscaled, _ = routers.route(logits, None, replace(plain, scale_without_renormalise=False))
    assert torch.equal(unscaled * 2.5, weights)
    assert accepts(logits, None, unscaled, ids, plain) == "weights"


# --------------------------------------------------------------------------------------------------- special rows
def test_special_rows_have_distinct_ids_and_leave_others_alone() -> None:
    for name, form in FORMS.items():
        experts = form.experts[0] if form.experts else 64
        logits, bias = logits_of("normal", experts=experts), bias_of("small", experts) if form.biased else None
        clean = routers.route(logits, bias, form.numerics)
        logits[0], logits[2], logits[4], logits[6, 5], logits[8, 3] = (
            -torch.inf,
            torch.nan,
            torch.inf,
            torch.nan,
            torch.inf,
        )
        logits[10, 1:] = -torch.inf
        weights, ids = routers.route(logits, bias, form.numerics)
        assert bool(routers.valid_ids(ids, experts).all()), name
        assert torch.equal(ids[1::2], clean[1][1::2])
        assert torch.equal(weights[1::2], clean[0][1::2])
        plain = routers.plain_rows(logits, form.numerics)
        few = [10] if form.numerics.top_k > 1 else []
        assert (~plain).nonzero().flatten().tolist() == [0, 2, 4, 6, 8, *few], name
        assert accepts(logits, bias, weights, ids, form.numerics) == ""


def test_masked_experts_are_never_chosen_while_others_can_be() -> None:
    logits = logits_of("normal")
    logits[:, ::2] = -torch.inf
    for name in ("softmax_k8", "sigmoid_k1", "after_k4"):
        numerics = FORMS[name].numerics
        weights, ids = routers.route(logits, None, numerics)
        assert bool((ids % 2 == 1).all())
        assert accepts(logits, None, weights, ids, numerics) == ""
        assert accepts(logits, None, weights, ids - 1, numerics) == "choice"


def test_nan_last() -> None:
    numerics = RouterNumerics(Score.SIGMOID, 2, special=Special.NAN_LAST)
    logits = torch.tensor([[torch.nan, -1.0, -3.0, -2.0]]).expand(2, -1)
    ids = torch.tensor([[1, 3], [0, 1]])
    assert routers.accepted_ids(logits, None, ids, numerics).legal.tolist() == [True, False]
    assert routers.accepted_ids(logits, None, ids, replace(numerics, special=Special.UNIQUE)).legal.all()
    most = torch.tensor([[torch.nan, 1.0, torch.nan, torch.nan]]).expand(2, -1)
    assert routers.accepted_ids(most, None, torch.tensor([[0, 1], [0, 2]]), numerics).legal.tolist() == [True, False]


def test_ids_and_their_order() -> None:
    ids = torch.tensor([[0, 1], [1, 1], [-1, 0], [4, 0]])
    assert routers.valid_ids(ids, 4).tolist() == [True, False, False, False]
    numerics = RouterNumerics(Score.SIGMOID, 3, ranking=Ranking.LOGIT)
    row = torch.tensor([[1.0, 3.0, 2.0, 2.0]]).expand(4, -1)
    orders = torch.tensor([[1, 2, 3], [1, 3, 2], [2, 1, 3], [1, 0, 2]])
    assert routers.in_order(routers.accepted_choices(row, None, numerics), orders).tolist() == [
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"top_k": 0}, "top_k is 0"),
        ({"groups_kept": 2}, "groups_kept is 2; there are 1 groups"),
        ({"scale": 0.0}, "scale is 0.0"),
        ({"score_ulps": 0.5}, "score_ulps is 0.5"),
        ({"score": Score.CHOSEN_SOFTMAX}, "ranks by logit"),
        ({"ranking": Ranking.LOGIT, "groups": 2}, "in groups, or with a bias"),
        ({"score": Score.SOFTMAX, "special": Special.NAN_LAST}, "every score of a softmax NaN"),
    ],
)
def test_numerics_that_contradict_each_other(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ProblemError, match=words):
        replace(RouterNumerics(Score.SIGMOID, 2), **change)


def test_numbers_of_experts_without_an_answer() -> None:
    assert V3.refusal(256) == ""
    assert "do not divide into 8 groups" in V3.refusal(100)
    assert "leave no two to add up" in V3.refusal(8)
    assert "2 groups of 2 experts do not hold the 6" in replace(SMALL, top_k=6).refusal(8)
    with pytest.raises(ProblemError, match="do not divide"):
        routers.route(torch.zeros(1, 100), None, V3)
    with pytest.raises(ProblemError, match="give \\[E\\] to a router"):
        routers.route(torch.zeros(1, 64), torch.zeros(63), V3)
    with pytest.raises(ProblemError, match="give floating"):
        routers.route(torch.zeros(1, 64, dtype=torch.int32), None, V3)
