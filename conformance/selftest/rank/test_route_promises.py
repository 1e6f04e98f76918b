"""The judge of routers holds special rows to what their contract promises, and to no more.

Scope: conformance/rank/judge_routes.py. A pass does not prove that the promises are the right ones.
"""

from __future__ import annotations

import pytest
import torch

from accelerated.routers import Always, RouteContract, RouteResult
from conformance.rank.judge_routes import judge_route
from conformance.rank.judge_rows import Answered
from reference.router_numerics import RouterNumerics, Score, Special

NAN = float("nan")


def judged(logits: list[float], ids: list[int], special: Special) -> str:
    """Message about a row's ids, or nothing."""
    contract = RouteContract(Always(RouterNumerics(Score.SIGMOID, len(ids), special=special)))
    result = RouteResult(torch.full((1, len(ids)), 1 / len(ids)), torch.tensor([ids], dtype=torch.int32))
    answered = Answered(torch.tensor([[logits]]), None, torch.zeros(len(logits)), 0.0, 0.0, -1, result)
    found, _ = judge_route(0, answered, contract)
    assert found is None or found.check == "route.ids"
    return "" if found is None else f"{found.element}: {found.message}"


@pytest.mark.parametrize(
    ("logits", "ids", "special", "slot"),
    [
        ([NAN, NAN, 3.0, NAN], [2, 2], Special.UNIQUE, 1),
        ([NAN, NAN, 3.0, NAN], [2, 2], Special.ENOUGH, None),
        ([NAN, NAN, 3.0, NAN], [2, 2], Special.IN_RANGE, None),
        ([NAN, NAN, 3.0, NAN], [2, 4], Special.IN_RANGE, 1),
        ([NAN, NAN, 3.0, NAN], [2, 4], Special.ANYTHING, None),
        ([NAN, 1.0, 3.0, NAN], [0, 2], Special.ENOUGH, 0),
        ([NAN, 1.0, 3.0, NAN], [0, 2], Special.UNIQUE, None),
        ([1.0, 1.0, 1.0, 1.0], [2, 2], Special.ANYTHING, 1),
    ],
)
def test_special_rows(logits: list[float], ids: list[int], special: Special, slot: int | None) -> None:
    message = "1 of 1 rows have ids twice, out of range, or of a NaN that none was to have"
    assert judged(logits, ids, special) == ("" if slot is None else f"{slot}: {message}")
