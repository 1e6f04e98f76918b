"""Composition of a dispatch and experts: names, paths, what is refused and why.

Scope: the driver's half on halves whose answers are given. A pass proves nothing about any library.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from accelerated import registry
from accelerated.contract import ContractError, MaskedSlots, Standing, Support
from accelerated.experts import LayerContract, LayerProblem
from accelerated.interface import Finding
from accelerated.layer import LayerBackend, split_path, wire_of
from accelerated.registry import BackendError, backend
from conformance.selftest.accelerated.layer_halves import (
    DENSE,
    EVERYWHERE,
    FP4,
    GROUP,
    MXFP8,
    TOKEN,
    dispatch,
    experts,
    experts_contract,
    sizes,
)
from reference.expert_numerics import ExpertNumerics, WeightStage
from reference.problem import Problem

REFUSED = Standing.REFUSED


def reason(made: LayerBackend, problem: LayerProblem, path: str, standing: Standing = REFUSED) -> str:
    found = made.support(problem, path)
    assert found.standing is standing, found
    return found.reason


def test_a_layer_is_what_its_halves_are() -> None:
    made = LayerBackend(dispatch(judged_by="oracle"), experts(standin=True, judged_by="oracle"))
    assert (made.name, made.standin, made.judged_by) == ("sender+mathematician", True, "oracle")
    assert LayerBackend(dispatch(judged_by="oracle"), experts()).judged_by == "reference"
    assert made.kernel_types == (
        *("fast/bf16", "fast/bf16@bf16", "fast/fp8", "fast/fp8@bf16"),
        *("slow/bf16", "slow/bf16@bf16", "slow/fp8", "slow/fp8@bf16"),
    )
    assert (made.aliases, made.caveat, made.patience) == ((), "", 1.0)
    assert not hasattr(made, "operators"), "row operators are each half's own"
    assert [found.what for found in made.preflight("cpu")] == ["no torch", "no sender", "no mathematician"]
    assert Finding("no torch", "install it") in made.preflight("cpu")


def test_names_caveats_and_patience_of_both_halves_count() -> None:
    first, second = dispatch(), experts()
    first.aliases, first.patience, first.caveat = ("vendor",), 3.0, "sent on paper"  # type: ignore[attr-defined]
    second.caveat = "computed by hand"  # type: ignore[attr-defined]
    made = LayerBackend(first, second)
    assert made.aliases == ("vendor/bf16", "vendor/bf16@bf16", "vendor/fp8", "vendor/fp8@bf16")
    assert (made.patience, made.caveat) == (3.0, "sent on paper\ncomputed by hand")
    assert made.support(sizes(), "vendor/bf16").standing is Standing.CLAIMED
    second.caveat = first.caveat  # type: ignore[attr-defined]
    assert made.caveat == "sent on paper"


def test_the_experts_choose_the_wire() -> None:
    made = LayerBackend(dispatch(), experts())
    for path, wire in (("fast/bf16", ""), ("fast/fp8", "fp8_group"), ("fast/fp8@bf16", "")):
        assert reason(made, sizes(), path, Standing.CLAIMED) == ""
        declared = made.contract(sizes(), path)
        assert (declared.wire, declared.buffer_rows) == (wire, 16)
        assert made.exchange_problem(sizes(), path).wire == wire
    assert [wire_of(codec) for codec in (TOKEN, GROUP, FP4, MXFP8)] == ["fp8_token", "fp8_group", "mxfp4", None]
    assert wire_of(replace(GROUP, group=64)) is None


def test_rows_of_the_buffer_decide_the_numerics() -> None:
    stages = {rows: ExpertNumerics(scale_roundings=rows) for rows in range(1, 33)}
    half = experts(declared=experts_contract(numerics=stages.__getitem__))
    whole = LayerBackend(dispatch(), half).contract(sizes(), "fast/bf16")
    assert whole.numerics(3).scale_roundings == 16
    exact = LayerBackend(dispatch(declared=replace(DENSE, exact_rows=True)), half).contract(sizes(), "fast/bf16")
    assert (exact.buffer_rows, exact.numerics(3).scale_roundings) == (None, 3)


@pytest.mark.parametrize(
    ("sent", "dropped", "fate"),
    [
        (MaskedSlots.DROPPED, True, MaskedSlots.DROPPED),
        (MaskedSlots.DROPPED, False, MaskedSlots.UNMODELLED),
        (MaskedSlots.RANK_ZERO, True, MaskedSlots.RANK_ZERO),
        (MaskedSlots.RANK_ZERO, False, MaskedSlots.RANK_ZERO),
    ],
)
def test_masked_slots_are_passed_only_if_both_halves_drop_them(
    sent: MaskedSlots, dropped: bool, fate: MaskedSlots
) -> None:
    declared = LayerContract(replace(DENSE, masked_slots=sent), experts_contract(drops_masked=dropped))
    assert declared.masked_slots is fate


def test_standing_is_the_lower_of_both() -> None:
    def halved(standing: Standing, why: str) -> Any:
        return lambda problem, name: Support(standing, why)

    one, other = halved(Standing.UNCLAIMED, "not on one rank"), halved(Standing.UNCLAIMED, "not in tests")
    for first, second, why in (
        (dispatch(answer=one), experts(), "sender, fast: not on one rank"),
        (dispatch(), experts(answer=other), "mathematician, bf16: not in tests"),
        (
            dispatch(answer=one),
            experts(answer=other),
            "sender, fast: not on one rank; mathematician, bf16: not in tests",
        ),
    ):
        assert reason(LayerBackend(first, second), sizes(), "fast/bf16", Standing.UNCLAIMED) == why
    no = halved(REFUSED, "too wide")
    assert reason(LayerBackend(dispatch(answer=no), experts()), sizes(), "fast/bf16") == "sender, fast: too wide"
    assert reason(LayerBackend(dispatch(), experts(answer=no)), sizes(), "slow/fp8") == "mathematician, fp8: too wide"


def test_a_wire_that_is_not_carried_is_refused_and_the_other_path_named() -> None:
    def carries(problem: Problem, name: str) -> Support:
        return Support(REFUSED, "no scales here") if problem.wire or name == "slow" else Support(Standing.CLAIMED)

    made = LayerBackend(dispatch(answer=carries), experts())
    assert reason(made, sizes(), "fast/fp8") == "sender, fast: no scales here; fast/fp8@bf16 dispatches bfloat16"
    assert reason(made, sizes(), "fast/fp8@bf16", Standing.CLAIMED) == ""
    assert reason(made, sizes(), "slow/fp8") == "sender, slow: no scales here", "the other path is refused, too"


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (sizes(dtype="float16"), "dtype: the exchange has bfloat16, the experts have float16"),
        (sizes(hidden=128), "hidden: the exchange has 256, the experts have 128"),
        (sizes(shards=4), "ranks: the exchange has 2, the experts have 4"),
        (sizes(experts=8), "experts: the exchange has 4, the experts have 8"),
        (sizes(top_k=1), "top_k: the exchange has 2, the experts have 1"),
        (sizes(top_k=3, shared=1), "1 fused shared experts; every rank that gets a row would add them"),
        (sizes(capacity=15), "the experts take 15 rows and may get 16"),
        (sizes(placement="random"), "placement is 'random'; choose one of linear, round_robin"),
        (sizes(placement="round_robin"), "placement round_robin with a dispatch that finds the owner"),
        (sizes().carrying("mxfp4"), "the problem's wire is 'mxfp4' and fast/fp8 has 'fp8_group'"),
        (LayerProblem(Problem(2, 200, 4, 2, 8), sizes(hidden=200).experts), "hidden is 200; the wire fp8_group takes"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(problem: LayerProblem, message: str) -> None:
    assert message in reason(LayerBackend(dispatch(), experts()), problem, "fast/fp8")


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        (
            experts_contract(GROUP, takes_remote=False),
            "the experts take ids of their own rank only; a received row (de",
        ),
        (experts_contract(GROUP, takes_num_rows=False), "the experts take no row count; of the 16 rows"),
        (
            experts_contract(MXFP8),
            "float8_e4m3fn with e8m0 scales of 32 elements, which no wire carries; choose a path",
        ),
        (
            experts_contract(GROUP, numerics=lambda rows: ExpertNumerics()),
            "the wire is fp8_group, and the experts multiply the element type in a buffer of 16 rows",
        ),
        (
            experts_contract(GROUP, numerics=lambda rows: ExpertNumerics(input_codec=TOKEN)),
            "the wire is fp8_group, and the experts multiply float8_e4m3fn per token in a buffer of 16 rows",
        ),
        (
            experts_contract(
                GROUP,
                numerics=lambda rows: ExpertNumerics(input_codec=GROUP, weight_stage=WeightStage.ON_INPUT),
            ),
            "the experts multiply rows by the routing weight before they quantise them",
        ),
    ],
)
def test_promises_that_do_not_fit_are_refused(declared: Any, message: str) -> None:
    assert message in reason(LayerBackend(dispatch(), experts(declared=declared)), sizes(), "fast/fp8")


def test_what_a_layout_or_one_rank_makes_possible() -> None:
    scattered = sizes(placement="round_robin")
    assert reason(LayerBackend(dispatch(declared=EVERYWHERE), experts()), scattered, "fast/fp8", Standing.CLAIMED) == ""
    local = experts(declared=experts_contract(GROUP, takes_remote=False))
    assert reason(LayerBackend(dispatch(), local), sizes(1), "fast/fp8", Standing.CLAIMED) == ""
    uncounted = experts(declared=experts_contract(GROUP, takes_num_rows=False))
    exact = dispatch(declared=replace(DENSE, exact_rows=True))
    assert reason(LayerBackend(exact, uncounted), sizes(), "fast/fp8", Standing.CLAIMED) == ""
    # With as many rows as arrive, every path of the experts may come up.
    late = experts_contract(
        GROUP, boundaries=(8,), numerics=lambda rows: ExpertNumerics(input_codec=GROUP if rows < 9 else None)
    )
    assert "a buffer of 9 rows" in reason(LayerBackend(exact, experts(declared=late)), sizes(), "fast/fp8")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("fast", "'fast' is no path of a layer; write <kernel type>/<experts operator>"),
        ("/fp8", "'/fp8' is no path of a layer"),
        ("fast/@bf16", "'fast/@bf16' is no path of a layer"),
        ("quick/fp8", "quick/fp8: sender has no 'quick'; choose one of fast, slow"),
        ("fast/fp4", "fast/fp4: mathematician has no 'fp4'; choose one of bf16, fp8"),
        ("fast/bf16@bf16", "bf16 takes rows in the element type only; the path without @bf16 is the same"),
    ],
)
def test_paths_that_do_not_exist(path: str, message: str) -> None:
    made = LayerBackend(dispatch(), experts())
    assert message in reason(made, sizes(), path)
    with pytest.raises(ContractError) as caught:
        made.contract(sizes(), path)
    assert message in str(caught.value)


def test_a_path_comes_apart() -> None:
    assert split_path("IntraNode/fused_moe.fp8_block") == ("IntraNode", "fused_moe.fp8_block", True)
    assert split_path("IntraNode/fused_moe.fp8_block@bf16") == ("IntraNode", "fused_moe.fp8_block", False)


HALVES = """
from conformance.selftest.accelerated.layer_halves import dispatch, experts

