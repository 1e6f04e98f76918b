"""The plan of experts and layers: every path at every EP size, and refusals with their reason.

Scope: conformance/suite/layer_plan.py and its hooks in plan.py and options.py. A pass does not prove that a planned
cell runs.
"""

from __future__ import annotations

from typing import Any

import pytest

from accelerated.interface import Backend
from accelerated.layer import LayerBackend, split_path
from accelerated.registry import backend
from conformance.cases import LayerCell
from conformance.suite.cells import Plan, PlannedCell
from conformance.suite.layer_plan import ALONE_SUFFICES
from conformance.suite.plan import make_plan
from reference.catalogue import model_shapes

SHAPES = tuple(model_shapes().values())
WHOLE = "mori-standin+reference"


def plan(*names: str, companion: bool = False, **options: Any) -> Plan:
    made: list[tuple[str, Backend, bool]] = [(name, backend(name), companion) for name in names]
    wanted: dict[str, Any] = {"tier": "gate", "ep_sizes": (1, 2, 4, 8), "kernel_types": (), "models": SHAPES}
    return make_plan(made, **(wanted | options))


def layers(found: Plan) -> list[LayerCell]:
    return [p.cell for p in found.cells if isinstance(p.cell, LayerCell)]


def test_every_path_is_planned_or_refused_at_every_size() -> None:
    found = plan(WHOLE)
    made = backend(WHOLE)
    assert isinstance(made, LayerBackend)
    planned = {(cell.kernel_type, cell.world_size, cell.nodes) for cell in layers(found)}
    refused = {(u.kernel_type, u.world_size, u.nodes): u.reason for u in found.unsupported}
    # Without a wire both paths are one.
    alike = {f"{o}@bf16" for o in ("bf16", "bf16_gelu", "swiglu_mxfp4", "stored_terms")}
    for path in made.kernel_types:
        if path.partition("experts.")[2] in alike:
            assert not any(path in key for key in (*planned, *refused))
            continue
        if path.endswith(ALONE_SUFFICES):
            assert not any(path in key for key in planned)
            assert "planned in explore" in refused[path, 8, 1]
            continue
        # Beside a quantised path the plain wire gets one EP size.
        told = {key[1] for key in (*planned, *refused) if key[0] == path}
        assert len(told) == 1 if path.endswith("@bf16") else told == {1, 2, 4, 8}
        for world_size in told:
            for nodes in (1, 2) if world_size > 1 else (1,):
                key = (path, world_size, nodes)
                assert key in planned or refused.get(key), key
    assert all(refused.values())


def test_every_claimed_path_gets_each_property() -> None:
    found = layers(plan(WHOLE))
    checks = {split_path(cell.kernel_type).quantised for cell in found}
    assert checks == {True, False}
    plain = [c for c in found if c.kernel_type == "IntraNode/experts.bf16"]
    assert {c.check for c in plain} == {"layer", "eplb"}
    # Replicas and a cell without host sync at one EP size of each path, at all of them taken together.
    assert {c.redundant for c in found} == {0, 2, 4, 8}
    assert len({c.world_size for c in plain if c.redundant}) == 1
    free = [c for c in found if c.mode == "free-running" and not c.router]
    assert {c.world_size for c in free} == {2, 4, 8}
    assert sum(c.kernel_type == plain[0].kernel_type and c.nodes == 1 for c in free) == 1


def test_global_ids_go_to_dispatches_that_see_them() -> None:
    scattered = [c for c in layers(plan("allgather+reference")) if not c.translated]
    assert {c.placement for c in scattered} == {"round_robin"}
    assert not [c for c in layers(plan(WHOLE)) if not c.translated]


def test_kernel_types_and_operators_choose_paths() -> None:
    by_type = layers(plan(WHOLE, kernel_types=("IntraNode",)))
    assert {split_path(c.kernel_type).kernel_type for c in by_type} == {"IntraNode"}
    named = layers(plan(WHOLE, operators=("experts.bf16_gelu",)))
    assert {split_path(c.kernel_type).operator for c in named} == {"experts.bf16_gelu"}
    by_operator = layers(plan(WHOLE, operators=("experts.fp8_block",)))
    assert {split_path(c.kernel_type).operator for c in by_operator} == {"experts.fp8_block"}
    alone = layers(plan("reference", operators=("experts.fp8_block",)))
    assert {c.kernel_type for c in alone} == {"experts.fp8_block"}
    assert {c.check for c in alone} == {"experts"}


def test_a_companion_and_the_smoke_tier_get_less() -> None:
    def budget(found: Plan) -> int:
        return sum(p.examples for p in found.cells if isinstance(p.cell, LayerCell))

    whole, beside, smoke = plan(WHOLE), plan(WHOLE, companion=True), plan(WHOLE, tier="smoke", ep_sizes=(1, 2, 4))
    assert budget(whole) > max(budget(beside), budget(smoke)) >= min(budget(beside), budget(smoke)) > 0


def test_model_shapes_are_for_explore_and_for_those_who_ask() -> None:
    assert not any(c.model for c in layers(plan(WHOLE)))
    asked = layers(plan(WHOLE, models=[s for s in SHAPES if s.name == "deepseek-v3"], only_models=True, ep_sizes=(8,)))
    assert {(c.model, c.hidden, c.experts, c.top_k, c.intermediate) for c in asked} == {
        ("deepseek-v3", 7168, 256, 8, 128)
    }


def test_labels_are_unique_and_problems_valid() -> None:
    found = plan(WHOLE, "reference", "reference+reference")
    labels = [p.cell.label for p in found.cells]
    assert len(set(labels)) == len(labels)
    for planned in found.cells:
        assert isinstance(planned, PlannedCell)
        planned.cell.problem()


@pytest.mark.parametrize("name", ["mori-standin+", "+reference", "reference+mori-standin", "a+b+c"])
def test_what_is_no_pair_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="backend"):
        backend(name)
