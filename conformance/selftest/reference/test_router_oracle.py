"""The routers' oracle: it objects to what enumeration and devices say is wrong, to nothing else, and by itself.

Scope: reference/router_oracle.py against the adversary and against reference/routers.py, with which it shares no code.
A pass does not prove that both do not err in the same way where neither enumeration nor a device looks.
"""

from __future__ import annotations

import ast
import inspect
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch

from accelerated.routers import FORMS
from conformance.selftest.reference import router_adversary as adversary
from conformance.selftest.reference.router_adversary import DEFECTS, Device, legal_sets
from conformance.selftest.reference.test_routers import SMALL, TOP2, V3, bias_of, logits_of
from reference import router_oracle, routers
from reference.router_numerics import Recovery, RouterNumerics, Score, Special


def objections(logits: torch.Tensor, bias: Any, weights: Any, ids: Any, numerics: RouterNumerics) -> list[str]:
    """What the oracle says of each row: "choice", "weights" or nothing."""
    given = None if bias is None else bias.tolist()
    rows = zip(logits.tolist(), np.asarray(ids).tolist(), np.asarray(weights).tolist(), strict=True)
    found = (router_oracle.objection(row, given, i, w, numerics) for row, i, w in rows)
    return ["" if one is None else one.about for one in found]


@pytest.mark.parametrize("numerics", [SMALL, TOP2, replace(SMALL, groups=1, groups_kept=1)], ids=["max", "top2", "one"])
def test_legal_sets_are_those_of_some_way_to_break_ties(numerics: RouterNumerics) -> None:
    levels = [-1.0, 0.0, 0.5, 2.0]
    for drawn in np.random.default_rng(5).integers(0, 4, (10, 8)):
        row = [levels[i] for i in drawn]
        score = 1 / (1 + np.exp(-np.array(row)))
        sets = list(combinations(range(8), 3))
        held = [router_oracle.objection(row, None, s, [score[e] for e in s], numerics) is None for s in sets]
        assert {s for s, legal in zip(sets, held, strict=True) if legal} == legal_sets(score, numerics)


@pytest.mark.parametrize("name", FORMS)
def test_no_objection_to_the_reference_or_a_device(name: str) -> None:
    form = FORMS[name]
    experts = form.experts[0] if form.experts else 64
    for kind in ("normal", "large", "tied", "tiny", "huge"):
        for biased in ("small", "large", "negative") if form.biased else ("none",):
            numerics = replace(form.numerics, scaled_exponent=True)
            logits, bias = logits_of(kind, 12, experts), bias_of(biased, experts)
            assert set(objections(logits, bias, *routers.route(logits, bias, form.numerics), form.numerics)) == {""}
            device = Device(np.random.default_rng(4), scaled=True, flushes=True)
            made = adversary.route(logits.numpy(), None if bias is None else bias.numpy(), numerics, device)
            assert kind == "huge" or set(objections(logits, bias, *made, numerics)) == {""}, (kind, biased)


@pytest.mark.parametrize("defect", DEFECTS)
def test_every_defect_is_objected_to(defect: str) -> None:
    caught = "weights" if defect in ("bias in the weight", "no scale", "no renormalisation") else "choice"
    found = set()
    for biased in ("small", "negative"):
        logits, bias = logits_of("normal"), bias_of(biased)
        assert bias is not None
        device = Device(np.random.default_rng(2))
        found |= set(
            objections(logits, bias, *adversary.route(logits.numpy(), bias.numpy(), V3, device, DEFECTS[defect]), V3)
        )
    assert found - {""} == {caught}


@pytest.mark.parametrize("name", FORMS)
def test_the_reference_accepts_about_what_the_oracle_does(name: str) -> None:
    """Neither is loose by an order: the ends of a weight's intervals are within a unit in the last place for each
    addition of the sum over experts, and 32 for everything else."""
    form = FORMS[name]
    experts = form.experts[0] if form.experts else 64
    logits, bias = logits_of("normal", 8, experts), bias_of("small", experts) if form.biased else None
    weights, ids = routers.route(logits, bias, form.numerics)
    accepted, judged = routers.accepted_weights(logits, bias, ids, form.numerics)
    assert bool(judged.all())
    given = None if bias is None else bias.tolist()
    unit = 2.0**-23 * (experts + 32)
    for row in range(len(logits)):
        held, mine = logits[row].tolist(), ids[row].tolist()
        ends = router_oracle._weights(held, router_oracle._scores(held, form.numerics), given, mine, form.numerics)
        for slot, (low, high) in enumerate(ends):
            size = float(weights[row, slot])
            assert abs(low - float(accepted.lower[row, slot])) <= unit * size
            assert abs(high - float(accepted.upper[row, slot])) <= unit * size


def test_rows_of_which_little_is_promised() -> None:
    numerics = RouterNumerics(Score.SIGMOID, 2, special=Special.NAN_LAST)
    row = torch.tensor([[torch.nan, 1.0, 3.0, 2.0]]).expand(2, -1)
    nothing = torch.full((2, 2), torch.nan)
    assert objections(row, None, nothing, [[2, 3], [0, 2]], numerics) == ["", "choice"]
    assert objections(row, None, nothing, [[2, 3], [0, 2]], replace(numerics, special=Special.UNIQUE)) == ["", ""]
    masked = torch.full((1, 4), -torch.inf)
    assert objections(masked, None, nothing[:1], [[0, 3]], numerics) == [""]


def test_cancellation_and_a_floor() -> None:
    logits, bias = logits_of("normal", 6), torch.full((64,), 2.0**12)
    subtracted = RouterNumerics(Score.SIGMOID, 4, renormalise=False, recovery=Recovery.SUBTRACTED)
    made = routers.route(logits, bias, subtracted)
    assert set(objections(logits, bias, *made, subtracted)) == {""}
    assert "weights" in objections(logits, bias, *made, replace(subtracted, recovery=Recovery.KEPT))
    low, ids = torch.full((1, 8), -200.0), [[0, 1]]
    open_ended = RouterNumerics(Score.SIGMOID, 2)
    half = torch.full((1, 2), 0.5)
    assert objections(low, None, half, ids, open_ended) == [""]
    assert objections(low, None, half, ids, replace(open_ended, sum_floor=1e-20)) == ["weights"]


def test_it_shares_no_code_with_the_reference() -> None:
    tree = ast.parse(inspect.getsource(router_oracle))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {m for m in modules if m and m.startswith("reference")} == {"reference.router_numerics"}
    assert "torch" not in {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
