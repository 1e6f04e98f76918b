"""One failure of a router as the user meets it: minimum, report, the script that stands alone.

Scope: a seeded fault on the smallest rows, and calls without a fault. A pass does not prove that other failures
read as well, nor anything about scripts on a GPU.
"""

from __future__ import annotations

import io
from pathlib import Path

import msgspec
import numpy as np

from conformance.row_cases import Call, Pattern, RowCase, RowCell
from conformance.selftest.suite.row_cells import NORMAL, row_cell
from conformance.selftest.suite.test_row_failure import ended, found, stored, torchrun
from conformance.suite.describe import describe
from conformance.suite.reproduce_rows import row_files
from conformance.verdicts import Verdict

GROUPED = "route.grouped_g8t4k8"


def faulty(name: str) -> RowCell:
    """A cell of the double with a seeded fault."""
    cell = row_cell(GROUPED, backend=f"conformance.faults:{name}", hidden=32)
    return msgspec.structs.replace(cell, operator="biased_grouped_topk.grouped_g8t4k8")


def test_what_is_told_and_the_scripts_stand_alone(tmp_path: Path) -> None:
    calls = (
        Call(3, (NORMAL, Pattern("nan")), weight="large"),
        Call(0, (), weight="zeros"),
        Call(2, (Pattern("ties"),), weight="small"),
    )
    good = stored(tmp_path / "good", RowCase(row_cell(GROUPED), calls))
    weights = found(tmp_path, faulty("bias_in_weight"))
    assert weights.outcome.key == (Verdict.FAIL, "route.weights")
    for words in ("call 0: 1 rows, bias small", "rows zero x 2**0", "stand-alone:", "of expert"):
        assert words in weights.report()
    started = [torchrun(script) for script in (weights.directory / "reproduce.py", good)]
    (code, out, err), second = (ended(process) for process in started)
    assert code == 1, out + err
    assert "rank 0 call 0: DIFFERS route.weights" in out
    code, out, err = second
    assert code == 0, out + err
    assert out.count("largest error over bound") == 3


def test_the_script_carries_the_bias() -> None:
    biased, plain = row_cell(GROUPED), row_cell("route.softmax_k8")
    case = RowCase(biased, (Call(3, (NORMAL,), weight="negative"),))
    assert "NOT_MADE_HERE = True" in row_files(case, check="route.rows")["reproduce.py"].decode()
    assert "NOT_MADE_HERE = False" in row_files(case, check="route.ids")["reproduce.py"].decode()
    held = np.load(io.BytesIO(row_files(case)["inputs.npz"]))
    assert set(held.files) == {"rows0_0", "weight0"}
    assert held["weight0"].shape == (256,)
    assert held["weight0"].max() <= -1
    assert "0 rows, bias negative" in describe(RowCase(biased, (Call(0, (), weight="negative"),)))[1]
    assert "no bias" in describe(RowCase(plain, (Call(1, (NORMAL,)),)))[1]
