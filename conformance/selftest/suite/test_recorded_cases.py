"""A recorded case that its cell or its backend cannot take is refused with the reason, before any rank starts.

Scope: conformance/case_files.py and the controller's refusals, in this process. That a case is not refused does not
prove that it passes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from conformance.case_files import decode
from conformance.cases import Case, CaseError, Cell, Explicit, Recipe, Round, Rows, encode
from conformance.selftest.suite.test_harness import options
from conformance.suite import controller

CELL = Cell("round_trip", "mori-standin", "IntraNode", 2, 1, 64, 4, 2, 4, "bfloat16", "drained")
ROWS: Rows = (((0, 2),), ((1, 3),))
IDLE: Rows = (((0, 2),), ())
MASKED: Rows = (((0, 2), (-1, 3)), ((1, 3),))
ACROSS: dict[str, Any] = {"kernel_type": "InterNodeV1LL", "world_size": 4, "nodes": 2}


def recorded(rows: Rows = ROWS, a_round: Round | None = None, **cell: object) -> bytes:
    given = msgspec.structs.replace(CELL, **cell)  # type: ignore[arg-type]
    return encode(Case(given, (a_round or Round(Explicit(rows)),)))


@pytest.mark.parametrize(
    ("values", "cell", "told"),
    [
        ("bits", {"codec": "fp8_blockwise", "scale_dim": 4}, "NaN and infinities have no code"),
        ("bits", {"codec": "fp8_direct_cast"}, "round 0 has values 'bits' and combine codes rows as fp8_direct_cast"),
        ("bits", {"codec": "fp8_direct_cast", "wire": "fp8_token"}, ""),  # codes, which stand for other elements
        ("edges", {"codec": "fp8_blockwise", "scale_dim": 4}, ""),
        ("bits", {}, ""),
        ("integers", {"wire": f"fp8_raw{'9' * 30}x4"}, "n below 10"),
        ("integers", {"wire": "fp8_raw65x4"}, "65 scales for rows of 64 elements"),
        ("integers", {"wire": "fp8_raw3x4"}, ""),
    ],
)
def test_what_no_rank_could_make_of_a_file(values: str, cell: dict[str, object], told: str) -> None:
    data = recorded(a_round=Round(Explicit(ROWS), values), **cell)  # type: ignore[arg-type]
    if not told:
        assert decode(data, "case.json").cell.backend == CELL.backend
        return
    with pytest.raises(CaseError) as raised:
        decode(data, "case.json")
    assert told in str(raised.value)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (recorded(IDLE, kernel_type="InterNodeV1", modes=("handle",)), "a rank without a token; give every rank one"),
        (recorded(IDLE, kernel_type="InterNodeV1"), ""),
        (recorded(kernel_type="InterNodeV1", modes=("handle",)), ""),
        (recorded(a_round=Round(Explicit(ROWS), hidden=32)), ""),
        (
            recorded(a_round=Round(Explicit(ROWS), hidden=32), backend="allgather", kernel_type="naive"),
            "rows shorter than the cell's; make hidden 0",
        ),
        (recorded((*MASKED, (), ()), **ACROSS), "masked slots"),
        (recorded((*ROWS, (), ()), **ACROSS), ""),
        (recorded(MASKED), ""),
        (recorded(a_round=Round(Recipe("uniform", (4, 0), 0, 1))), ""),
    ],
    ids=["idle", "idle-no-handle", "handle", "narrow", "narrow-refused", "masked", "unmasked", "masked-ok", "recipe"],
)
def test_what_the_backend_does_not_take_is_no_failure_of_its_own(tmp_path: Path, data: bytes, told: str) -> None:
    path = tmp_path / "case.json"
    path.write_bytes(data)
    case = decode(data, str(path))
    made = replace(options(tmp_path, case.cell.backend), tier="replay", replay=(path,))
    if not told:
        assert controller.replayed_cases(made, made.backends) == ([(path, case)], ())
        return
    with pytest.raises(pytest.UsageError, match="leave the file out") as raised:
        controller.replayed_cases(made, made.backends)
    assert told in str(raised.value)
    assert f"backend '{case.cell.backend}'" in str(raised.value)
