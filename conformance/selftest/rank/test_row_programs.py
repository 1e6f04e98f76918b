"""The program of row operators: norms on 1, 2 and 4 gloo ranks, quantisers in this process.

Scope: see the scenario module; all its scenarios run in one spawn per number of ranks. The quantisers here are the
specification's with a planted defect. A pass proves nothing about devices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from accelerated import reference_rows
from accelerated.interface import RankContext
from accelerated.operators import QuantContract, QuantResult
from conformance.engine.protocol import Mismatch
from conformance.rank.row_programs import RowProgram, tensors_of
from conformance.row_cases import Call, Mode, Pattern, RowCase, RowCell
from conformance.selftest.rank import scenarios_rows
from conformance.selftest.reference import ranks
from conformance.selftest.suite.row_cells import NORMAL, row_cell
from reference.codecs import STANDARD
from reference.quantisation import accepted_values
from reference.rounding import encode

MODULE = scenarios_rows.__name__


@pytest.mark.parametrize("size", [4, 2, 1])
def test_scenarios(size: int, tmp_path: Path) -> None:
    problems = ranks.failures(ranks.run(size, [MODULE], tmp_path), [MODULE])
    assert not problems, problems


def test_inventory_is_complete() -> None:
    assert len(ranks.scenarios_of(MODULE)) == 9


class Quantiser:
    """The specification's quantiser; writes to buffers of ours, and does something to what it is given and returns."""

    def __init__(self, cell: RowCell, spoil: Callable[[int, torch.Tensor, QuantResult], None]) -> None:
        context: Any = None
        built = reference_rows.build(context, cell.problem(), cell.operator)
        assert isinstance(built, reference_rows.ReferenceQuantiser)
        self._inner, self._spoil, self._number = built, spoil, 0

    def quantise(self, rows: torch.Tensor, *, out: QuantResult | None = None, **given: Any) -> QuantResult:
        result = self._inner.quantise(rows, **given)
        if out is not None:
            out.codes.copy_(result.codes)
            out.scales.copy_(result.scales)
            result = out
        self._spoil(self._number, rows, result)
        self._number += 1
        return result

    def close(self) -> None:
        return None


def nothing(number: int, rows: torch.Tensor, result: QuantResult) -> None:
    return None


def run(
    cell: RowCell,
    *calls: Call,
    spoil: Callable[[int, torch.Tensor, QuantResult], None] = nothing,
    judged_by: str = "reference",
) -> Mismatch | None:
    contract = reference_rows.contract(cell.problem(), cell.operator)
    assert isinstance(contract, QuantContract)
    context = RankContext(0, 1, torch.device("cpu"), None, "gfx942")  # type: ignore[arg-type]
    program = RowProgram(context, Quantiser(cell, spoil), replace(contract, takes_out=True), judged_by, cell)
    return program.run(RowCase(cell, calls), lambda _name, _index: None)[0]


EVERYTHING = (
    Call(5, (NORMAL, Pattern("zero"), Pattern("wide"), Pattern("ties"))),
    Call(0, ()),
    Call(9, (NORMAL,), num_rows=4),
    Call(9, (NORMAL,), num_rows=0),
    Call(5, (Pattern("normal", exponent=7),), into=True),
    Call(5, (Pattern("normal", exponent=-3),), into=True),
)


@pytest.mark.parametrize("mode", ["drained", "free-running"])
@pytest.mark.parametrize("operator", ["token_fn", "group128_fnuz", "mxfp4_even", "ue8m0_fn"])
def test_the_specification_passes(operator: str, mode: Mode) -> None:
    for judged_by in ("reference", "oracle"):
        assert run(row_cell(operator, mode=mode), *EVERYTHING, judged_by=judged_by) is None


@pytest.mark.parametrize("operator", ["tensor_fn", "tensor_static_fn", "block128_fn"])
def test_one_scale_for_many_rows(operator: str) -> None:
    static = operator == "tensor_static_fn"
    call = Call(5, (NORMAL, Pattern("wide")), scale=0.37 if static else 1.0)
    assert run(row_cell(operator), call, Call(5, (NORMAL,), into=True)) is None


def test_rows_beyond_the_count_hold_poison_and_are_not_judged() -> None:
    seen = []

    def spoil(number: int, rows: torch.Tensor, result: QuantResult) -> None:
        seen.append(rows[4:].clone())
        result.codes[4:] = 0x7F

    assert run(row_cell(), Call(9, (NORMAL,), num_rows=4), spoil=spoil) is None
    assert bool(seen[0][0::2].isnan().all())
    assert bool((seen[0][1::2].float() > 9e29).all())


def found(mismatch: Mismatch | None, check: str, call: int) -> str:
    assert mismatch is not None
    assert (mismatch.check, mismatch.round) == (check, call), mismatch.text()
    return mismatch.message


TWICE = (Call(4, (NORMAL,)), Call(4, (Pattern("wide"),)))


def test_a_changed_input() -> None:
    def spoil(number: int, rows: torch.Tensor, result: QuantResult) -> None:
        rows.view(torch.int16)[3, 255] ^= number

    assert "rows" in found(run(row_cell(), *TWICE, spoil=spoil), "inputs.modified", 1)


