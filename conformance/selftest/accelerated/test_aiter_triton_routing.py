"""What the adapters of AITER's Triton routers pass on and hand back, against functions that only record.

Scope: ids and weights read back from sorted pairs, arguments by name, refusals, claims. A pass proves nothing about
AITER's arithmetic.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from accelerated.aiter_ops.triton_backend import aiter_triton
from accelerated.aiter_ops.triton_routing import TritonRouter, read_back
from accelerated.contract import Standing
from accelerated.operators import Family, RowProblem
from accelerated.routers import RouteContract, form_of
from conformance.selftest.accelerated.triton_recorder import session
from reference import routers
from reference.router_oracle import objection


def route_problem(experts: int = 64, dtype: str = "float32") -> RowProblem:
    return RowProblem(Family.ROUTE, 1, experts, 8, dtype)


def test_ids_and_weights_are_read_back() -> None:
    # Pairs 0 to 3 of two rows go to experts 2, 0, 0, 1.
    gather = torch.tensor([1, 2, 3, 0], dtype=torch.uint16)
    scatter = torch.tensor([3, 0, 1, 2], dtype=torch.uint16)
    found = read_back(torch.tensor([2, 1, 1]).int(), gather, scatter, torch.tensor([0.1, 0.2, 0.3, 0.4]), 2)
    assert found.ids.tolist() == [[2, 0], [0, 1]]
    assert found.ids.dtype is torch.int32
    assert torch.equal(found.weights, torch.tensor([[0.4, 0.1], [0.2, 0.3]]))
    # A histogram that is short by one leaves a pair without an expert, and the gather's end unwritten.
    unwritten = torch.tensor([1, 2, 3, 2], dtype=torch.uint16)
    short = read_back(torch.tensor([2, 1, 0]).int(), unwritten, scatter, torch.zeros(4), 2)
    assert short.ids.tolist() == [[-1, 0], [0, 1]]


@pytest.mark.parametrize(
    ("form", "experts", "wanted"),
    [
        ("softmax_k8", 64, {"sm_first": False}),
        ("softmax_k5_plain", 64, {"sm_first": True}),
        ("after_k4", 64, {"sm_first": False}),
        ("sigmoid_k1", 64, {"score_mode": "sigmoid", "renorm": False, "routed_scaling_factor": 1.0}),
        ("sqrtsoftplus_bias_k6", 64, {"score_mode": "sqrtsoftplus", "renorm": True, "routed_scaling_factor": 1.5}),
        (
            "grouped_bias_e72",
            72,
            {
                "score_mode": "sigmoid",
                "renorm": False,
                "routed_scaling_factor": 2.5,
                "use_grouped_topk": True,
                "num_expert_group": 2,
                "topk_group": 1,
            },
        ),
    ],
)
def test_what_a_form_asks_of_the_router(form: str, experts: int, wanted: dict[str, Any]) -> None:
    made, recorder = session()
    name = f"triton.routing.{form}"
    top_k = form_of(name).numerics.top_k
    pairs = torch.arange(2 * top_k, dtype=torch.int32)
    data = SimpleNamespace(expt_hist=torch.ones(experts, dtype=torch.int32), gate_scal=torch.zeros(2 * top_k))

    def answer(*args: Any, **given: Any) -> Any:
        recorder.calls.append(("routing", args, given))
        return data, pairs, pairs

    made.moe.routing.routing = answer
    operation: Any = made.build(route_problem(experts), name)
    assert isinstance(operation, TritonRouter)
    biased = "bias" in form
    bias = torch.zeros(experts) if biased else None
    result = operation.route(torch.zeros(2, experts), bias)
    ((args, given),) = recorder.of("routing")
    assert (args[1], result.ids.shape) == (top_k, (2, top_k))
    assert given.pop("bias", None) is bias
    assert given == wanted
    with pytest.raises(ValueError, match="takes no bias" if not biased else "needs bias"):
        operation.route(torch.zeros(2, experts), None if biased else torch.zeros(experts))
    with pytest.raises(ValueError, match="at most 8 contiguous rows"):
        operation.route(torch.zeros(9, experts), bias)


@pytest.mark.parametrize(
    ("name", "asked", "reason"),
    [
        ("triton.routing.grouped_g8t4k8", route_problem(320), "at most 256"),
        ("triton.routing.sigmoid_bias_k6", route_problem(64, "bfloat16"), "modelled for float32"),
        ("triton.routing.grouped_bias_e72", route_problem(64), "the form is for 72"),
        ("triton.routing.none", route_problem(), "is no Triton router"),
    ],
)
def test_routers_that_cannot_run(name: str, asked: RowProblem, reason: str) -> None:
    support = aiter_triton("gfx950").support(asked, name)
    assert support.standing is Standing.REFUSED
    assert reason in support.reason


def test_what_upstream_claims_of_routers() -> None:
    name = "triton.routing.after_k4"
    standing = {
        (arch, dtype): aiter_triton(arch).support(route_problem(64, dtype), name).standing
        for arch in ("gfx942", "gfx950")
        for dtype in ("float32", "bfloat16")
    }
    assert [asked for asked, found in standing.items() if found is Standing.CLAIMED] == [("gfx950", "float32")]
    contract = aiter_triton("gfx950").contract(route_problem(), name)
    assert isinstance(contract, RouteContract)
    assert (contract.boundaries, contract.takes_empty) == ((16, 256), False)


def test_what_is_added_to_the_sum_of_a_renormalisation() -> None:
    # Every score is about 8.8e-27, less than the 1e-20 that the kernels add to their sum.
    name = "triton.routing.grouped_g8t4k8"
    contract = aiter_triton("gfx950").contract(route_problem(), name)
    assert isinstance(contract, RouteContract)
    numerics = contract.numerics(1)
    logits, bias = torch.full((1, 64), -60.0), torch.zeros(64)
    weights, ids = routers.route(logits, bias, numerics)
    # The scores' share of that sum, which is less than half of it.
    assert float(weights.sum()) < numerics.scale / 2
    for declared_so, right in ((numerics, True), (replace(numerics, sum_added=0.0), False)):
        accepted, judged = routers.accepted_weights(logits, bias, ids, declared_so)
        assert bool(judged.all())
        assert bool((accepted.error_over_bound(weights) <= 1).all()) is right
        found = objection(logits[0].tolist(), bias.tolist(), ids[0].tolist(), weights[0].tolist(), declared_so)
        assert (found is None) is right
