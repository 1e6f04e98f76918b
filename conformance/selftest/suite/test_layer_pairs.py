"""Which layers are compared with which, and where their outputs have to be the same.

Scope: conformance/layer_pairs.py and conformance/suite/pair_plan.py, on contracts made up here and on the backends of
this project. A pass does not prove that a promise is kept; the cells themselves do.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from accelerated.contract import Contract, MaskedSlots, ReceiveLayout, RowOrder
from accelerated.interface import Backend
from accelerated.layer import LayerBackend, split_path
from accelerated.registry import backend
from conformance.case_files import validate_layer
from conformance.cases import CaseError, LayerCase, LayerCell, encode
from conformance.engine import layer_steps
from conformance.layer_generation import layer_cases, layer_ladder
from conformance.layer_pairs import misfit, one_term
from conformance.selftest.accelerated.layer_halves import DENSE, EVERYWHERE, GROUP, dispatch, experts, experts_contract
from conformance.selftest.faults.conftest import gate_options
from conformance.selftest.suite.layer_cells import layer_cell, layer_contract, one
from conformance.suite import kinds, layer_coverage
from conformance.suite.cells import Plan
from conformance.suite.controller import replayed_cases
from conformance.suite.describe import describe
from conformance.suite.plan import make_plan
from reference.catalogue import model_shapes

EXACT = Contract(ReceiveLayout.DENSE_ROWS, RowOrder.SOURCE, MaskedSlots.DROPPED, exact_rows=True)
SHAPES = tuple(model_shapes().values())
BOTH = "mori-standin+aiter-standin"


def cell(**changes: Any) -> LayerCell:
    """A layer of two ranks in a buffer of 16 rows, beside another one."""
    sizes = {"kernel_type": "fast/bf16", "backend": "sender+mathematician", "world_size": 2, "experts": 4}
    beside = {"against": "other+mathematician", "against_type": "slow", "hidden": 256, "intermediate": 128}
    return layer_cell(**(sizes | beside | {"capacity": 8} | changes))


def found(mine: Contract = DENSE, other: Contract = EVERYWHERE, codec: Any = None, **promises: Any) -> str:
    """Why two exchanges around experts with these promises need not agree."""
    sent: Any = [dispatch("sender", mine), dispatch("other", other)]
    contracts = {"bf16": experts_contract(codec, **promises)}
    computed: Any = [experts(declared=contracts) for _ in sent]
    made: list[Any] = [LayerBackend(half, one) for half, one in zip(sent, computed, strict=True)]
    return misfit(cell(), *made)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({}, ""),
        ({"rows_alone": False}, "promise no bits to a row among other rows"),
        ({"deterministic": False}, "promise no bits to a row among other rows"),
        ({"deterministic": False, "rows_alone": False, "one_term_bits": True}, ""),
        ({"other": EXACT}, "16 and as many as come rows, and the experts promise no bits to a row at another"),
        ({"other": EXACT, "bits_at_any_rows": True}, ""),
        ({"other": EXACT, "bits_at_any_rows": True, "boundaries": (15,)}, "take another path beyond 15"),
        ({"other": EXACT, "bits_at_any_rows": True, "boundaries": (16,)}, ""),
        ({"mine": EXACT, "other": EXACT, "rows_alone": False}, ""),
        ({"mine": EXACT, "other": EXACT, "rows_alone": False, "deterministic": False}, "promise no bits"),
        ({"mine": EXACT, "other": replace(EXACT, row_order=RowOrder.ANY), "rows_alone": False}, "promise no bits"),
        (
            {"other": replace(EVERYWHERE, masked_slots=MaskedSlots.UNMODELLED)},
            "masked slots are dropped and depends on the path taken",
        ),
        ({"mine": replace(DENSE, masked_slots=MaskedSlots.RANK_ZERO)}, ""),
        ({"takes_num_rows": False}, "the experts take no row count"),
    ],
)
def test_where_bits_are_promised(arguments: dict[str, Any], reason: str) -> None:
    said = found(**arguments)
    assert reason in said
    assert bool(reason) == bool(said)


def test_other_experts_and_other_wires_are_not_compared() -> None:
    made: Any = LayerBackend(dispatch(), experts())  # type: ignore[arg-type]
    strange: Any = LayerBackend(dispatch("other"), experts("poet"))  # type: ignore[arg-type]
    assert misfit(cell(), made, strange) == (
        "sender+mathematician has the experts of mathematician, other+poet those of poet"
    )
    quantised = experts(declared={"bf16": experts_contract(GROUP)})
    wired: Any = LayerBackend(dispatch("other"), quantised)  # type: ignore[arg-type]
    assert misfit(cell(), made, wired) == "the wires are the element type and fp8_group"


def test_one_term_is_one_slot_or_one_weight() -> None:
    assert one_term(cell(), one(cell(), (0, 1), weighting="single").rounds[0])
    assert not one_term(cell(), one(cell(), (0, 1), weighting="zeros").rounds[0])
    assert one_term(cell(top_k=1), one(cell(top_k=1), (0,), weighting="signed").rounds[0])


@seed(1)
@settings(max_examples=30, database=None)
@given(case=st.one_of(layer_cases(cell(top_k=1), layer_contract()), layer_cases(cell(top_k=2), layer_contract())))
def test_every_drawn_round_is_compared(case: LayerCase) -> None:
    validate_layer(case)
    assert all(one_term(case.cell, a_round) for a_round in case.rounds)


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_ladder_is_compared(top_k: int) -> None:
    beside = cell(top_k=top_k)
    (first,) = layer_ladder(beside, layer_contract())
    assert "outputs compared" in layer_coverage.classes(first)
    assert "outputs compared" in layer_coverage.required(beside, short=False, masked=False, quantised=False)
    plain = msgspec.structs.replace(first, cell=msgspec.structs.replace(beside, against="", against_type=""))
    assert "outputs compared" not in layer_coverage.classes(plain)


def test_a_cell_says_what_it_is_compared_with() -> None:
    beside = cell()
    assert beside.label.endswith("-against-other+mathematician-slow")
    assert (beside.other.backend, beside.other.kernel_type) == ("other+mathematician", "slow/bf16")
    assert (beside.other.against, beside.other.against_type) == ("", "")
    assert "compared with other+mathematician, slow/bf16" in describe(one(beside, (0, 1)))[0]
    for wrong in ({"against": ""}, {"against_type": ""}, {"kernel_type": "bf16"}, {"router": "any"}, {"redundant": 2}):
        with pytest.raises(CaseError, match="against is"):
            validate_layer(one(cell(**wrong), (0, 1)))


def test_a_comparison_that_does_not_matter_goes() -> None:
    plainer = [c.cell for c in layer_steps.settings(one(cell(), (0, 1)))]
    assert any(not found.against and not found.against_type for found in plainer)
    assert layer_steps.size(one(cell(), (0, 1))) > layer_steps.size(one(cell(against="", against_type=""), (0, 1)))


# ---------------------------------------------------------------------------------------------------- the plan
def plan(*names: str, companions: tuple[str, ...] = (), **options: Any) -> Plan:
    made: list[tuple[str, Backend, bool]] = [(n, backend(n), n in companions) for n in (*names, *companions)]
    wanted: dict[str, Any] = {"tier": "gate", "ep_sizes": (1, 2, 4, 8), "kernel_types": (), "models": SHAPES}
    return make_plan(made, **(wanted | options))


def compared(found: Plan) -> list[LayerCell]:
    return [p.cell for p in found.cells if isinstance(p.cell, LayerCell) and p.cell.against]


def test_every_path_is_compared_at_one_size() -> None:
    cells = compared(plan(BOTH))
    assert {(c.against, c.against_type) for c in cells} == {("allgather+aiter-standin", "naive")}
    paths = [c.kernel_type for c in cells]
    assert len(set(paths)) == len(paths) == 18, "six kernel types, three experts"
    found = {(split_path(c.kernel_type).operator, c.top_k) for c in cells}
    assert found == {(f"fused_moe.{s}", k) for s in ("bf16", "fp8_token", "fp8_block") for k in (1, 3)}
    # All sizes taken together, for one slot and for several.
    assert {(c.world_size, c.top_k) for c in cells} == {(size, k) for size in (2, 4, 8) for k in (1, 3)}
    assert not compared(plan(BOTH, tier="smoke"))
    assert not compared(plan("reference", companions=(BOTH,)))


@pytest.mark.parametrize("asked", [{"tier": "explore"}, {"operators": ("fused_moe.bf16",)}])
def test_where_experts_are_named_every_size_is_compared(asked: dict[str, Any]) -> None:
    cells = [c for c in compared(plan(BOTH, **asked)) if c.kernel_type == "IntraNode/fused_moe.bf16"]
    assert sorted((c.world_size, c.top_k) for c in cells) == [(size, k) for size in (2, 4, 8) for k in (1, 3)]


@pytest.mark.parametrize(
    ("names", "against"),
    [
        (("allgather+aiter-standin",), {"replicated+aiter-standin"}),
        (("reference+reference",), {"reference+reference"}),
        ((BOTH, "replicated+aiter-standin"), {"replicated+aiter-standin", BOTH, "allgather+aiter-standin"}),
        (("mori-standin+reference",), set()),
    ],
)
def test_the_first_exchange_that_has_to_agree_is_taken(names: tuple[str, ...], against: set[str]) -> None:
    found = plan(*names, ep_sizes=(2, 4))
    assert {c.against for c in compared(found)} == against
    assert all(c.against != c.backend or c.against_type not in c.kernel_type for c in compared(found))
    told = [u.reason for u in found.unsupported if "not compared" in u.reason]
    assert bool(told) == (not against)
    assert all("promise no bits to a row among other rows" in reason for reason in told)


def test_a_reduced_case_stays_comparable() -> None:
    (first, *_) = [c for c in compared(plan(BOTH)) if c.top_k == 1]
    case = one(first, (0,))
    assert kinds.legal(backend(BOTH), case, "gfx942")
    other = msgspec.structs.replace(first, against="allgather+reference")
    assert not kinds.legal(backend(BOTH), msgspec.structs.replace(case, cell=other), "gfx942")


def test_a_recorded_case_is_replayed_only_beside_what_it_may_be_compared_with(tmp_path: Path) -> None:
    (first, *_) = [c for c in compared(plan(BOTH)) if c.top_k == 1]
    for against, runs in (
        ("allgather+aiter-standin", True),
        ("allgather+reference", False),
        ("nobody+reference", False),
    ):
        path = tmp_path / "case.json"
        path.write_bytes(encode(one(msgspec.structs.replace(first, against=against), (0,))))
        options = replace(gate_options(tmp_path), tier="replay", replay=(path,))
        if runs:
            ((_, case),) = replayed_cases(options, ())[0]
            assert case.cell.label.endswith("against-allgather+aiter-standin-naive")
            continue
        with pytest.raises(pytest.UsageError, match=f"outputs of {re.escape(against)}, naive: "):
            replayed_cases(options, ())
