"""AITER's routers: what is declared of them, what the adapter calls, and the double's results before the reference.

Scope: the double, on the CPU. A pass does not prove that AITER's kernels keep what is declared.
"""

from __future__ import annotations

import inspect
import math
import pickle
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch

from accelerated.aiter_ops import backend
from accelerated.aiter_ops.routing import AiterRouter
from accelerated.aiter_ops.routing_contract import ROUTERS, contract, loses_ties_from, support
from accelerated.contract import ContractError, Standing
from accelerated.interface import RankContext
from accelerated.operators import Family, RowProblem
from accelerated.routers import FORMS, RouteContract, form_of
from accelerated.standin import manifest
from accelerated.standin.aiter_ops import defects, fused_moe
from accelerated.standin.aiter_ops.ops import moe_op, topk
from reference import routers
from reference.catalogue import architecture
from reference.router_numerics import Ranking, Recovery, Score, Special

KINDS = ("normal", "tied", "flat", "wide", "subnormal", "masked", "some nan", "mostly nan", "inf", "nan")
ROWS = 5  # of each kind


def problem(experts: int, dtype: str = "bfloat16", capacity: int = 512) -> RowProblem:
    return RowProblem(Family.ROUTE, 1, experts, capacity, dtype)


def built(operator: str, sizes: RowProblem, arch: str = "gfx942") -> tuple[AiterRouter, RouteContract]:
    context = RankContext(0, 1, torch.device("cpu"), cast("torch.distributed.ProcessGroup", None), arch)
    made = backend.aiter_standin(arch)
    declared = made.contract(sizes, operator)
    assert isinstance(declared, RouteContract)
    return cast("AiterRouter", made.open(context).build(sizes, operator)), declared


def rows(experts: int, dtype: torch.dtype) -> torch.Tensor:
    """Five rows of each of :data:`KINDS`."""
    draw = torch.Generator().manual_seed(experts)

    def spread(share: float, value: float, given: torch.Tensor) -> torch.Tensor:
        return given.masked_fill(torch.rand(given.shape, generator=draw) < share, value)

    given = [torch.randn(ROWS, experts, generator=draw) for _ in KINDS]
    given[1], given[2], given[3] = (given[1] * 2).round() / 2, given[2].sign(), given[3] * 60
    given[4] = given[4] * 1e-39
    for index, share, value in ((5, 0.5, -math.inf), (6, 0.05, math.nan), (7, 0.95, math.nan), (8, 0.03, math.inf)):
        given[index] = spread(share, value, given[index])
    given[9].fill_(math.nan)
    return torch.cat(given).to(dtype)


