"""The plan of row operators: what is offered is planned or refused with a reason, and filters keep what they name.

Scope: conformance/suite/row_plan.py, its part of plan.py and the size check, for the reference and for backends made
here. A pass does not prove that the cases are good.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from accelerated import reference_rows
from accelerated.contract import Standing, Support
from accelerated.interface import Backend
from accelerated.operators import Family, QuantContract
from accelerated.reference_backend import ReferenceBackend
from accelerated.registry import backend
from conformance.cases import LayerCell
from conformance.row_cases import RowCase, RowCell, validate_rows
from conformance.selftest.suite.row_cells import CHECKS, contract_of
from conformance.selftest.suite.test_harness import options
from conformance.suite import controller, kinds, row_plan
from conformance.suite.cells import Plan
from conformance.suite.plan import DEFAULT_EP_SIZES, make_plan
from reference.catalogue import model_shapes

SHAPES = tuple(model_shapes().values())
OFFERED = {name for names in reference_rows.OPERATORS.values() for name in names}


class Offering(ReferenceBackend):
    """Some operators, some of them refused at some sizes."""

    judged_by = "reference"
    kernel_types: Sequence[str] = ()

    def __init__(self, operators: dict[str, tuple[str, ...]], refused: Mapping[str, str] | None = None) -> None:
        self.operators = operators
        self._refused = dict(refused or {})

    def support(self, problem: Any, kernel_type: str) -> Support:
        reason = self._refused.get(f"{kernel_type} {problem.hidden}", self._refused.get(kernel_type, ""))
        if reason == "unclaimed":
            return Support(Standing.UNCLAIMED, "nobody said so")
        return Support(Standing.REFUSED, reason) if reason else Support(Standing.CLAIMED)


def plan(*made: tuple[str, Backend, bool], tier: str = "gate", **changes: Any) -> Plan:
    chosen = {"ep_sizes": DEFAULT_EP_SIZES["gate"], "kernel_types": (), "models": SHAPES, **changes}
    return make_plan(made or (("reference", backend("reference"), False),), tier=tier, **chosen)


def operators(found: Plan, *, companion: bool = False) -> set[str]:
    return {p.cell.kernel_type for p in found.cells if isinstance(p.cell, RowCell) and p.companion == companion}


def others(found: Plan) -> set[str]:
    return {p.cell.kernel_type for p in found.cells if not isinstance(p.cell, RowCell | LayerCell)}


@pytest.mark.parametrize("tier", ["smoke", "gate", "explore"])
def test_every_operator_is_planned(tier: str) -> None:
    found = plan(tier=tier)
    assert operators(found) == OFFERED
    labels = Counter(p.cell.label for p in found.cells)
    assert [label for label, times in labels.items() if times > 1] == []


def test_every_family_at_every_size() -> None:
    sizes: dict[Family, set[int]] = {family: set() for family in Family}
    for planned in plan().cells:
        if isinstance(planned.cell, RowCell):
            sizes[planned.cell.family].add(planned.cell.world_size)
            planned.cell.problem()
    local = {family: {1} for family in (Family.QUANTISE, Family.NORM, Family.ROUTE)}
    assert {family: found for family, found in sizes.items() if found} == {**local, Family.ALLREDUCE_NORM: {2, 4, 8}}
    only_two = plan(ep_sizes=(2,))
    assert {p.cell.world_size for p in only_two.cells if isinstance(p.cell, RowCell)} == {1, 2}


def test_every_cell_has_a_test_and_cases() -> None:
    here = Path(controller.__file__).parents[1]
    for planned in plan().cells:
        if isinstance(planned.cell, RowCell):
            module = here / f"test_{planned.cell.check}.py"
            assert f'CHECK = "{planned.cell.check}"' in module.read_text()
            first = next(iter(kinds.fixed_cases(planned, contract_of(planned.cell))))
            assert isinstance(first, RowCase)
            validate_rows(first)


def test_the_codecs_check_is_of_static_quantisers() -> None:
    found = {p.cell.kernel_type for p in plan().cells if p.cell.check == "codecs"}
    static = set()
    for name in reference_rows.OPERATORS[Family.QUANTISE.value]:
        contract = contract_of(next(p.cell for p in plan().cells if p.cell.kernel_type == name))  # type: ignore[arg-type]
        assert isinstance(contract, QuantContract)
        static |= {name} if contract.codec.static else set()
    assert found == static != set()


@pytest.mark.parametrize(
    ("kernel_types", "named", "exchanges", "rows"),
    [
        ((), (), {"one-level", "node-levels"}, OFFERED),
        ((), ("token_fn", "fused"), set(), {"token_fn", "fused"}),
        (("one-level",), (), {"one-level"}, set()),
        (("one-level",), ("fused",), {"one-level"}, {"fused"}),
    ],
)
def test_filters(kernel_types: tuple[str, ...], named: tuple[str, ...], exchanges: set[str], rows: set[str]) -> None:
    found = plan(kernel_types=kernel_types, operators=named)
    assert others(found) == exchanges
    assert operators(found) == rows


def test_filters_leave_companions_their_operators() -> None:
    """A companion is the yardstick: it runs what it has, whatever the subject is asked for."""
    subject = ("subject", Offering({"quantise": ("token_fn",), "norm": ("rms_norm",)}), False)
    found = plan(subject, ("reference", backend("reference"), True), operators=("token_fn",))
    assert operators(found) == {"token_fn"}
    assert operators(found, companion=True) == OFFERED
    sizes = Counter(p.companion for p in found.cells if p.cell.kernel_type == "token_fn")
    assert sizes[False] > sizes[True] >= 1, "fewer cells for a companion"


def test_only_models_leaves_row_operators_out() -> None:
    assert operators(plan(only_models=True)) == set()


def test_what_is_refused_everywhere_is_told_and_what_is_refused_somewhere_is_left_out() -> None:
    made = Offering(
        {"quantise": ("token_fn", "group128_fn", "mxfp4_even"), "allreduce_norm": ("fused",)},
        {"token_fn": "no such device", "group128_fn 200": "ragged", "mxfp4_even": "unclaimed", "fused 512": "too wide"},
    )
    found = plan(("made", made, False))
    told = {(u.kernel_type, u.world_size, u.reason) for u in found.unsupported}
    assert told == {
        ("token_fn", 1, "no such device"),
        ("group128_fn", 1, "rows of 200 bfloat16: ragged"),
        *(("fused", size, "rows of 512 bfloat16: too wide") for size in (2, 4, 8)),
    }
    assert operators(found) == {"group128_fn", "mxfp4_even", "fused"}
    hidden = {p.cell.hidden for p in found.cells if p.cell.kernel_type == "group128_fn"}
    assert 200 not in hidden
    assert {256, 128} <= hidden
    assert {p.claimed for p in found.cells if p.cell.kernel_type == "mxfp4_even"} == {False}
    assert {p.claimed for p in found.cells if p.cell.kernel_type == "fused"} == {True}


def test_every_size_of_a_collective_is_refused_by_itself() -> None:
    class Narrow(Offering):
        def support(self, problem: Any, kernel_type: str) -> Support:
            return (
                Support(Standing.REFUSED, "two ranks at most")
                if problem.world_size > 2
                else super().support(problem, kernel_type)
            )

    found = plan(("made", Narrow({"allreduce_norm": ("fused",)}), False))
    assert {p.cell.world_size for p in found.cells} == {2}
    assert {(u.kernel_type, u.world_size) for u in found.unsupported} == {("fused", 4), ("fused", 8)}


def test_a_gpu_gets_production_sizes_and_the_oracle_does_not() -> None:
    made = ("made", Offering({"quantise": ("token_fn",)}), False)
    widths = {device: {p.cell.hidden for p in plan(made, device=device).cells} for device in ("cpu", "cuda")}
    assert 7168 in widths["cuda"] - widths["cpu"]
    assert widths["cpu"] < widths["cuda"]
    for device in ("cpu", "cuda"):
        found = {p.cell.hidden for p in plan(device=device, operators=("token_fn",)).cells}
        assert 7168 not in found, "float64 on the host would take minutes"
    assert 7168 not in {p.cell.hidden for p in plan(made, device="cuda", tier="smoke").cells}


@pytest.mark.parametrize("slots", [row_plan.GATE, row_plan.SMOKE, row_plan.COMPANION, row_plan.HARDWARE])
def test_slots_are_problems(slots: tuple[row_plan.RowSlot, ...]) -> None:
    for slot in slots:
        for size in slot.examples:
            RowCell(
                slot.check, "any", "any", slot.family, size, slot.hidden, slot.capacity, slot.dtype, slot.mode
            ).problem()
            assert (size > 1) == (slot.family is Family.ALLREDUCE_NORM)
    assert {slot.family for slot in slots} == set(CHECKS)


def sized(sizes: tuple[int, ...], *, given: bool, **backends: Offering) -> None:
    """The size check of a run of these backends."""
    made = [(name, each, False) for name, each in backends.items()]
    wanted = replace(options(Path("unused"), "unused"), backends=tuple(backends), ep_sizes=sizes, ep_sizes_given=given)
    controller._check_sizes(wanted, plan(*made, ep_sizes=sizes))


def test_sizes_that_one_of_two_backends_can_do() -> None:
    local = Offering({"quantise": ("token_fn",)})
    pair = Offering({"allreduce_norm": ("fused",)}, {})
    sized((1, 2), given=True, local=local, pair=pair)
    sized((1, 2, 4, 8), given=False, local=local)
    sized((2,), given=True, local=local)  # local operators have no EP size
    refusing = Offering({"allreduce_norm": ("fused",)}, {"fused": "nothing works"})
    with pytest.raises(pytest.UsageError, match="'refusing' cannot do EP 2: nothing works"):
        sized((1, 2), given=True, local=local, refusing=refusing)
    with pytest.raises(pytest.UsageError, match="'refusing' cannot do EP 2: nothing works"):
        sized((2, 4), given=False, refusing=refusing)
