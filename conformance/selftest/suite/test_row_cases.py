"""Cases of row operators as files: they come back as they were, and what describes no input is refused by name.

Scope: conformance/row_cases.py and its share of conformance/cases.py. A pass proves nothing about what the cases find.
"""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from accelerated.operators import Family
from conformance.case_files import decode
from conformance.cases import Case, CaseError, encode
from conformance.row_cases import KINDS, MAX_ROWS, Call, Pattern, RowCase, RowCaseError, validate_rows
from conformance.selftest.engine import helpers
from conformance.selftest.suite.row_cells import NORMAL, row_case, row_cell
from conformance.suite.controller import CORPUS
from conformance.suite.describe import describe
from reference.problem import ProblemError

#: Every field away from its default.
FULL = RowCase(
    row_cell("fused", mode="free-running", dtype="float16"),
    (
        Call(
            7,
            tuple(Pattern(kind, exponent=-3, position=11, seed=2**20 - 1) for kind in KINDS),
            residual=(Pattern("wide", 7, 1, 9),),
            num_rows=5,
            scale=0.37,
            weight="normal",
            epsilon=0.01,
            into=True,
            delays_ms=(0, 2),
        ),
        Call(0, ()),
    ),
)


def changed(**call: Any) -> RowCase:
    """A case whose only call differs from a valid one."""
    return row_case(row_cell(), msgspec.structs.replace(Call(3, (NORMAL,)), **call))


@pytest.mark.parametrize("case", [FULL, row_case()], ids=["full", "plain"])
def test_a_case_survives_its_file(case: RowCase) -> None:
    back = decode(encode(case), "there")
    assert back == case
    assert isinstance(back, RowCase)
    assert back.cell.family is case.cell.family
    assert back.id == case.id


def test_every_field_is_in_the_file() -> None:
    plain = {**vars_of(Call(1, (NORMAL,))), **vars_of(NORMAL)}
    used = {**vars_of(FULL.calls[0]), **vars_of(FULL.calls[0].patterns[1])}
    assert not [name for name in plain if used[name] == plain[name]], "the case above leaves no field at its default"


def vars_of(struct: msgspec.Struct) -> dict[str, Any]:
    return {name: getattr(struct, name) for name in struct.__struct_fields__}


def test_the_id_is_the_contents() -> None:
    """Ids name recorded failures: this one may change only together with the format of the file."""
    assert row_case().id == row_case().id == "a03a97f51f9c"
    others = {changed(**{name: value}).id for name, value in {"rows": 4, "scale": 2.0, "into": True}.items()}
    assert len({*others, row_case().id, row_case(row_cell("token_fnuz")).id}) == 5


def test_both_kinds_of_case_are_told_apart() -> None:
    exchange = helpers.case(helpers.cell())
    assert isinstance(decode(encode(exchange), "there"), Case)
    for case, other in ((exchange, b"rows"), (row_case(), b"exchange")):
        tag = b'"type":"' + (b"rows" if other == b"exchange" else b"exchange") + b'"'
        text = encode(case)
        assert text.count(tag) == 2, "the case and its cell"
        for place in (1, 2):
            with pytest.raises(CaseError, match="there is not a valid case"):
                decode(swapped(text, tag, b'"type":"' + other + b'"', place), "there")


def swapped(text: bytes, old: bytes, new: bytes, number: int) -> bytes:
    """Replace one occurrence."""
    parts = text.split(old)
    return old.join(parts[:number]) + new + old.join(parts[number:])


def test_recorded_cases_still_read() -> None:
    found = [decode(path.read_bytes(), path.name) for path in sorted(CORPUS.glob("*.json"))]
    assert len(found) >= 8


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"rows": 34}, ("call 0", "34 rows", "capacity, 33")),
        ({"rows": -1}, ("-1 rows", "0 to the capacity")),
        ({"patterns": ()}, ("3 rows and no pattern", "at least one")),
        ({"num_rows": 4}, ("num_rows 4", "0 to 3")),
        ({"num_rows": -2}, ("num_rows -2", "-1 for none")),
        ({"scale": 0.0}, ("scale 0.0", "positive scale")),
        ({"scale": 2.0**100}, ("scale 1.26", "below 2**100")),
        ({"scale": float("nan")}, ("scale nan",)),
        ({"epsilon": 2.0**-127}, ("epsilon 5.8", "2**-126")),
        ({"epsilon": 1.0}, ("epsilon 1.0", "to 1")),
        ({"delays_ms": (1, 2)}, ("2 delays", "one per rank")),
        ({"patterns": (Pattern("ones", exponent=101),)}, ("exponent=101", "-100 to 100")),
        ({"patterns": (Pattern("ones", position=-1),)}, ("position=-1", "from 0")),
        ({"residual": (Pattern("ones", seed=-1),)}, ("seed=-1", "from 0")),
    ],
)
def test_a_call_that_its_cell_cannot_hold(change: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(RowCaseError) as caught:
        validate_rows(changed(**change))
    assert all(part in str(caught.value) for part in parts), caught.value
    with pytest.raises(CaseError, match="there is not a valid case"):
        decode(encode(changed(**change)), "there")


@pytest.mark.parametrize("change", [{"rows": 33}, {"rows": 0, "patterns": ()}, {"num_rows": 3}, {"num_rows": 0}])
def test_the_limits_themselves_are_valid(change: dict[str, Any]) -> None:
    validate_rows(changed(**change))


def test_a_cell_that_is_no_problem() -> None:
    for change in ({"hidden": 0}, {"dtype": "int8"}, {"world_size": 2}, {"capacity": 0}):
        with pytest.raises(ProblemError, match=next(iter(change))):
            validate_rows(row_case(row_cell(**change)))
    with pytest.raises(RowCaseError, match="0 calls"):
        validate_rows(RowCase(row_cell(), ()))
    with pytest.raises(RowCaseError, match="257 calls"):
        validate_rows(RowCase(row_cell(), (Call(0, ()),) * 257))
    too_many = RowCase(row_cell(capacity=MAX_ROWS + 2), (Call(MAX_ROWS + 1, (NORMAL,)),))
    with pytest.raises(RowCaseError, match="rows"):
        validate_rows(too_many)


def test_sizes_and_words() -> None:
    assert (FULL.steps, FULL.tokens) == (2, 14)
    assert FULL.cell.problem().family is Family.ALLREDUCE_NORM
    text = "\n".join(describe(FULL))
    named = ("fused on 2 rank(s)", "256 float16", "num_rows 5", "scale 0.37", "weight normal", "epsilon 0.01")
    assert all(part in text for part in (*named, "delays [0, 2] ms", "residual wide x 2**7, position 1, seed 9"))
    assert all(f"rows {kind} x" in text for kind in KINDS)
