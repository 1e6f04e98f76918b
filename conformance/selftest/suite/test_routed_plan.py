"""Cells of layers with a router: which router meets which experts and EP size, and what their cases hold.

Scope: conformance/suite/routed_plan.py, and what generation, coverage, steps and case files make of a router. A pass
does not prove that a planned cell runs.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, seed, settings

from accelerated.contract import ContractError, Standing
from accelerated.interface import Backend
from accelerated.layer import LayerBackend, split_path
from accelerated.operators import Family, RowProblem
from accelerated.registry import backend
from conformance.case_files import decode, validate_layer
from conformance.cases import CaseError, LayerCase, LayerCell, encode
from conformance.engine import layer_steps, steps
from conformance.layer_generation import layer_cases, layer_ladder, strata_of
from conformance.layer_rules import takes
from conformance.selftest.faults.conftest import gate_options
from conformance.selftest.suite.layer_cells import layer_cell, layer_contract, one
from conformance.suite import kinds, layer_coverage
from conformance.suite.cells import Plan, PlannedCell
from conformance.suite.controller import replayed_cases
from conformance.suite.describe import describe
from conformance.suite.layer_plan import planned_cell
from conformance.suite.plan import make_plan
from conformance.suite.reproduce_programs import program_script
from conformance.suite.routed_plan import ROUTED_FORMS, STAGE1, form_for, lends_its_dispatch, routed

WHOLE, SPECIFICATION, LENT = "mori-standin+aiter-standin", "reference+reference", "reference+aiter-standin"
ROUTED = layer_cell(experts=32, top_k=2, router="route.softmax_k2", mode="free-running")


def plan(name: str, *, arch: str = "gfx942", companion: bool = False, **options: Any) -> Plan:
    made: list[tuple[str, Backend, bool]] = [(name, backend(name, arch), companion)]
    wanted: dict[str, Any] = {"tier": "gate", "ep_sizes": (1, 2, 4, 8), "kernel_types": (), "models": ()}
    return make_plan(made, **(wanted | options))


def with_router(found: Plan) -> list[LayerCell]:
    return [p.cell for p in found.cells if isinstance(p.cell, LayerCell) and p.cell.router]


def pairs(found: Plan) -> set[tuple[str, int]]:
    cells = with_router(found)
    return {(c.router.rpartition(".")[2], c.world_size) for c in cells}


def test_every_router_meets_every_ep_size_behind_mori() -> None:
    found = plan(WHOLE)
    assert pairs(found) == set(product(ROUTED_FORMS, (2, 4, 8)))
    assert pairs(plan(WHOLE, ep_sizes=(1, 2, 4))) == set(product(ROUTED_FORMS, (2, 4)))
    cells = with_router(found)
    assert {c.mode for c in cells} == {"free-running"}
    assert len({c.kernel_type for c in cells}) == len(cells)
    assert {split_path(c.kernel_type).operator for c in cells} >= {"fused_moe.bf16", "fused_moe.fp8_token"}


def test_one_ep_size_is_enough_and_explore_takes_all() -> None:
    assert {c.world_size for c in with_router(plan(SPECIFICATION, ep_sizes=(1,)))} == {1}
    every = plan(SPECIFICATION, tier="explore")
    assert {c.world_size for c in with_router(every)} == {2, 4, 8}
    assert any(c.kernel_type.endswith("@bf16") for c in with_router(every))
    assert not with_router(plan(SPECIFICATION, only_models=True))


def test_gpt_oss_experts_get_their_router_and_weighed_inputs_one_expert() -> None:
    oss = [c for c in with_router(plan(WHOLE, arch="gfx950")) if "swiglu" in c.kernel_type]
    assert {c.router.rpartition(".")[2] for c in oss} == {"after_k4"}
    assert {c.top_k for c in oss} == {4}
    behind = plan(WHOLE)
    assert not [c for c in with_router(behind) if STAGE1 in c.kernel_type]
    assert any(STAGE1 in u.kernel_type and "take no row count" in u.reason for u in behind.unsupported)
    lent = with_router(plan(LENT, companion=True))
    assert {(c.top_k, c.router) for c in lent} == {(1, "topk_sigmoid.sigmoid_k1")}
    assert len(plan(LENT, companion=True).cells) == len(lent) == 2
    assert {form_for("fused_moe.fp8_token_stage1", turn) for turn in range(5)} == {"sigmoid_k1"}


def test_companions_and_smoke_get_routers_too() -> None:
    beside = with_router(plan(SPECIFICATION, companion=True))
    assert sorted(c.router.rpartition(".")[2] for c in beside) == sorted(ROUTED_FORMS)
    smoke = with_router(plan(WHOLE, tier="smoke", ep_sizes=(1, 2, 4)))
    kernel_types = [split_path(c.kernel_type).kernel_type for c in smoke]
    assert sorted(kernel_types) == sorted(set(backend("mori-standin").kernel_types))
    assert lends_its_dispatch(backend(LENT))
    assert not lends_its_dispatch(backend(SPECIFICATION))
    assert not lends_its_dispatch(backend(WHOLE))


def test_a_claimed_router_is_preferred_and_an_unclaimed_one_claims_nothing() -> None:
    made = backend(WHOLE)
    for turn in range(8):
        cell = routed(made, layer_cell(backend=WHOLE), "softmax_k8", turn)
        assert isinstance(cell, LayerCell)
        assert made.support(cell.route_problem(), cell.router).standing is Standing.CLAIMED
    without = routed(backend("mori-standin+reference"), layer_cell(), "grouped_bias_e72", 0)
    assert isinstance(without, str)
    assert "grouped_bias_e72 over 32 experts (route.grouped_bias_e72: 32 experts" in without
    claimed = [p.cell for p in plan(WHOLE).cells if p.claimed]
    first = next(c for c in with_router(plan(WHOLE)) if c in claimed)
    unclaimed = msgspec.structs.replace(first, router="topk_gating.softmax_k8")
    assert made.support(unclaimed.route_problem(), unclaimed.router).standing is Standing.UNCLAIMED
    found = [planned_cell(made, cell, 1, False) for cell in (first, unclaimed)]
    assert [p.claimed for p in found if isinstance(p, PlannedCell)] == [True, False]


def test_a_layer_has_the_routers_of_its_experts() -> None:
    made = backend(WHOLE)
    assert isinstance(made, LayerBackend)
    problem = RowProblem(Family.ROUTE, 1, 32, 4)
    assert made.support(problem, "topk_softmax.softmax_k8").standing is Standing.CLAIMED
    assert made.support(problem, "route.softmax_k8").standing is Standing.REFUSED
    assert made.support(RowProblem(Family.NORM, 1, 32, 4), "topk_softmax.softmax_k8").standing is Standing.REFUSED
    assert made.route_contract(problem, "topk_softmax.softmax_k8").top_k == 8
    with pytest.raises(ContractError, match="aiter-standin has no router"):
        made.route_contract(problem, "route.softmax_k8")


# ------------------------------------------------------------------------------------------------------ its cases
def check(case: LayerCase) -> None:
    validate_layer(case)
    assert decode(encode(case), "there") == case
    assert takes(layer_contract(), case)


def test_the_ladder_hits_every_class_of_a_routed_cell() -> None:
    (case,) = layer_ladder(ROUTED, layer_contract())
    check(case)
    wanted = layer_coverage.required(ROUTED, short=False, masked=False, quantised=False)
    assert wanted == {"router", "row crosses ranks", "sizes change", "round-robin placement"}
    assert wanted <= set(layer_coverage.classes(case))
    assert "router" not in layer_coverage.classes(one(layer_cell(), (0, 1)))
    assert "router" not in layer_coverage.classes(one(ROUTED))
    assert strata_of(ROUTED, layer_contract(), 6) == [("", 5), ("round-robin", 1)]


@given(layer_cases(ROUTED, layer_contract()))
@settings(max_examples=60, deadline=None, database=None)
@seed(3)
def test_drawn_cases_name_every_expert_once_and_mask_none(case: LayerCase) -> None:
    check(case)


@pytest.mark.parametrize(
    ("change", "row", "text"),
    [
        ({}, (0, -1), "routes to (0, -1)"),
        ({}, (3, 3), "routes to (3, 3)"),
        ({"top_k": 1}, (3,), "chooses 2 experts and top_k is 1"),
        ({"kernel_type": "experts.bf16", "world_size": 1, "shards": 1}, (0, 1), "is no layer"),
        ({"router": "route.best"}, (0, 1), "ends in no known form"),
    ],
)
def test_what_no_router_chooses_is_no_case(change: dict[str, Any], row: tuple[int, ...], text: str) -> None:
    case = one(msgspec.structs.replace(ROUTED, **change), row)
    with pytest.raises(CaseError) as raised:
        decode(encode(case), "there")
    assert text in str(raised.value)


def test_a_reduced_case_is_legal_as_long_as_the_router_takes_it() -> None:
    made: Any = backend(SPECIFICATION)
    cell = msgspec.structs.replace(ROUTED, backend=SPECIFICATION, world_size=1)
    assert kinds.legal(made, one(cell, (0, 1)), "gfx942")
    assert not kinds.legal(made, one(cell, (1, 1)), "gfx942")
    eight = msgspec.structs.replace(cell, router="route.grouped_g8t4k8", top_k=8)
    assert kinds.legal(made, one(eight, tuple(range(8))), "gfx942")
    # Groups of one have no two to add up.
    assert not kinds.legal(made, one(msgspec.structs.replace(eight, experts=8), tuple(range(8))), "gfx942")


def test_a_case_without_its_router_is_the_smaller_one() -> None:
    case = one(ROUTED, (0, 1))
    plain = next(c for c in layer_steps.settings(case) if not c.cell.router)
    assert steps.size(plain) < steps.size(case)
    assert plain.rounds == case.rounds


def test_labels_reports_and_scripts_name_the_router() -> None:
    case = one(ROUTED, (0, 1))
    assert ROUTED.label.endswith("-route.softmax_k2")
    assert "ids and weights from route.softmax_k2" in describe(case)[0]
    assert "route.softmax_k2" in program_script(case)


def test_a_recorded_router_that_the_backend_lacks_is_refused_before_the_run(tmp_path: Path) -> None:
    cell = with_router(plan(WHOLE))[0]
    path = tmp_path / "case.json"
    for router, runs in ((cell.router, True), ("route.after_k4", False)):
        there = msgspec.structs.replace(cell, router=router)
        path.write_bytes(encode(one(there, tuple(range(there.top_k)))))
        options = replace(gate_options(tmp_path), tier="replay", replay=(path,))
        if runs:
            assert replayed_cases(options, ())[0]
            continue
        with pytest.raises(pytest.UsageError, match=r"does not take router 'route\.after_k4'"):
            replayed_cases(options, ())
