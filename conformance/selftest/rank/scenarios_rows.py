"""Scenarios of the program of row operators on gloo ranks: the reference passes, each planted defect is named.

Scope: conformance/rank/row_programs.py with the specification's operators, judged by the oracle and by the reference. A
pass says that the two derivations agree on these cases, nothing about a library.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from accelerated import reference_rows
from accelerated.interface import RankContext
from accelerated.operators import Family, NormContract, NormOperation, NormResult
from conformance.engine.protocol import Mismatch
from conformance.rank.row_programs import RowProgram
from conformance.row_cases import Call, Kind, Mode, Pattern, RowCase, RowCell
from conformance.selftest.reference.ranks import World

Spoil = Callable[[int, torch.Tensor, torch.Tensor | None, NormResult], None]
_OPERATORS = reference_rows.OPERATORS[Family.ALLREDUCE_NORM.value]
_NORMAL = Pattern("normal", seed=1)
_JUDGES = ("oracle", "reference")


class _Lying:
    """A norm with a planted defect: what it does with its n-th call's inputs and result."""

    def __init__(self, inner: NormOperation, spoil: Spoil) -> None:
        self._inner, self._spoil, self._number = inner, spoil, 0

    def normalise(
        self, rows: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, epsilon: float
    ) -> NormResult:
        result = self._inner.normalise(rows, residual, weight, epsilon)
        self._spoil(self._number, rows, residual, result)
        self._number += 1
        return result

    def close(self) -> None:
        self._inner.close()


def _nothing(_number: int, _rows: torch.Tensor, _residual: torch.Tensor | None, _result: NormResult) -> None:
    return None


def _cell(world: World, operator: str, mode: Mode = "drained", dtype: str = "bfloat16") -> RowCell:
    family = Family.ALLREDUCE_NORM
    return RowCell("allreduce_norm", "any", operator, family, world.size, 128, 16, dtype, mode)


def _call(rows: int, *kinds: Kind, residual: bool = True, **more: object) -> Call:
    patterns = tuple(Pattern(kind, seed=4) for kind in kinds) or (_NORMAL,)
    added = (Pattern("normal", seed=6),) if residual else ()
    return Call(rows, patterns, residual=added, weight="normal", **more)  # type: ignore[arg-type]


def _run(
    world: World, case: RowCase, judged_by: str, spoil: Spoil = _nothing, **contract: object
) -> tuple[Mismatch | None, float]:
    cell = case.cell
    context = RankContext(world.rank, world.size, torch.device("cpu"), world.group, "gfx942")
    declared = reference_rows.contract(cell.problem(), cell.operator)
    assert isinstance(declared, NormContract)
    built = reference_rows.build(context, cell.problem(), cell.operator)
    assert isinstance(built, reference_rows.ReferenceNorm)
    operation = _Lying(built, spoil)
    program = RowProgram(context, operation, replace(declared, **contract), judged_by, cell)  # type: ignore[arg-type]
    return program.run(case, lambda _name, _index: None)


def _everywhere(world: World, case: RowCase, spoil: Spoil, check: str) -> Mismatch:
    """Every rank must find the same."""
    for judged_by in _JUDGES:
        mismatch, _ = _run(world, case, judged_by, spoil)
        assert mismatch is not None, judged_by
        assert mismatch.check == check, mismatch.text()
    assert mismatch is not None
    return mismatch


def _flip(tensor: torch.Tensor | None, row: int, element: int) -> None:
    """Change the last bit of an element."""
    assert tensor is not None
    tensor.view(torch.int16)[row, element] ^= 1


def reference_agrees_with_both(world: World) -> None:
    kinds: tuple[Kind, ...] = ("normal", "zero", "wide", "huge", "nan", "integers", "ties", "subnormal")
    for operator in _OPERATORS:
        residual = operator != "fused_no_residual"
        calls = (_call(9, *kinds, residual=residual), Call(0, ()), _call(1, residual=residual))
        for mode in ("drained", "free-running"):
            for judged_by in _JUDGES:
                mismatch, ratio = _run(world, RowCase(_cell(world, operator, mode), calls), judged_by)
                assert mismatch is None, (operator, judged_by, mismatch.text())
                assert ratio <= 1
    for dtype in ("float16", "float32"):
        mismatch, _ = _run(world, RowCase(_cell(world, "fused", dtype=dtype), (_call(5),)), "oracle")
        assert mismatch is None, mismatch.text()


def a_late_rank_changes_nothing(world: World) -> None:
    late = tuple(2 if rank == world.size - 1 else 0 for rank in range(world.size))
    case = RowCase(_cell(world, "fused", "free-running"), tuple(_call(n, delays_ms=late) for n in (3, 16, 1)))
    assert _run(world, case, "oracle")[0] is None


def a_changed_input_is_named(world: World) -> None:
    case = RowCase(_cell(world, "fused"), (_call(4), _call(4)))
    for name in ("rows", "residual"):

        def spoil(
            number: int, rows: torch.Tensor, residual: torch.Tensor | None, _: NormResult, name: str = name
        ) -> None:
            if number == 1:
                _flip(rows if name == "rows" else residual, 3, 127)

        found = _everywhere(world, case, spoil, "inputs.modified")
        assert found.round == 1
        assert name in found.message
        mismatch, _ = _run(world, case, "oracle", spoil, in_place=True)
        assert mismatch is None, "an operator in place may"


