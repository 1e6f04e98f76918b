"""The judge of routers: every check fails where it should, names what is wrong, and says nothing of what is open.

Scope: conformance/rank/judge_routes.py on correct results of the specification that are changed in one place, and the
program with routers that disturb rows or change what they returned. A pass does not prove that a library's defects look
like these; the seeded faults are nearer to them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from accelerated.interface import RankContext
from accelerated.reference_routers import ReferenceRouter
from accelerated.routers import FORMS, Always, RouteContract, RouteResult
from conformance.engine.protocol import Mismatch
from conformance.rank.judge_rows import Answered, judge_call
from conformance.rank.oracle_rows import judge_by_oracle
from conformance.rank.row_programs import RowProgram
from conformance.row_cases import Call, Pattern, RowCase
from conformance.row_values import DISTINCT
from conformance.selftest.suite.row_cells import NORMAL, contract_of, row_cell
from reference.router_numerics import RouterNumerics, Score, Special
from reference.routers import route

GROUPED = "route.grouped_g8t4k8"
JUDGES = [judge_call, judge_by_oracle]


def answered(
    operator: str = GROUPED, rows: int = 6, logits: torch.Tensor | None = None, numerics: RouterNumerics | None = None
) -> tuple[Answered, RouteContract]:
    """A call with a correct result."""
    form = FORMS[operator.partition(".")[2]]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 256, generator=generator).bfloat16() if logits is None else logits
    bias = torch.randn(x.shape[1], generator=generator) / 16 if form.biased else None
    declared = numerics or form.numerics
    made = RouteResult(*route(x, bias, declared))
    contract = RouteContract(Always(declared), "float32" if form.biased else "")
    given = torch.empty(0) if bias is None else bias
    return Answered(x.unsqueeze(0), None, given, 1e-6, 1.0, -1, made), contract


def result_of(call: Answered) -> RouteResult:
    assert isinstance(call.result, RouteResult)
    return call.result


def check_of(judge: Callable[..., tuple[Mismatch | None, float]], call: Answered, contract: RouteContract) -> str:
    mismatch, _ = judge(0, call, contract)
    return "" if mismatch is None else mismatch.check


@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize("form", [name for name in FORMS if name != "grouped_bias_e72"])
def test_a_correct_result_passes(judge: Any, form: str) -> None:
    assert check_of(judge, *answered(f"route.{form}")) == ""
    assert check_of(judge, *answered(f"route.{form}", logits=torch.zeros(0, 256))) == ""


def change(name: str, result: RouteResult) -> None:
    """One change that a check is to see, in row 3."""
    weights, ids = result.weights, result.ids
    if name == "twice":
        ids[3, 1] = ids[3, 0]
    elif name == "beyond":
        ids[3, 7] = 256
    elif name == "negative":
        ids[3, 7] = -1
    elif name == "other":
        ids[3, 7] = next(e for e in range(256) if e not in ids[3].tolist() and e // 32 != int(ids[3, 0]) // 32)
    elif name == "swapped":
        ids[3, [0, 7]] = ids[3, [7, 0]]
    elif name == "weight":
        weights[3, 2] *= 1 + 2.0**-16
    elif name == "nan":
        weights[3, 2] = torch.nan
    elif name == "long":
        result.ids = ids.long()
    else:
        result.weights = weights[:, :7]


@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize(
    ("name", "check"),
    [
        ("twice", "ids"),
        ("beyond", "ids"),
        ("negative", "ids"),
        ("other", "choice"),
        ("swapped", "weights"),
        ("weight", "weights"),
        ("nan", "weights"),
        ("long", "layout"),
        ("short", "layout"),
    ],
)
def test_every_change_is_seen(judge: Any, name: str, check: str) -> None:
    call, contract = answered()
    change(name, result_of(call))
    mismatch, _ = judge(0, call, contract)
    assert mismatch is not None
    assert mismatch.check == f"route.{check}"
    assert check == "layout" or mismatch.token == 3
    assert check == "layout" or mismatch.got
    if judge is judge_call and check == "choice":
        assert "groups of 32 experts, 4 of 8 kept" in mismatch.message


def test_the_order_of_ids_is_open_unless_it_is_declared() -> None:
    call, contract = answered()
    made = result_of(call)
    call.result = RouteResult(made.weights.flip(1), made.ids.flip(1))
    assert check_of(judge_call, call, contract) == ""
    assert check_of(judge_call, call, replace(contract, descending=True)) == "route.choice"


def test_ties_may_go_any_way() -> None:
    call, contract = answered("route.softmax_k8", logits=torch.zeros(4, 256))
    made = result_of(call)
    call.result = RouteResult(made.weights, made.ids + torch.arange(4, dtype=torch.int32).unsqueeze(1))
    for judge in JUDGES:
        assert check_of(judge, call, contract) == ""


def test_what_is_promised_of_special_rows() -> None:
    logits = torch.randn(6, 256, generator=torch.Generator().manual_seed(2))
    logits[3] = torch.nan
    form = FORMS["softmax_k8"]
    for special, check in ((Special.UNIQUE, "route.ids"), (Special.IN_RANGE, ""), (Special.ANYTHING, "")):
        call, contract = answered("route.softmax_k8", logits=logits, numerics=replace(form.numerics, special=special))
        made = result_of(call)
        made.weights[3] = torch.nan
        assert check_of(judge_call, call, contract) == "", "weights of such a row are anything"
        made.ids[3, 1] = made.ids[3, 0]
        assert check_of(judge_call, call, contract) == check
        made.ids[3, 1] = 256
        wanted = "" if special is Special.ANYTHING else "route.ids"
        assert check_of(judge_call, call, contract) == wanted


def test_a_large_call_is_judged_where_it_does_not_repeat_itself() -> None:
    rows = 2 * DISTINCT + 5
    logits = torch.randn(DISTINCT, 256, generator=torch.Generator().manual_seed(3))[torch.arange(rows) % DISTINCT]
    for row in (0, DISTINCT, rows - 1):
        call, contract = answered("route.softmax_k8", logits=logits)
        assert check_of(judge_call, call, contract) == ""
        result_of(call).weights[row, 0] *= 1.5
        mismatch, _ = judge_call(0, call, contract)
        assert mismatch is not None
        assert (mismatch.check, mismatch.token) == ("route.weights", row)


class Router(ReferenceRouter):
    """The specification's router; does something to what it is given and returns."""

    def __init__(self, spoil: Callable[[torch.Tensor, RouteResult], None]) -> None:
        super().__init__(GROUPED)
        self._spoil = spoil

    def route(self, logits: torch.Tensor, bias: torch.Tensor | None) -> RouteResult:
        made = super().route(logits, bias)
        self._spoil(logits, made)
        return made


