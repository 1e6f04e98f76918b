"""The plan: nothing that should be judged is left out silently.

Scope: the stand-in's and the reference's cells on every architecture. A pass does not prove that the cases are good.
"""

from __future__ import annotations

from collections import Counter

import pytest

from accelerated.contract import Standing
from accelerated.registry import backend
from conformance.suite.cells import Plan
from conformance.suite.plan import COMPANION, DEFAULT_EP_SIZES, GATE, SMOKE, make_plan
from reference.catalogue import KERNEL_TYPES, architectures, model_shapes

#: Cases of every kernel type at every EP size with communication, in the default tier.
LEAST_CASES = 60
SHAPES = tuple(model_shapes().values())


def plan(tier: str = "gate", arch: str = "gfx942", sizes: tuple[int, ...] = (), only: bool = False) -> Plan:
    made = [("mori-standin", backend("mori-standin", arch), False), ("reference", backend("reference"), True)]
    return make_plan(
        made,
        tier=tier,
        ep_sizes=sizes or DEFAULT_EP_SIZES[tier],
        kernel_types=(),
        models=SHAPES,
        only_models=only,
    )


@pytest.mark.parametrize("arch", architectures())
@pytest.mark.parametrize("tier", ["gate", "explore"])
def test_every_model_shape_is_touched(tier: str, arch: str) -> None:
    touched = {p.cell.model for p in plan(tier, arch).cells if not p.companion}
    assert touched - {""} == {shape.name for shape in SHAPES}


def test_every_kernel_type_at_every_size_gets_its_cases() -> None:
    found = plan()
    cases: Counter[tuple[str, int]] = Counter()
    for planned in found.cells:
        if not planned.companion:
            cases[planned.cell.kernel_type, planned.cell.world_size] += planned.examples
    refused = {(u.kernel_type, u.world_size) for u in found.unsupported if u.nodes == 1}
    for kernel_type in KERNEL_TYPES:
        for size in DEFAULT_EP_SIZES["gate"]:
            if size >= 2 and (kernel_type, size) not in refused:
                assert cases[kernel_type, size] >= LEAST_CASES, (kernel_type, size)


@pytest.mark.parametrize("arch", architectures())
def test_a_combination_is_planned_or_refused_with_a_reason(arch: str) -> None:
    found = plan(arch=arch)
    planned = {(p.cell.kernel_type, p.cell.world_size, p.cell.nodes) for p in found.cells}
    refused = {(u.kernel_type, u.world_size, u.nodes) for u in found.unsupported}
    for kernel_type in KERNEL_TYPES:
        for size in DEFAULT_EP_SIZES["gate"]:
            for nodes in (1, 2) if size % 2 == 0 else (1,):
                assert (kernel_type, size, nodes) in planned | refused
    assert all(len(u.reason) > 10 for u in found.unsupported)


def test_nothing_refused_is_planned_and_claims_are_the_backends() -> None:
    made = backend("mori-standin", "gfx942")
    for planned in plan().cells:
        if not planned.companion:
            standing = made.support(planned.cell.problem(), planned.cell.kernel_type).standing
            assert planned.claimed == (standing is Standing.CLAIMED)
            assert standing is not Standing.REFUSED


@pytest.mark.parametrize("tier", ["smoke", "gate", "explore"])
@pytest.mark.parametrize("only", [False, True])
def test_a_label_names_one_cell_of_the_run(tier: str, only: bool) -> None:
    """Totals match records to the plan by label: a shared one would hide a cell that did not run."""
    labels = Counter(p.cell.label for p in plan(tier, only=only).cells)
    assert [label for label, times in labels.items() if times > 1] == []


def test_a_backend_is_planned_under_the_name_it_was_asked_for_by() -> None:
    asked = "accelerated.reference_backend:ReferenceBackend"
    found = make_plan([(asked, backend(asked), False)], tier="smoke", ep_sizes=(2,), kernel_types=(), models=SHAPES)
    assert {p.cell.backend for p in found.cells} == {asked}
    assert {u.backend for u in found.unsupported} <= {asked}


@pytest.mark.parametrize("slots", [SMOKE, GATE, COMPANION])
def test_every_size_has_a_number_of_cases(slots: tuple[object, ...]) -> None:
    for size in range(2, 65):
        assert all(slot.examples_at(size) > 0 for slot in slots)  # type: ignore[attr-defined]


def test_only_models_drops_the_synthetic_geometries() -> None:
    assert all(p.cell.model for p in plan(only=True).cells)
