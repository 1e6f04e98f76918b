"""Logits favour what is asked, ids reach the layer translated, and router and layer are judged each by itself.

Scope: conformance/rank/routed_inputs.py and routed_layer.py on one rank, where the specification's experts are the
whole layer. A pass does not prove anything about an exchange.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from accelerated.interface import RankContext
from accelerated.reference_experts import ReferenceExperts
from accelerated.reference_routers import ReferenceRouter
from accelerated.registry import backend
from accelerated.routers import FORMS, RouteResult
from conformance.cases import Explicit, LayerCase, LayerCell, LayerRound, Rows, Weighting
from conformance.engine.protocol import Mismatch
from conformance.rank.routed_inputs import bias_of, logits_of
from conformance.rank.routed_layer import Router, program_of
from conformance.selftest.suite.layer_cells import layer_cell

CPU = torch.device("cpu")
MADE: Any = backend("reference+reference")
#: Where 8 experts lie in the tests that move them.
MOVED = (3, 1, 2, 0, 7, 5, 6, 4)


def routed_cell(form: str, **changes: Any) -> LayerCell:
    sizes = {"experts": 32, "top_k": FORMS[form].numerics.top_k, "world_size": 1, "router": f"route.{form}"}
    return layer_cell(**(sizes | changes))


def drawn(cell: LayerCell, *tokens: tuple[int, ...], **changes: Any) -> LayerCase:
    return LayerCase(cell, (LayerRound(Explicit((tokens,)), **changes),))


def rows_within(form: str, experts: int, *, groups: int) -> Rows:
    """Rows of distinct experts out of so many groups, which begin at another one in each."""
    numerics = FORMS[form].numerics
    size = experts // numerics.groups
    pools = [
        [((first + g) % numerics.groups) * size + e for e in range(size) for g in range(groups)]
        for first in range(numerics.groups)
    ]
    return (tuple(tuple(pool[: numerics.top_k]) for pool in pools),)


@pytest.mark.parametrize("weighting", ["ones", "single", "signed"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("form", FORMS)
def test_the_reference_chooses_what_the_logits_favour(form: str, dtype: str, weighting: Weighting) -> None:
    numerics = FORMS[form].numerics
    experts = (FORMS[form].experts or (32,))[0]
    cell = routed_cell(form, experts=experts, dtype=dtype, capacity=64)
    if numerics.groups > 1:
        rows = rows_within(form, experts, groups=numerics.groups_kept)
    else:
        rows = (tuple(tuple((5 * t + 3 * s) % experts for s in range(numerics.top_k)) for t in range(40)),)
    for seed in range(3):
        case = drawn(cell, *rows[0], seed=seed, weighting=weighting)
        logits = logits_of(case, 0, 0, rows, CPU)
        assert logits.shape == (len(rows[0]), experts)
        assert logits.dtype == getattr(torch, dtype)
        declared = MADE.route_contract(cell.route_problem(), cell.router)
        found = ReferenceRouter(cell.router).route(logits, bias_of(cell, declared, CPU))
        assert [set(row) for row in found.ids.tolist()] == [set(row) for row in rows[0]]


def test_a_router_in_groups_must_leave_a_row_that_lies_in_too_many() -> None:
    cell = routed_cell("grouped_g8t4k8")
    rows = rows_within("grouped_g8t4k8", 32, groups=8)
    declared = MADE.route_contract(cell.route_problem(), cell.router)
    logits = logits_of(drawn(cell, *rows[0]), 0, 0, rows, CPU)
    found = ReferenceRouter(cell.router).route(logits, bias_of(cell, declared, CPU))
    assert len({e // 4 for e in rows[0][0]}) == 8
    assert all(len({e // 4 for e in row}) <= 4 for row in found.ids.tolist())


def test_logits_are_of_case_round_and_rank_alone() -> None:
    cell = routed_cell("softmax_k2", world_size=2)
    rows: Rows = (((0, 1), (4, 9)), ((2, 3),))
    case = LayerCase(cell, (LayerRound(Explicit(rows), seed=4),) * 2)
    first = logits_of(case, 0, 0, rows, CPU)
    assert torch.equal(first, logits_of(case, 0, 0, rows, CPU))
    assert not torch.equal(first, logits_of(case, 1, 0, rows, CPU))
    swapped: Rows = (((0, 1), (4, 9)), ((0, 1), (4, 9)))
    assert not torch.equal(first, logits_of(case, 0, 1, swapped, CPU))


def test_weightings_are_told_by_the_weights() -> None:
    cell = routed_cell("softmax_k2")
    rows: Rows = (((0, 1),) * 9,)
    weights = {}
    for weighting in ("ones", "single", "signed"):
        logits = logits_of(drawn(cell, *rows[0], weighting=weighting), 0, 0, rows, CPU)
        weights[weighting] = ReferenceRouter(cell.router).route(logits, None).weights
    assert bool((weights["ones"] == 0.5).all())
    assert float(weights["single"].amax(1).min()) > 0.99
    assert len(weights["signed"].unique()) > 4


class Seen:
    """The specification's experts of one rank as a layer, and what they were given."""

    def __init__(self, cell: LayerCell) -> None:
        self.inner = ReferenceExperts(cell.expert_problem(), "experts.bf16")
        self.ids: list[list[list[int]]] = []

    def load(self, weights: Any, owned: Any) -> None:
        self.inner.load(weights, owned)

    def forward(self, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        assert ids.dtype == torch.int32
        self.ids.append(ids.tolist())
        return self.inner.experts(rows, ids, weights)

    def record_load(self) -> None:
        raise AssertionError("a router's cell counts no loads")

    def expert_load(self) -> torch.Tensor:
        raise AssertionError("a router's cell counts no loads")

    def close(self) -> None:
        self.inner.close()


Change = Callable[[RouteResult], RouteResult]


class Changed:
    """The specification's router, whose result is changed."""

    def __init__(self, cell: LayerCell, change: Change) -> None:
        self._inner, self._change = ReferenceRouter(cell.router), change

    def route(self, logits: torch.Tensor, bias: torch.Tensor | None) -> RouteResult:
        assert len(logits) > 0
        return self._change(self._inner.route(logits, bias))

    def close(self) -> None:
        self._inner.close()


def judged(case: LayerCase, change: Change = lambda found: found, layer: Any = None) -> tuple[Mismatch | None, Any]:
    """The verdict on a layer behind a router, and the layer."""
    cell = case.cell
    layer = layer or Seen(cell)
    declared = MADE.contract(cell.problem(), cell.kernel_type)
    router = Router(Changed(cell, change), MADE.route_contract(cell.route_problem(), cell.router), "reference")
    context: Any = RankContext(0, 1, CPU, None, "gfx942")  # type: ignore[arg-type]
    program = program_of(context, layer, declared, "reference", cell, router)
    return program.run(case, lambda name, index: None)[0], layer


def eight(*tokens: tuple[int, ...], **changes: Any) -> LayerCase:
    return drawn(routed_cell("softmax_k2", experts=8), *tokens, **({"weighting": "signed"} | changes))


def test_ids_reach_the_layer_where_the_experts_lie() -> None:
    mismatch, layer = judged(eight((0, 4), (3, 6), physical=MOVED))
    assert mismatch is None
    assert [set(row) for row in layer.ids[0]] == [{3, 7}, {0, 6}]
    mismatch, layer = judged(eight((0, 4), (3, 6)))
    assert mismatch is None
    assert [set(row) for row in layer.ids[0]] == [{0, 4}, {3, 6}]


def _other_weight(found: RouteResult) -> RouteResult:
    return RouteResult(found.weights * 1.001, found.ids)


def _other_id(found: RouteResult) -> RouteResult:
    return RouteResult(found.weights, (found.ids + 1) % 8)


def _beyond(found: RouteResult) -> RouteResult:
    return RouteResult(found.weights, found.ids + 1000)


def _wide(found: RouteResult) -> RouteResult:
    return RouteResult(found.weights, found.ids.long())


def _short(found: RouteResult) -> RouteResult:
    return RouteResult(found.weights[:1], found.ids[:1])


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (_other_weight, "route.weights"),
        (_other_id, "route.choice"),
        (_beyond, "route.ids"),
        (_wide, "route.layout"),
        (_short, "route.layout"),
    ],
)
def test_a_wrong_router_is_told_from_a_wrong_layer(change: Change, check: str) -> None:
    mismatch, layer = judged(eight((0, 4), (3, 6)), change)
    assert mismatch is not None
    assert (mismatch.check, mismatch.source_rank) == (check, 0)
    # Nothing that names no expert is dispatched, and a malformed result is not dispatched at all.
    assert all(0 <= e < 8 for row in layer.ids[0] for e in row)
    assert len(layer.ids[0]) == 2


