"""The plan of wires, codecs and modes: every pair that runs is there, and what does not run is said.

Scope: conformance/suite/call_plan.py and call_matrix.py. A pass does not prove that the cases of a cell are good.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from accelerated.contract import Standing
from accelerated.interface import Backend
from accelerated.registry import backend
from conformance.cases import Cell
from conformance.suite.call_matrix import CHOICES, covered, main, newest, refusals, show
from conformance.suite.call_plan import CODECS, DTYPES, SHAPES, WAYS, WIRES, Choice, call_cells, covering, pairs_of
from conformance.suite.cells import PlannedCell, Unsupported
from conformance.suite.records import CellRecord, EndRecord, Record, RecordWriter, RunRecord
from conformance.verdicts import Verdict
from reference.catalogue import KERNEL_TYPES
from reference.problem import ProblemError

#: Four nodes as of a launched world: more than the slots of the plainest layer.
PLACES = [(2, 1), (2, 2), (4, 1), (4, 2), (8, 1), (8, 2), (8, 4)]


def planned(
    arch: str = "gfx942", tier: str = "gate", name: str = "mori-standin"
) -> tuple[list[Cell], list[Unsupported]]:
    made = backend(name, arch)
    found = list(call_cells(name, made, companion=False, tier=tier, kernel_types=made.kernel_types, topologies=PLACES))
    cells = [one.cell for one in found if isinstance(one, PlannedCell) and isinstance(one.cell, Cell)]
    return cells, [one for one in found if isinstance(one, Unsupported)]


def runs(choice: Choice, made: Backend) -> bool:
    try:
        problem = choice.cell("mori-standin").problem()
    except ProblemError:
        return False
    return made.support(problem, choice.kernel_type).standing is not Standing.REFUSED


def values_of(cell: Cell) -> dict[str, object]:
    return {name: value(cell) for name, value in CHOICES.items()}


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_every_pair_that_runs_occurs(arch: str) -> None:
    """Against every combination of two choices with the others plain, on the first sizes on which it runs.

    Codecs count only where they are carried out.
    """
    made = backend("mori-standin", arch)
    cells, _ = planned(arch)
    seen = set()
    for cell in cells:
        idle = made.contract(cell.problem(), cell.kernel_type).ignored_codec is not None
        pairs = combinations(values_of(cell).items(), 2)
        seen |= {pair for pair in pairs if not idle or "codec" not in (pair[0][0], pair[1][0])}
    for kernel_type, place in product(KERNEL_TYPES, PLACES):
        for left, right in combinations((("wire", WIRES), ("codec", CODECS), ("way", WAYS), ("dtype", DTYPES)), 2):
            for one, other in product(left[1], right[1]):
                named: dict[str, Any] = {left[0]: one, right[0]: other}
                shaped = [Choice(kernel_type, place, shape=shape, **named) for shape in SHAPES]
                choice = next((choice for choice in shaped if runs(choice, made)), None)
                if choice is None or not choice.special:
                    continue
                cell = choice.cell("mori-standin")
                if made.contract(cell.problem(), kernel_type).ignored_codec:
                    continue
                held = values_of(cell)
                names = {"wire": "wire", "codec": "codec", "way": "mode", "dtype": "combined in"}
                chosen = [names[field] for field, value in ((left[0], one), (right[0], other)) if value != ""]
                for pair in combinations([name for name in held if name in (*chosen, "kernel type", "EP x nodes")], 2):
                    assert tuple((name, held[name]) for name in pair) in seen, (choice, pair)


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_what_is_claimed_alone_is_in_a_claimed_cell(arch: str) -> None:
    """A broken routing handle must gate, though most cells that have one combine it with something unclaimed."""
    made = backend("mori-standin", arch)
    seen = {
        (cell.kernel_type, name, value)
        for cell in planned(arch)[0]
        if made.support(cell.problem(), cell.kernel_type).standing is Standing.CLAIMED
        for name, value in values_of(cell).items()
    }
    wanted = set()
    for kernel_type, place, (field, values) in product(
        KERNEL_TYPES, PLACES, (("wire", WIRES), ("codec", CODECS), ("way", WAYS))
    ):
        for value in values[1:]:
            alone: dict[str, Any] = {field: value}
            cell = Choice(kernel_type, place, **alone).cell("mori-standin")
            if made.support(cell.problem(), kernel_type).standing is Standing.CLAIMED:
                name = {"wire": "wire", "codec": "codec", "way": "mode"}[field]
                wanted.add((kernel_type, name, value))
    assert ("InterNodeV1", "mode", "handle") in wanted
    assert wanted <= seen, sorted(wanted - seen)


def test_codecs_that_are_ignored_are_watched_where_they_are() -> None:
    made = backend("mori-standin", "gfx942")
    ignored = {
        (cell.kernel_type, cell.modes)
        for cell in planned()[0]
        if cell.codec and made.contract(cell.problem(), cell.kernel_type).ignored_codec
    }
    assert ("InterNode", ("zero-copy",)) not in ignored
    assert {kernel_type for kernel_type, _ in ignored} >= {"InterNode"}
    assert any(modes == ("zero-copy",) for _, modes in ignored)


@pytest.mark.parametrize("tier", ["smoke", "gate", "explore"])
def test_labels_are_distinct_and_the_order_is_fixed(tier: str) -> None:
    cells, _ = planned("gfx950", tier)
    labels = [cell.label for cell in cells]
    assert len(set(labels)) == len(labels)
    assert labels == [cell.label for cell in planned("gfx950", tier)[0]]


def test_a_short_run_meets_what_the_default_architecture_lacks() -> None:
    assert planned("gfx942", "smoke")[0] == []
    assert {cell.codec for cell in planned("gfx950", "smoke")[0]} == {"fp4_blockwise"}


def test_pairs_occur_as_often_as_is_asked_for() -> None:
    values: dict[str, Sequence[Any]] = {"wire": WIRES, "codec": CODECS[:2], "way": ("", "capped"), "shape": SHAPES[:2]}
    fixed: dict[str, Sequence[Any]] = {"kernel_type": ("IntraNode",), "place": ((2, 1),)}
    for times in (1, 2):
        found = covering(values | fixed, (lambda _: True,), times)
        assert len(set(found)) == len(found)
        special = [pair for choice in found for pair in pairs_of(choice, values, lambda _: False)]
        for first, second in combinations(values, 2):
            for one, other in product(values[first], values[second]):
                if "" not in (one, other):
                    assert special.count(((first, one), (second, other))) >= times


def test_refusals_name_their_reason_once() -> None:
    _, refused = planned()
    reasons = {(one.kernel_type, one.reason.partition(":")[0]) for one in refused}
    assert ("IntraNode", "handle") in reasons
    assert {("InterNodeV1", "weightless"), ("AsyncLL", "zero-copy"), ("InterNodeV1", "fp8_blockwise")} <= reasons
    assert ("IntraNode", "capped") in reasons
    assert {one.manner for one in refused if one.nodes == 4 and one.kernel_type == "InterNodeV1"} >= {"zero-copy"}
    assert len({(one.kernel_type, one.world_size, one.nodes, one.reason) for one in refused}) == len(refused)
    assert all(len(one.reason) > 20 for one in refused)


def test_the_matrix_counts_distinct_cases() -> None:
    cells = planned()[0][:3]
    places = ({"backend": "b", "kernel_type": "IntraNode", "world_size": 2, "nodes": 1, "reason": "handle: no"},)
    records: list[Record] = [RunRecord("0", "gate", ("b",), (), "cpu", "gfx942", {}, (), places)]
    for cell in cells:
        records.append(CellRecord(cell.label, cell, Verdict.PASS, True, False, 2, 2, 0.0, 0.0))
        records += [EndRecord(n, cell.label, "generated", Verdict.PASS, "", 0.0, 0.0, 1) for n in ("one", "two", "two")]
        records.append(EndRecord("three", cell.label, "reduction", Verdict.PASS, "", 0.0, 0.0, 1))
        records.append(EndRecord("four", cell.label, "generated", Verdict.INFRA, "", 0.0, 0.0, 1))
    counts = covered(records)["kernel type", "mode"]
    assert {key: len(ids) for key, ids in counts.items()} == {
        (cell.kernel_type, ", ".join(cell.modes) or "plain"): 2 for cell in cells
    }
    assert refusals(records) == {("IntraNode", "handle: no"): ["2 x 1"]}
    console = Console(record=True, width=200, quiet=True)
    show(records, console)


def test_the_newest_run_that_planned_cells_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    parent = tmp_path / ".conformance" / "records"
    assert main([]) == 1
    assert f"no records at {parent}, of a run that planned cells" in capsys.readouterr().err
    (cell, *_), _ = planned()
    for number, labels in enumerate([(cell.label,), ()]):
        (parent / str(number)).mkdir(parents=True)
        writer = RecordWriter(parent / str(number) / "controller.jsonl")
        writer.write(RunRecord("0", "gate", ("b",), (), "cpu", "gfx942", {}, labels, ()))
        writer.write(CellRecord(cell.label, cell, Verdict.PASS, True, False, 1, 1, 0.0, 0.0))
        writer.write(EndRecord("one", cell.label, "generated", Verdict.PASS, "", 0.0, 0.0, 1))
        writer.close()
    assert newest(parent) == parent / "0", "a matrix of capabilities is no run"
    assert main([]) == 0
    assert cell.kernel_type in capsys.readouterr().out
