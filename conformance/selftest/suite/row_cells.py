"""Cells, contracts and cases of row operators, spelt out for the tests. Proves nothing by itself."""

from __future__ import annotations

from typing import Any

from accelerated.operators import Family
from accelerated.reference_rows import OPERATORS
from accelerated.registry import backend
from conformance.row_cases import Call, Pattern, RowCase, RowCell
from conformance.row_generation import RowContract
from conformance.suite.kinds import row_contract

CHECKS = {
    Family.QUANTISE: "quantise",
    Family.NORM: "norm",
    Family.ALLREDUCE_NORM: "allreduce_norm",
    Family.ROUTE: "route",
}
NORMAL = Pattern("normal", seed=1)


def family_of(operator: str) -> Family:
    """Family of an operator of the reference."""
    return next(Family(family) for family, names in OPERATORS.items() if operator in names)


def row_cell(operator: str = "token_fn", **changes: Any) -> RowCell:
    """A cell of one of the reference's operators."""
    family = family_of(operator)
    sizes: dict[str, Any] = {
        "check": CHECKS[family],
        "backend": "reference",
        "world_size": 2 if family is Family.ALLREDUCE_NORM else 1,
        "hidden": 256,
        "capacity": 33,
        "dtype": "bfloat16",
        "family": family,
    }
    return RowCell(operator=operator, **{**sizes, **changes})


def contract_of(cell: RowCell) -> RowContract:
    """The contract of a cell."""
    return row_contract(backend(cell.backend).contract(cell.problem(), cell.operator))


def row_case(cell: RowCell | None = None, *calls: Call) -> RowCase:
    """A case, of one call with three rows if no calls are given."""
    return RowCase(cell or row_cell(), calls or (Call(3, (NORMAL,)),))
