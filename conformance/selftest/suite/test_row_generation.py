"""Which cases a cell of a row operator gets: the ladder leaves nothing out, drawn cases mean something.

Scope: conformance/row_generation.py and row_coverage.py. A pass does not prove that these inputs find anything.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, seed, settings

from accelerated.operators import Family, NormContract, QuantContract
from accelerated.registry import backend
from conformance.row_cases import (
    BIASES,
    KINDS,
    LOGIT_KINDS,
    NONFINITE,
    Call,
    Pattern,
    RowCase,
    RowCell,
    validate_rows,
)
from conformance.row_generation import RowContract, ladder, row_cases, takes
from conformance.selftest.suite.row_cells import CHECKS, NORMAL, contract_of, row_case, row_cell
from conformance.selftest.suite.runs import ROOT
from conformance.suite import kinds, row_coverage
from reference.codecs import STANDARD, Granularity

SHARED = [n for n, c in STANDARD.items() if c.granularity in (Granularity.TENSOR, Granularity.BLOCK) and not c.static]
GROUPED = "route.grouped_g8t4k8"
OWN = [n for n in ("token_fn", "group128_fnuz", "mxfp4_even", "tensor_static_fn") if n in STANDARD]


def contract_with(operator: str, **changes: object) -> RowContract:
    return replace(contract_of(row_cell(operator)), **changes)  # type: ignore[arg-type]


def rungs(cell: RowCell, contract: RowContract | None = None) -> list[RowCase]:
    found = list(ladder(cell, contract or contract_of(cell)))
    for case in found:
        validate_rows(case)
    return found


def calls(cases: list[RowCase]) -> Iterator[Call]:
    return (call for case in cases for call in case.calls)


def used(cases: list[RowCase]) -> set[str]:
    return {p.kind for call in calls(cases) for p in call.patterns[: call.rows]}


@pytest.mark.parametrize("operator", [*OWN, *SHARED])
def test_the_ladder_of_a_quantiser_holds_every_kind(operator: str) -> None:
    missing = set(KINDS) - used(rungs(row_cell(operator)))
    assert missing == set(LOGIT_KINDS) | (set(NONFINITE) if operator in SHARED else set())


@pytest.mark.parametrize("operator", ["rms_norm", "rms_norm_add", "fused", "fused_no_residual"])
def test_the_ladder_of_a_norm_holds_every_kind(operator: str) -> None:
    cell = row_cell(operator)
    found = rungs(cell)
    assert used(found) == set(KINDS) - {"every_code", *LOGIT_KINDS}
    wanted = contract_of(cell)
    assert isinstance(wanted, NormContract)
    assert {bool(call.residual) for call in calls(found) if call.rows} == {wanted.residual}


@pytest.mark.parametrize(("operator", "biases"), [("route.softmax_k8", {"ones"}), (GROUPED, set(BIASES))])
def test_the_ladder_of_a_router_holds_every_kind_and_bias(operator: str, biases: set[str]) -> None:
    cell = row_cell(operator)
    found = rungs(cell)
    assert used(found) == set(KINDS) - {"every_code"}
    assert {call.weight for call in calls(found)} == biases
    hit = {c for case in found for c in kinds.classes(case)}
    assert row_coverage.required(cell, empty=True) <= hit
    short = list(ladder(cell, contract_of(cell), short=True))
    special = next(call for call in calls(short) if "all_nan" in {p.kind for p in call.patterns})
    assert [p.kind for p in special.patterns][1::2] == ["normal"] * 8, "an ordinary row after every special one"
    assert {p.kind for p in special.patterns} == {"normal", "zero", "ties", *NONFINITE, *LOGIT_KINDS}
    hit = {c for case in short for c in kinds.classes(case)}
    assert row_coverage.required(cell, empty=True, short=True) <= hit
    assert not row_coverage.required(cell, empty=True) <= hit


@pytest.mark.parametrize("capacity", [1, 2, 3, 4, 33])
@pytest.mark.parametrize("operator", ["token_fn", "fused"])
def test_the_ladder_at_every_capacity(operator: str, capacity: int) -> None:
    found = rungs(row_cell(operator, capacity=capacity))
    assert {call.rows for call in calls(found)} >= {0, 1, capacity}
    assert row_coverage.required(row_cell(operator), empty=True) <= {c for case in found for c in kinds.classes(case)}
    assert len({case.id for case in found}) >= len(found) - 3, "few rungs repeat another"


def test_both_sides_of_every_boundary() -> None:
    for boundaries, capacity in (((16,), 33), ((1, 8, 33), 33), ((32, 33, 34, 500), 33), ((33,), 33)):
        contract = contract_with("fused", boundaries=boundaries)
        found = {call.rows for call in calls(rungs(row_cell("fused"), contract))}
        for boundary in boundaries:
            wanted = {rows for rows in (boundary - 1, boundary, boundary + 1) if rows <= capacity}
            assert wanted <= found, boundary
        assert max(found) == capacity


def test_the_short_ladder_has_the_row_counts_and_no_kinds() -> None:
    contract, cell = contract_with("fused", boundaries=(16,)), row_cell("fused")
    full, short = (list(ladder(cell, contract, short=left_out)) for left_out in (False, True))
    assert used(short) == {"normal", "row_scaled"}
    assert {c.rows for c in calls(short)} == {0, 1, 3, 15, 16, 17, 18, 33} <= {c.rows for c in calls(full)}
    hit = {c for case in short for c in kinds.classes(case)}
    assert row_coverage.required(cell, empty=True, short=True) <= hit
    assert not row_coverage.required(cell, empty=True) <= hit


def test_row_counts_on_the_device() -> None:
    counted = contract_with("token_fn", takes_num_rows=True)
    for capacity, rows in ((33, 9), (5, 5), (1, 1)):
        found = [c for c in calls(rungs(row_cell(capacity=capacity), counted)) if c.num_rows >= 0]
        assert {c.rows for c in found} == {rows}
        assert {c.num_rows for c in found} == {0, 1, rows - 1, rows}
    plain = contract_with("token_fn", takes_num_rows=False)
    assert all(call.num_rows == -1 for call in calls(rungs(row_cell(), plain)))


def test_static_scales_and_buffers() -> None:
    assert {c.scale for c in calls(rungs(row_cell("tensor_static_fn")))} == {1.0, 0.125, 0.37, 3.0}
    assert {c.scale for c in calls(rungs(row_cell("tensor_fn")))} == {1.0}
    given_out = rungs(row_cell(), contract_with("token_fn", takes_out=True))
    (reused,) = (case for case in given_out if any(call.into for call in case.calls))
    assert len(reused.calls) >= 2, "the second call finds what the first one wrote"
    assert not any(call.into for call in calls(rungs(row_cell(), contract_with("token_fn", takes_out=False))))


@pytest.mark.parametrize("operator", ["token_fn", "fused"])
def test_no_empty_call_where_none_is_legal(operator: str) -> None:
    contract = contract_with(operator, takes_empty=False)
    cell = row_cell(operator)
    assert all(call.rows for call in calls([*rungs(cell, contract), *drawn(cell, contract)]))
    assert any(not call.rows for call in calls(drawn(cell, contract_of(cell))))
    required = row_coverage.required(cell, empty=False)
    assert required < row_coverage.required(cell, empty=True)


@pytest.mark.parametrize(("hidden", "capacity"), [(256, 256), (256, 33), (200, 9), (200, 327), (512, 1024)])
def test_the_codecs_ladder_reaches_every_code(hidden: int, capacity: int) -> None:
    cell = row_cell("tensor_static_fn", check="codecs", hidden=hidden, capacity=capacity)
    found = rungs(cell)
    assert [case.calls[0].scale for case in found] == [1.0, 0.125, 0.37, 3.0]
    for case in found:
        starts = {
            hidden * (c.patterns[0].position + row) + e for c in case.calls for row in range(c.rows) for e in (0,)
        }
        covered = {(start + e) % 65536 for start in starts for e in range(hidden)}
        assert len(covered) == 65536
        assert {p.kind for call in case.calls for p in call.patterns} == {"every_code"}
    assert kinds.drawn_parts(cell, contract_of(cell), 5) == []


def drawn(cell: RowCell, contract: RowContract, examples: int = 25) -> list[RowCase]:
    """Cases as the harness would draw them."""
    found: list[RowCase] = []

    @seed(1)
    @settings(max_examples=examples, database=None, deadline=None)
    @given(case=row_cases(cell, contract))
    def one(case: RowCase) -> None:
        found.append(case)

    one()
    return found


CELLS = [
    row_cell("token_fn", mode="free-running"),
    row_cell("tensor_fn", capacity=1),
    row_cell("block128_fn", capacity=130, mode="free-running"),
    row_cell("tensor_static_fn"),
    row_cell("rms_norm_add", mode="free-running"),
    row_cell("fused", world_size=4, mode="free-running"),
    row_cell("fused_group128", capacity=2),
    row_cell(GROUPED, mode="free-running"),
]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.label)
def test_drawn_cases_are_valid_and_mean_something(cell: RowCell) -> None:
    contract = contract_of(cell)
    if isinstance(contract, QuantContract):
        contract = replace(contract, takes_out=True)
    for case in drawn(cell, contract):
        validate_rows(case)
        assert takes(contract, case)
        assert len(case.calls) == 1 if cell.mode == "drained" else 3 <= len(case.calls) <= 8
        if cell.operator in SHARED:
            assert not {p.kind for call in case.calls for p in call.patterns} & set(NONFINITE)


def test_drawn_cases_are_varied() -> None:
    cell = CELLS[5]
    # Many: what is drawn follows from every module that this process has loaded.
    found = drawn(cell, contract_with("fused", boundaries=(20,)), 240)
    every = list(calls(found))
    assert used(found) == set(KINDS) - {"every_code", *LOGIT_KINDS}
    assert {20, 21, 33} <= {call.rows for call in every}
    assert {call.weight for call in every} == {"ones", "twos", "normal"}
    assert {max(call.delays_ms, default=0) for call in every} == {0, 2}
    assert {call.delays_ms.index(2) for call in every if call.delays_ms} == {0, 1, 2, 3}
    routed = drawn(CELLS[7], contract_of(CELLS[7]), 60)
    assert used(routed) == set(KINDS) - {"every_code"}
    assert {call.weight for call in calls(routed)} == set(BIASES)
    counted = list(calls(drawn(CELLS[0], contract_with("token_fn", takes_num_rows=True), 30)))
    assert any(0 <= call.num_rows < call.rows for call in counted)
    assert {call.scale for call in calls(drawn(CELLS[3], contract_of(CELLS[3])))} == {1.0, 0.125, 0.37, 3.0}


@pytest.mark.parametrize(
    ("operator", "change", "call"),
    [
        ("token_fn", {"takes_empty": False}, Call(0, ())),
        ("fused", {"takes_empty": False}, Call(0, ())),
        ("token_fn", {"takes_num_rows": False}, Call(3, (NORMAL,), num_rows=2)),
        ("token_fn", {"takes_out": False}, Call(3, (NORMAL,), into=True)),
        ("tensor_fn", {}, Call(3, (NORMAL, Pattern("nan")))),
        ("block128_fn", {}, Call(3, (NORMAL, Pattern("infinity")))),
        ("token_fn", {}, Call(3, (NORMAL, Pattern("all_nan")))),
        ("fused", {}, Call(3, (NORMAL,), residual=(NORMAL,), weight="negative")),
    ],
)
def test_a_reduction_keeps_to_the_contract(operator: str, change: dict[str, bool], call: Call) -> None:
    """What the contract says nothing about would fail for a reason of its own."""
    case = row_case(row_cell(operator), call)
    assert not takes(contract_with(operator, **change), case)
    assert takes(contract_with(operator, **change), row_case(row_cell(operator)))
    if not change:
        assert not kinds.legal(backend("reference"), case, "gfx942")
        assert kinds.legal(backend("reference"), row_case(row_cell(operator)), "gfx942")


def test_a_reduction_keeps_to_what_is_supported() -> None:
    odd = row_case(row_cell("mxfp4_even", hidden=33))
    assert not kinds.legal(backend("reference"), odd, "gfx942")
    assert not kinds.legal(backend("reference"), row_case(row_cell(world_size=2)), "gfx942"), "no such problem"


DRAW = """
import sys
from hypothesis import given, seed, settings
from conformance.row_generation import row_cases
from conformance.selftest.suite.row_cells import contract_of, row_cell
from conformance.suite.draws import isolate_draws

isolate_draws()
if "noise" in sys.argv:
    import draw_noise
where = row_cell("fused", mode="free-running")

@seed(1)
@settings(max_examples=40, database=None, deadline=None)
@given(case=row_cases(where, contract_of(where)))
def one(case):
    print(case.id)

one()
"""


def test_draws_do_not_depend_on_what_is_loaded_or_set(tmp_path: Path) -> None:
    (tmp_path / "draw_noise.py").write_text("VALUES = " + repr([1000 + 7 * n for n in range(800)]) + "\n")
    found = []
    for words, change in (([], {}), (["noise"], {"CI": "true", "PYTHONHASHSEED": "7"})):
        home = str(tmp_path / "-".join(("home", *words)))
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "HYPOTHESIS_STORAGE_DIRECTORY": home, **change}
        command = [sys.executable, "-c", DRAW, *words]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
        assert done.returncode == 0, done.stderr
        found.append(done.stdout.split())
    assert len(found[0]) >= 40
    assert found[0] == found[1]


def test_the_family_of_a_cell_says_which_test_runs_it() -> None:
    assert {cell.family for cell in CELLS} == set(CHECKS)
    assert set(Family) - set(CHECKS) == {Family.EXPERTS, Family.SORT}, "theirs are cases of layers"