def sender():
    return dispatch()


def mathematician():
    return experts()


def broken():
    raise OSError("no device")
"""


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "third_party_halves.py").write_text(HALVES)
    monkeypatch.syspath_prepend(tmp_path)
    return "third_party_halves"


def test_two_names_make_a_layer(third_party: str) -> None:
    made = backend(f"allgather+{third_party}:mathematician", arch="gfx950")
    assert isinstance(made, LayerBackend)
    assert (made.name, made.dispatch.name, made.experts.name) == (
        "allgather+mathematician",
        "allgather",
        "mathematician",
    )
    assert made.support(sizes(), "naive/fp8").standing is Standing.CLAIMED
    assert backend(f"{third_party}:sender+{third_party}:mathematician").name == "sender+mathematician"
    assert "+" not in "".join(registry.names()), "pairs are made on demand"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("allgather+", "a layer has two halves; write <dispatch backend>+<experts backend>"),
        ("a+b+c", "a layer has two halves"),
        ("allgather+deepep", "unknown backend 'deepep'"),
        ("third_party_halves:broken+allgather", "cannot be constructed: OSError: no device"),
        ("allgather+allgather", "allgather has no experts; put a backend that has after +"),
        ("third_party_halves:mathematician+allgather", "has no dispatch and combine; put a backend that has before +"),
    ],
)
def test_pairs_that_make_no_layer(third_party: str, name: str, message: str) -> None:
    with pytest.raises(BackendError) as caught:
        backend(name)
    assert message in str(caught.value)
    assert repr(name) in str(caught.value)