def what_one_rank_finds_leaves_no_other_waiting(world: World) -> None:
    """The first rank stops at its first call; the others have two more to judge."""

    def spoil(number: int, rows: torch.Tensor, _residual: torch.Tensor | None, _result: NormResult) -> None:
        if number == 0 and world.rank == 0:
            _flip(rows, 0, 0)

    for mode in ("drained", "free-running"):
        mismatch, _ = _run(world, RowCase(_cell(world, "fused", mode), (_call(4),) * 3), "reference", spoil)
        assert (mismatch is not None) == (world.rank == 0)
        assert mismatch is None or mismatch.check == "inputs.modified"


def a_result_that_a_later_call_overwrites_is_named(world: World) -> None:
    for mode in ("drained", "free-running"):
        for name in ("output", "residual"):
            held: list[torch.Tensor] = []

            def spoil(
                number: int,
                _rows: torch.Tensor,
                _residual: torch.Tensor | None,
                result: NormResult,
                name: str = name,
                held: list[torch.Tensor] = held,
            ) -> None:
                tensor = getattr(result, name)
                if held:
                    held[0].copy_(tensor)  # one buffer for all calls
                    setattr(result, name, held[0])
                else:
                    held.append(tensor)

            calls = (_call(4), _of_kind(_call(4), "wide"))
            mismatch, _ = _run(world, RowCase(_cell(world, "fused", mode), calls), "reference", spoil)
            assert mismatch is not None
            assert (mismatch.check, mismatch.round) == ("outputs.overwritten", 0), mismatch.text()
            assert name in mismatch.message


def _of_kind(call: Call, kind: Kind) -> Call:
    """The call with rows of one kind."""
    return Call(call.rows, (Pattern(kind, seed=5),), residual=call.residual, weight=call.weight)


def ranks_that_differ_are_named(world: World) -> None:
    """Within every bound: two equal results exchanged, or one last bit."""
    if world.size == 1:
        return
    last = world.size - 1

    def swap(number: int, _rows: torch.Tensor, _residual: torch.Tensor | None, result: NormResult) -> None:
        assert result.output is not None
        if number == 1 and world.rank == last:
            result.output[2, :2] = result.output[2, :2].flip(0)

    def flip(number: int, _rows: torch.Tensor, _residual: torch.Tensor | None, result: NormResult) -> None:
        if number == 1 and world.rank == last:
            _flip(result.residual, 3, 127)

    def bits(number: int, _rows: torch.Tensor, _residual: torch.Tensor | None, result: NormResult) -> None:
        if number == 1 and world.rank == last and result.quantised is not None:
            result.quantised.codes[0, 0] ^= 0x80

    for operator, spoil, name in (
        ("fused", swap, "output"),
        ("fused", flip, "residual"),
        ("split_token", bits, "codes"),
    ):
        case = RowCase(_cell(world, operator), (_call(4),) * 3)
        found = _everywhere(world, case, spoil, "norm.ranks")
        assert (found.round, found.source_rank) == (1, last)
        assert found.message.startswith(name), found.message
    mismatch, _ = _run(world, RowCase(_cell(world, "fused"), (_call(4),) * 3), "reference", flip, ranks_identical=False)
    assert (mismatch is not None) == (world.rank == last), "where ranks may differ, each judges all of its own"


def every_row_is_judged_by_one_rank(world: World) -> None:
    """The same wrong element on every rank: exactly one of them names it, by the row's number in the call."""
    for judged_by in _JUDGES:
        for row in range(9):

            def spoil(
                _number: int, _rows: torch.Tensor, _residual: torch.Tensor | None, result: NormResult, row: int = row
            ) -> None:
                assert result.residual is not None
                result.residual[row, 7] += 100

            mismatch, _ = _run(world, RowCase(_cell(world, "fused"), (_call(9),)), judged_by, spoil)
            assert (mismatch is not None) == (row % world.size == world.rank)
            if mismatch is not None:
                assert (mismatch.check, mismatch.token, mismatch.element) == ("norm.residual", row, 7)


def another_ranks_rows_missing_is_named(world: World) -> None:
    """The operator forgets the last rank's rows; alike on all ranks."""
    if world.size == 1:
        return

    class Forgetful(reference_rows.ReferenceNorm):
        def normalise(
            self, rows: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, epsilon: float
        ) -> NormResult:
            mine = rows if world.rank < world.size - 1 else torch.zeros_like(rows)
            return super().normalise(mine, residual, weight, epsilon)

    cell = _cell(world, "fused")
    context = RankContext(world.rank, world.size, torch.device("cpu"), world.group, "gfx942")
    contract = reference_rows.contract(cell.problem(), "fused")
    operation = Forgetful(context, reference_rows._REDUCED["fused"], local=False)
    for judged_by in _JUDGES:
        program = RowProgram(context, operation, contract, judged_by, cell)
        mismatch, _ = program.run(RowCase(cell, (_call(8),)), lambda _name, _index: None)
        assert mismatch is not None
        assert mismatch.check == "norm.residual"


def a_missing_tensor_on_one_rank_is_named(world: World) -> None:
    """The digests of results that are not there are exchanged as well."""
    if world.size == 1:
        return

    def drop(_number: int, _rows: torch.Tensor, _residual: torch.Tensor | None, result: NormResult) -> None:
        if world.rank == 0:
            result.residual = None

    found = _everywhere(world, RowCase(_cell(world, "fused"), (_call(4),)), drop, "norm.ranks")
    assert found.message.startswith("residual of rank 1")