class Swapped(Seen):
    """Two tokens' experts are swapped behind the router."""

    def forward(self, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return super().forward(rows, ids.flip(0), weights)


class Scaling(Seen):
    """Weights are changed in place."""

    def forward(self, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        output = super().forward(rows, ids, weights)
        weights.mul_(2)
        return output


@pytest.mark.parametrize(("layer", "check"), [(Swapped, "layer.output"), (Scaling, "inputs.modified")])
def test_a_wrong_layer_is_told_from_a_wrong_router(layer: type[Seen], check: str) -> None:
    case = eight((0, 4), (3, 6))
    mismatch, _ = judged(case, layer=layer(case.cell))
    assert mismatch is not None
    assert mismatch.check == check


class Masking(ReferenceRouter):
    """Masks an expert in what it was handed."""

    def route(self, logits: torch.Tensor, bias: torch.Tensor | None) -> RouteResult:
        found = super().route(logits, bias)
        logits[0, 0] = -torch.inf
        return found


class Unbiased(ReferenceRouter):
    """Clears its bias, and chooses without."""

    def route(self, logits: torch.Tensor, bias: torch.Tensor | None) -> RouteResult:
        assert bias is not None
        return super().route(logits, bias.zero_())


class Reusing(ReferenceRouter):
    """Returns the same ids again in every round."""

    held: RouteResult | None = None

    def route(self, logits: torch.Tensor, bias: torch.Tensor | None) -> RouteResult:
        found = super().route(logits, bias)
        if self.held is None:
            self.held = found
        else:
            self.held.ids.copy_(found.ids)
        return found


def routed_by(router: type[ReferenceRouter], case: LayerCase) -> Mismatch | None:
    cell = case.cell
    made = Router(router(cell.router), MADE.route_contract(cell.route_problem(), cell.router), "reference")
    context: Any = RankContext(0, 1, CPU, None, "gfx942")  # type: ignore[arg-type]
    declared = MADE.contract(cell.problem(), cell.kernel_type)
    program = program_of(context, Seen(cell), declared, "reference", cell, made)
    return program.run(case, lambda name, index: None)[0]


def test_what_the_router_changes_is_seen() -> None:
    found = routed_by(Masking, eight((0, 4), (3, 6)))
    assert found is not None
    assert (found.check, found.message) == ("inputs.modified", "the backend changed its input logits")
    grouped = drawn(routed_cell("grouped_g8t4k8", experts=32), tuple(range(0, 16, 2)))
    assert routed_by(ReferenceRouter, grouped) is None
    found = routed_by(Unbiased, grouped)
    assert found is not None
    assert found.check in ("inputs.modified", "route.weights", "route.choice")
    first = eight((0, 4), (3, 6))
    later = LayerCase(first.cell, (*first.rounds, *eight((1, 5), (2, 7)).rounds))
    found = routed_by(Reusing, later)
    assert found is not None
    assert (found.check, found.message) == ("outputs.overwritten", "a later call changed the router's ids")


def test_a_router_that_takes_no_empty_call_gets_none() -> None:
    case = eight()
    cell = case.cell
    aiter: Any = backend("reference+aiter-standin", "gfx942")
    declared = aiter.route_contract(cell.route_problem(), "topk_softmax.softmax_k2")
    assert not declared.takes_empty
    router = Router(Changed(cell, lambda found: found), declared, "reference")
    context: Any = RankContext(0, 1, CPU, None, "gfx942")  # type: ignore[arg-type]
    program = program_of(
        context, Seen(cell), MADE.contract(cell.problem(), cell.kernel_type), "reference", cell, router
    )
    assert program.run(case, lambda name, index: None)[0] is None