def objections(
    given: torch.Tensor, bias: torch.Tensor | None, router: AiterRouter, declared: RouteContract
) -> list[str]:
    """Kinds of rows with a result that the reference does not accept."""
    result, numerics = router.route(given, bias), declared.numerics(len(given))
    good = routers.promised_ids(given, result.ids, numerics)
    ids = result.ids.clamp(0, given.shape[1] - 1)
    verdicts = routers.accepted_ids(given, bias, ids, numerics)
    interval, judged = routers.accepted_weights(given, bias, ids, numerics)
    weights = result.weights.double()
    inside = ((weights >= interval.lower) & (weights <= interval.upper)).all(1)
    good &= verdicts.legal & (inside | ~judged)
    if declared.descending:
        good &= routers.in_order(verdicts.choices, ids) | ~verdicts.judged
    return sorted({KINDS[int(row) // ROWS % len(KINDS)] for row in (~good).nonzero()})


def biases(declared: RouteContract, experts: int) -> list[torch.Tensor | None]:
    """None, or a small, a large and a negative one."""
    if not declared.takes_bias:
        return [None]
    draw = torch.Generator().manual_seed(1)
    return [
        (torch.randn(experts, generator=draw) * size + shift).to(getattr(torch, declared.bias_dtype))
        for size, shift in ((0.1, 0.0), (30.0, 0.0), (1.0, -5.0))
    ]


@pytest.mark.parametrize("operator", ROUTERS)
def test_the_reference_accepts_the_double(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(defects.VARIABLE, raising=False)
    judged = 0
    for experts, dtype, arch in (
        (64, "bfloat16", "gfx950"),
        (72, "float16", "gfx950"),
        (256, "float32", "gfx942"),
        (256, "bfloat16", "gfx942"),
    ):
        sizes = problem(experts, dtype)
        if support(sizes, operator, arch).standing is Standing.REFUSED:
            continue
        router, declared = built(operator, sizes, arch)
        for bias in biases(declared, experts):
            assert objections(rows(experts, getattr(torch, dtype)), bias, router, declared) == []
            judged += 1
    assert judged


def test_defects_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the double shows when asked is what the reference then objects to, in cells that are not claimed."""
    for operator, experts, defect, seen in (
        ("topk_gating.softmax_k8", 64, defects.TIES_LOST, {"tied"}),
        ("topk_gating.softmax_k2", 256, defects.TIES_LOST, {"tied"}),
        ("biased_grouped_topk.grouped_bias_e72", 72, defects.LANES_APART, {"normal", "wide", "masked"}),
    ):
        router, declared = built(operator, problem(experts))
        given, bias = rows(experts, torch.bfloat16), biases(declared, experts)[0]
        monkeypatch.setenv(defects.VARIABLE, defect)
        assert seen <= set(objections(given, bias, router, declared))
        assert support(problem(experts), operator, "gfx942").standing is Standing.UNCLAIMED
        monkeypatch.delenv(defects.VARIABLE)


def test_a_lost_scale_is_seen_beyond_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CU_NUM", "1")
    operator, sizes = "biased_grouped_topk.grouped_g8t4k8", problem(256, "bfloat16", 70_000)
    router, declared = built(operator, sizes)
    bias = biases(declared, 256)[0]
    given = torch.cat([rows(256, torch.bfloat16)] * 5)
    assert objections(given[:212], bias, router, declared) == []
    assert "normal" in objections(given, bias, router, declared)
    found = support(sizes, operator, "gfx942")
    assert found.standing is Standing.UNCLAIMED
    assert "beyond 16960 rows moe_fused_gate leaves the scale of 2.5 out" in found.reason


@pytest.mark.parametrize(
    ("operator", "sizes", "arch", "standing", "reason"),
    [
        ("topk_softmax.softmax_k8", problem(128), "gfx942", "CLAIMED", ""),
        ("topk_softmax.softmax_k8", problem(72), "gfx942", "UNCLAIMED", "which upstream does not test"),
        ("topk_softmax.softmax_k8", problem(128, "float16"), "gfx942", "UNCLAIMED", "bfloat16 and float32 logits"),
        ("topk_softmax.softmax_k8", problem(128), "gfx1250", "UNCLAIMED", "documents neither"),
        ("topk_softmax.softmax_k8", problem(4), "gfx942", "REFUSED", "do not hold the 8"),
        ("fused_topk.softmax_k8", problem(384), "gfx950", "CLAIMED", ""),
        ("fused_topk.softmax_k2", problem(384), "gfx950", "UNCLAIMED", "which upstream does not test"),
        ("topk_gating.softmax_k8", problem(128), "gfx950", "UNCLAIMED", "from 1 rows on"),
        ("topk_gating.sqrtsoftplus_bias_k6", problem(384, "float32", 9000), "gfx950", "CLAIMED", ""),
        ("topk_gating.sqrtsoftplus_bias_k6", problem(64, "float32", 4095), "gfx950", "CLAIMED", ""),
        ("topk_gating.sqrtsoftplus_bias_k6", problem(64, "float32", 4096), "gfx950", "UNCLAIMED", "from 4096 rows on"),
        ("topk_gating.sqrtsoftplus_bias_k6", problem(128, "float32", 4096), "gfx950", "CLAIMED", ""),
        ("topk_gating.sqrtsoftplus_bias_k6", problem(128, "float32", 4096), "gfx942", "UNCLAIMED", "from 4096 rows"),
        ("topk_gating.sqrtsoftplus_bias_k6", problem(72), "gfx942", "UNCLAIMED", "upstream tests 64, 128, 256, 384"),
        ("topk_gating.sigmoid_k1", problem(128, "float32"), "gfx942", "UNCLAIMED", "tests the sigmoid on"),
        ("topk_sigmoid.sigmoid_k1", problem(128), "gfx942", "CLAIMED", ""),
        ("topk_sigmoid.sigmoid_k1", problem(72), "gfx942", "UNCLAIMED", "padded with zero scores"),
        ("topk_sigmoid.sigmoid_k1", problem(256), "gfx942", "REFUSED", "no tile for 256 experts"),
        ("topk_sigmoid.sigmoid_k1", problem(128, "float32"), "gfx942", "REFUSED", "no kernel for float32"),
        ("grouped_topk.grouped_g4t2k6_softmax", problem(64), "gfx942", "UNCLAIMED", "upstream tests 8 groups"),
        ("grouped_topk.grouped_g4t2k6_softmax", problem(72), "gfx942", "REFUSED", "does not divide groups of 18"),
        ("biased_grouped_topk.grouped_g8t4k8", problem(256), "gfx942", "CLAIMED", ""),
        ("biased_grouped_topk.grouped_g8t4k8", problem(256, "float32"), "gfx942", "UNCLAIMED", "bfloat16 logits"),
        ("biased_grouped_topk.grouped_bias_e72", problem(72), "gfx942", "UNCLAIMED", "of every 128 experts of a group"),
        (
            "biased_grouped_topk.grouped_bias_e72",
            problem(72, "bfloat16", 99_999),
            "gfx942",
            "UNCLAIMED",
            "of every 128",
        ),
        ("biased_grouped_topk.sigmoid_bias_k8_plain", problem(64), "gfx942", "UNCLAIMED", "with renormalisation"),
        (
            "biased_grouped_topk.sigmoid_bias_k8_plain",
            problem(32, "bfloat16", 99_999),
            "gfx950",
            "REFUSED",
            "54272 rows",
        ),
        ("topk_gating.grouped_g8t4k8", problem(256), "gfx942", "REFUSED", "unknown route operator"),
        ("topk_softmax.softmax_k8", problem(128), "gfx90a", "REFUSED", "unknown architecture"),
    ],
)
def test_standing(operator: str, sizes: RowProblem, arch: str, standing: str, reason: str) -> None:
    found = support(sizes, operator, arch)
    assert found.standing.name == standing, found
    assert reason in found.reason
    assert bool(found.reason) is (standing != "CLAIMED")


def test_numerics_of_the_kernels() -> None:
    def of(operator: str, experts: int, rows: int = 4, dtype: str = "bfloat16", arch: str = "gfx942") -> Any:
        return contract(problem(experts, dtype, 80_000), operator, arch).numerics(rows)

    assert of("topk_softmax.softmax_k8", 128).ranking is Ranking.LOGIT
    assert of("topk_softmax.softmax_k8", 128).score is Score.CHOSEN_SOFTMAX
    assert of("topk_softmax.softmax_k5_plain", 128).score is Score.SOFTMAX
    assert of("topk_softmax.after_k4", 72).ranking is Ranking.CHOICE
    assert of("fused_topk.softmax_k8", 128).special is Special.ANYTHING
    assert of("fused_topk.softmax_k8", 128, dtype="float16").special is Special.IN_RANGE
    assert of("fused_topk.softmax_k8", 128, arch="gfx1250").special is Special.IN_RANGE
    assert of("topk_gating.sigmoid_bias_k6", 384).recovery is Recovery.KEPT
    assert of("topk_gating.sigmoid_bias_k6", 512).recovery is Recovery.SUBTRACTED
    assert of("topk_gating.sqrtsoftplus_bias_k6", 64).softplus_error == 2.0**-24
    assert of("biased_grouped_topk.grouped_g8t4k8", 256).recovery is Recovery.SUBTRACTED
    assert of("biased_grouped_topk.grouped_g8t4k8", 128).recovery is Recovery.KEPT
    assert of("biased_grouped_topk.grouped_g8t4k8", 256).special is Special.NAN_LAST
    assert of("biased_grouped_topk.grouped_g8t4k8", 256, arch="gfx1250").recovery is Recovery.KEPT
    above = of("biased_grouped_topk.grouped_g8t4k8", 256, 60_000)
    assert (above.recovery, above.special, above.factor) == (Recovery.KEPT, Special.UNIQUE, 2.5), (
        "the scale is promised"
    )


def test_boundaries_and_element_types() -> None:
    def of(operator: str, experts: int, arch: str = "gfx942", capacity: int = 99_999) -> RouteContract:
        return contract(problem(experts, "bfloat16", capacity), operator, arch)

    assert of("fused_topk.softmax_k8", 256).boundaries == (9999,)
    assert of("fused_topk.softmax_k8", 384).boundaries == ()
    assert of("topk_gating.softmax_k8", 256).boundaries == (1023,)
    assert of("topk_gating.sigmoid_k1", 128).boundaries == (4095,)
    assert of("topk_gating.sigmoid_k1", 128, "gfx950").boundaries == ()
    assert of("topk_gating.sigmoid_k1", 72, capacity=1023).boundaries == ()
    assert of("biased_grouped_topk.grouped_g8t4k8", 256).boundaries == (16_960, 48_336, 64_448)
    assert of("biased_grouped_topk.grouped_g8t4k8", 256, "gfx950").boundaries == (54_272,)
    assert of("biased_grouped_topk.grouped_g8t4k8", 512).boundaries == ()
    assert of("topk_gating.sigmoid_bias_k6", 64).bias_dtype == "float32"
    assert of("biased_grouped_topk.grouped_g8t4k8", 256).bias_dtype == "bfloat16"
    assert not of("topk_softmax.softmax_k8", 64).takes_bias
    assert not any(of(operator, 64).takes_empty for operator in ROUTERS if form_of(operator).experts == ())
    assert loses_ties_from(640, FORMS["softmax_k8"].numerics, architecture("gfx950")) == 1
    declared = of("biased_grouped_topk.grouped_g8t4k8", 256)
    assert pickle.loads(pickle.dumps(declared)) == declared
    with pytest.raises(ContractError, match=r"unknown route operator 'topk\.softmax_k8'; choose one of topk_softmax\."):
        contract(problem(64), "topk.softmax_k8", "gfx942")


CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "topk_softmax.softmax_k5_plain": ("topk_softmax", {"need_renorm": False}),
    "fused_topk.after_k4": ("fused_topk", {"topk": 4, "renormalize": True}),
    "topk_gating.after_k4": ("topk_gating", {"score_func": "softmax", "need_renorm": True, "correction_bias": None}),
    "topk_gating.sqrtsoftplus_bias_k6": (
        "topk_gating",
        {"score_func": "sqrtsoftplus", "routed_scaling_factor": 1.5, "need_renorm": True},
    ),
    "topk_gating.sigmoid_bias_k8_plain": (
        "topk_gating",
        {"score_func": "sigmoid", "routed_scaling_factor": 2.5, "need_renorm": False},
    ),
    "topk_sigmoid.sigmoid_k1": ("topk_sigmoid", {}),
    "grouped_topk.grouped_g4t2k6_softmax": (
        "grouped_topk",
        {"num_expert_group": 4, "topk_group": 2, "is_softmax": True, "routed_scaling_factor": 16.0},
    ),
    "grouped_topk.sigmoid_k1": ("grouped_topk", {"num_expert_group": 1, "is_softmax": False, "need_renorm": False}),
    "biased_grouped_topk.grouped_g8t4k8": (
        "biased_grouped_topk",
        {"num_expert_group": 8, "topk_group": 4, "need_renorm": True, "routed_scaling_factor": 2.5},
    ),
}


@pytest.mark.parametrize("operator", CALLS)
def test_calls(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, dict[str, Any]]] = []

    def recording(name: str, signature: inspect.Signature, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            made.append((name, dict(signature.bind(*args, **kwargs).arguments)))
            return run(*args, **kwargs)

        return call

    modules = {"aiter.ops.topk": topk, "aiter.ops.moe_op": moe_op, "aiter.fused_moe": fused_moe}
    for path, entry in manifest.load_manifest("aiter_routing")["functions"].items():
        module, _, name = path.partition(":")
        if module in modules:
            names = [
                inspect.Parameter(
                    each["name"], getattr(inspect.Parameter, each["kind"]), default=each.get("default", inspect._empty)
                )
                for each in entry["parameters"]
            ]
            wrapped = recording(name, inspect.Signature(names), getattr(modules[module], name))
            monkeypatch.setattr(modules[module], name, wrapped)
    router, declared = built(operator, problem(64))
    bias = biases(declared, 64)[0]
    result = router.route(rows(64, torch.bfloat16), bias)
    name, options = CALLS[operator]
    assert made[0][0] == name
    assert options.items() <= made[0][1].items()
    if bias is not None:
        assert made[0][1]["correction_bias"] is bias
    assert (result.weights.dtype, result.ids.dtype) == (torch.float32, torch.int32)
    assert list(result.ids.shape) == list(result.weights.shape) == [len(KINDS) * ROWS, declared.top_k]
    router.close()


def test_a_bias_of_another_type_is_refused() -> None:
    router, _ = built("biased_grouped_topk.grouped_g8t4k8", problem(256))
    for bias, found in ((None, "missing"), (torch.zeros(256), "float32")):
        with pytest.raises(ValueError, match=f"the bias is {found}; this router takes bfloat16"):
            router.route(rows(256, torch.bfloat16), bias)
    plain, _ = built("topk_softmax.softmax_k8", problem(256))
    with pytest.raises(ValueError, match="the bias is float32; this router takes none"):
        plain.route(rows(256, torch.bfloat16), torch.zeros(256))
