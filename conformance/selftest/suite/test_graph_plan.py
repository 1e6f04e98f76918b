"""The plan of captured calls: what every kernel type gets, and what is refused.

Scope: the planner; nothing runs. That a form is planned does not prove that it finds anything.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from accelerated.registry import backend
from conformance.cases import GraphCase, GraphCell
from conformance.suite.capabilities import manner, subjects, tiny
from conformance.suite.cells import Plan, PlannedCell, Unsupported
from conformance.suite.graph_plan import FORMS, graph_cells
from reference.catalogue import KERNEL_TYPES

_TOPOLOGIES = [(size, nodes) for size in (1, 2, 4, 8) for nodes in (1, 2) if nodes <= size]


def planned(
    name: str, device: str, tier: str = "gate", sizes: Sequence[int] = (1, 2, 4, 8), *, companion: bool = False
) -> tuple[list[tuple[GraphCell, PlannedCell]], list[Unsupported]]:
    made = backend(name)
    found = list(
        graph_cells(
            name,
            made,
            companion=companion,
            tier=tier,
            kernel_types=made.kernel_types,
            topologies=[place for place in _TOPOLOGIES if place[0] in sizes],
            device=device,
        )
    )
    cells = [(p.cell, p) for p in found if isinstance(p, PlannedCell) and isinstance(p.cell, GraphCell)]
    return cells, [p for p in found if isinstance(p, Unsupported)]


def form_of(cell: GraphCell) -> tuple[int, bool, bool, str]:
    return cell.length, cell.halves, cell.warm, cell.mode


def test_the_gate_turns_forms_and_sizes_over_the_doubles_kernel_types() -> None:
    cells, refused = planned("mori-standin", "cpu")
    assert not refused
    assert {cell.kernel_type for cell, _ in cells} == set(KERNEL_TYPES)
    assert len(cells) == 2 * len(KERNEL_TYPES)
    assert {form_of(cell) for cell, _ in cells} == {(f.length, f.halves, f.warm, f.mode) for f in FORMS}
    assert {cell.world_size for cell, _ in cells} == {2, 4, 8}
    assert any(cell.nodes == 2 for cell, _ in cells), "levels of nodes are captured as well"
    assert all(p.claimed for _, p in cells)


def test_nobody_claims_a_first_call_that_is_captured() -> None:
    cells, _ = planned("mori", "cuda")
    assert {cell.kernel_type for cell, _ in cells} == set(KERNEL_TYPES)
    assert {cell.warm: p.claimed for cell, p in cells} == {True: True, False: False}
    assert {(cell.kernel_type, form_of(cell)) for cell, _ in cells} == {
        (kind, (f.length, f.halves, f.warm, f.mode)) for kind in KERNEL_TYPES for f in FORMS
    }


@pytest.mark.parametrize(("name", "modes"), [("allgather", ()), ("replicated", ()), ("reference", ("handle",))])
def test_collectives_of_torch_are_captured_warm_on_a_gpu_alone(name: str, modes: tuple[str, ...]) -> None:
    cells, refused = planned(name, "cuda", sizes=(2,))
    assert not [u for u in refused if "captured" in u.reason]
    for kernel_type in backend(name).kernel_types:
        taken = {form_of(cell) for cell, _ in cells if cell.kernel_type == kernel_type}
        assert taken == {(f.length, f.halves, f.warm, f.mode) for f in FORMS if f.warm}
    assert all(cell.modes == modes for cell, _ in cells)
    cells, refused = planned(name, "cpu")
    assert not cells
    assert {u.reason for u in refused} >= {f"calls of {name} cannot be captured on cpu; give --device cuda"}


def test_the_double_is_not_captured_on_a_device() -> None:
    cells, refused = planned("mori-standin", "cuda")
    assert not cells
    assert {u.reason for u in refused} == {"calls of mori-standin cannot be captured on cuda; give --device cpu"}


def test_explore_crosses_forms_and_sizes_and_companions_have_none() -> None:
    cells, _ = planned("mori-standin", "cpu", "explore")
    assert len({(cell.kernel_type, form_of(cell), cell.world_size) for cell, _ in cells}) == len(cells)
    assert len(cells) == len(KERNEL_TYPES) * len(FORMS) * 4
    assert planned("mori-standin", "cpu", "smoke") == ([], [])
    assert planned("allgather", "cuda", companion=True) == ([], [])


def test_a_capability_matrix_tries_to_capture() -> None:
    cells, _ = planned("mori-standin", "cpu", sizes=(2,))
    tried = subjects(Plan(tuple(p for _, p in cells), ()))
    assert {(p.cell.kernel_type, manner(p.cell)) for p in tried} == {(kind, "captured") for kind in KERNEL_TYPES}
    case = tiny(tried[0], backend("mori-standin"))
    assert isinstance(case, GraphCase)
    assert any(a_round.graph >= 0 for a_round in case.rounds)