def test_poison_that_is_changed_counts_as_input() -> None:
    def spoil(number: int, rows: torch.Tensor, result: QuantResult) -> None:
        rows[-1] = 0

    call = Call(9, (NORMAL,), num_rows=4)
    assert "rows" in found(run(row_cell(), call, spoil=spoil), "inputs.modified", 0)


@pytest.mark.parametrize("name", ["codes", "scales"])
def test_a_result_that_a_later_call_overwrites(name: str) -> None:
    held: list[torch.Tensor] = []

    def spoil(number: int, rows: torch.Tensor, result: QuantResult) -> None:
        held.append(tensors_of(result)[name])
        if number:
            held[0].copy_(held[1])

    assert name in found(run(row_cell(), *TWICE, spoil=spoil), "outputs.overwritten", 0)


@pytest.mark.parametrize("name", ["codes", "scales"])
def test_a_write_behind_a_buffer(name: str) -> None:
    def spoil(number: int, rows: torch.Tensor, result: QuantResult) -> None:
        tensor = tensors_of(result)[name]
        beyond = tensor.as_strided((tensor.numel() + 1,), (1,))
        beyond[-1] = 7

    calls = (Call(4, (NORMAL,), into=True),)
    assert name in found(run(row_cell(), *calls, spoil=spoil), "outputs.guard", 0)


def test_a_quantiser_that_adds_to_what_lies_in_the_buffer() -> None:
    """Its result is right in a new buffer and wrong in one that was used."""

    class Accumulating(Quantiser):
        def quantise(self, rows: torch.Tensor, *, out: QuantResult | None = None, **given: Any) -> QuantResult:
            before = None if out is None else out.scales.clone()
            result = super().quantise(rows, out=out, **given)
            if before is not None and bool(before.isfinite().all()) and bool((before > result.scales).any()):
                result.scales.copy_(torch.maximum(before, result.scales))
            return result

    cell = row_cell()
    contract = reference_rows.contract(cell.problem(), cell.operator)
    assert isinstance(contract, QuantContract)
    context = RankContext(0, 1, torch.device("cpu"), None, "gfx942")  # type: ignore[arg-type]
    program = RowProgram(context, Accumulating(cell, nothing), replace(contract, takes_out=True), "reference", cell)
    calls = (
        Call(4, (Pattern("normal", exponent=9),), into=True),
        Call(4, (Pattern("normal", exponent=-9),), into=True),
    )
    found(program.run(RowCase(cell, calls), lambda _name, _index: None)[0], "quantise.scales", 1)


def test_a_quantiser_that_leaves_the_buffers_alone() -> None:
    class Elsewhere(Quantiser):
        def quantise(self, rows: torch.Tensor, *, out: QuantResult | None = None, **given: Any) -> QuantResult:
            return super().quantise(rows, **given)

    cell = row_cell()
    contract = reference_rows.contract(cell.problem(), cell.operator)
    assert isinstance(contract, QuantContract)
    context = RankContext(0, 1, torch.device("cpu"), None, "gfx942")  # type: ignore[arg-type]
    program = RowProgram(context, Elsewhere(cell, nothing), replace(contract, takes_out=True), "reference", cell)
    mismatch, _ = program.run(RowCase(cell, (Call(4, (NORMAL,), into=True),)), lambda _name, _index: None)
    found(mismatch, "quantise.scales", 0)


def test_a_wrong_code_is_named_with_its_call() -> None:
    def spoil(number: int, rows: torch.Tensor, result: QuantResult) -> None:
        if number == 1:
            result.codes[2, 9] ^= 1

    mismatch = run(row_cell(), *TWICE, spoil=spoil)
    found(mismatch, "quantise.codes", 1)
    assert mismatch is not None
    assert (mismatch.token, mismatch.element) == (2, 9)


class Undecided(Quantiser):
    """Takes the upper end of what an approximate reciprocal allows when there are four rows, else the lower one."""

    codec = STANDARD["token_hip_fnuz"]

    def quantise(self, rows: torch.Tensor, *, out: QuantResult | None = None, **given: Any) -> QuantResult:
        result = super().quantise(rows, **given)
        accepted = accepted_values(rows, result.scales.double(), self.codec)
        result.codes = encode(accepted.upper if rows.shape[0] == 4 else accepted.lower, self.codec.payload).byte()
        return result


def test_codes_that_depend_on_the_number_of_rows() -> None:
    cell = row_cell("token_hip_fnuz")
    context = RankContext(0, 1, torch.device("cpu"), None, "gfx942")  # type: ignore[arg-type]
    program = RowProgram(context, Undecided(cell, nothing), QuantContract(Undecided.codec), "reference", cell)
    ties = Pattern("ties")
    for rows, wrong in ((3, False), (4, True), (5, False)):
        mismatch, _ = program.run(RowCase(cell, (Call(rows, (ties,)),)), lambda _name, _index: None)
        assert (mismatch is not None) == wrong
        if mismatch is not None:
            assert "among 4 than among 2" in found(mismatch, "quantise.row_count", 0)