def run(spoil: Callable[[torch.Tensor, RouteResult], None], *calls: Call, **changes: Any) -> Mismatch | None:
    cell = row_cell(GROUPED)
    contract = replace(contract_of(cell), **changes)
    context = RankContext(0, 1, torch.device("cpu"), None, "gfx942")  # type: ignore[arg-type]
    program = RowProgram(context, Router(spoil), contract, "reference", cell)
    return program.run(RowCase(cell, calls), lambda _name, _index: None)[0]


SPECIAL = Call(4, (NORMAL, Pattern("nan", seed=2)), weight="small")


def feels(logits: torch.Tensor, made: RouteResult) -> None:
    if bool(logits.isnan().any()):
        made.weights[0] *= 1 + 2.0**-20


def test_a_row_that_another_one_changes() -> None:
    mismatch = run(feels, SPECIAL)
    assert mismatch is not None
    assert (mismatch.check, mismatch.token) == ("route.rows", 0)
    assert run(feels, SPECIAL, rows_alone=False) is None, "within the error of a weight"
    assert run(feels, Call(4, (NORMAL,), weight="small")) is None
    assert run(lambda logits, made: None, SPECIAL) is None


def test_inputs_and_earlier_results_are_left_alone() -> None:
    def writes(logits: torch.Tensor, made: RouteResult) -> None:
        logits[0, 0] = 7.0

    held: list[RouteResult] = []

    def overwrites(logits: torch.Tensor, made: RouteResult) -> None:
        held.append(made)
        held[0].ids[0, 0] = 255 - held[0].ids[0, 0]

    plain = Call(3, (NORMAL,), weight="small")
    for spoil, calls, check in (
        (writes, (plain,), "inputs.modified"),
        (overwrites, (plain, plain), "outputs.overwritten"),
    ):
        mismatch = run(spoil, *calls)
        assert mismatch is not None
        assert mismatch.check == check


def test_a_softmax_over_the_chosen_is_not_over_all() -> None:
    call, contract = answered("route.after_k4")
    wrong = RouteContract(Always(RouterNumerics(Score.SOFTMAX, 4, renormalise=False)))
    assert check_of(judge_call, call, contract) == ""
    for judge in JUDGES:
        assert check_of(judge, call, wrong) == "route.weights"
