"""Weights, inputs and judgement of experts' cases: distinct experts, poison in its place, verdicts with coordinates.

Scope: rank/expert_weights.py, layer_inputs.py, judge_experts.py, relations.py on tensors. A pass proves nothing about
a backend.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from conformance.cases import LayerRound, Relation, Values, Weighting
from conformance.layer_rules import RELATIONS
from conformance.rank.expert_weights import weights_of
from conformance.rank.inputs import Inputs
from conformance.rank.judge_experts import judge_layout, judge_output, judge_same_bits
from conformance.rank.layer_inputs import layer_inputs, poisoned
from conformance.rank.relations import second_call
from conformance.selftest.suite.layer_cells import experts_cell, experts_contract, one
from reference.codecs import STANDARD, Codec
from reference.expert_weights import ExpertWeights
from reference.intervals import Interval

CPU = torch.device("cpu")
#: Relations of one call with a second one; the others are those of test_parts.py.
TWO_CALLS = tuple(name for name in RELATIONS if name not in ("slots apart", "shards added"))
CODECS: dict[str, Codec | None] = {
    "bf16": None,
    "token": STANDARD["token_fnuz"],
    "block": STANDARD["block128_fnuz"],
    "mxfp4": STANDARD["mxfp4_up"],
}


def made(names: list[int], codec: Codec | None, *, biased: bool = False) -> ExpertWeights:
    return weights_of(names, hidden=128, intermediate=128, codec=codec, dtype=torch.bfloat16, biased=biased, device=CPU)


@pytest.mark.parametrize("name", CODECS)
def test_every_expert_differs_from_every_other(name: str) -> None:
    first, second = made(list(range(12)), CODECS[name]).dequantised()
    for matrices in (first, second):
        assert matrices.isfinite().all()
        assert matrices.abs().amax((1, 2)).min() > 0
        for left, right in itertools.combinations(range(12), 2):
            # More than half of the elements: one row that goes to the wrong expert shows in every output element.
            assert (matrices[left] != matrices[right]).double().mean() > 0.5


@pytest.mark.parametrize("name", CODECS)
def test_an_expert_is_what_it_is_whoever_holds_it(name: str) -> None:
    many, alone = made([4, 9, 2], CODECS[name], biased=True), made([9], CODECS[name], biased=True)
    picked = many.pick([1])
    for field in ("w1", "w2", "w1_scales", "w2_scales", "bias1", "bias2"):
        left, right = getattr(picked, field), getattr(alone, field)
        assert left is right is None or torch.equal(left, right)


def test_integers_stay_exact_in_float32() -> None:
    first, _ = made([0, 1], None).dequantised()
    rows = torch.randint(-8, 9, (16, 128)).double()
    exact = rows @ first[0].T
    assert torch.equal((rows.float() @ first[0].float().T).double(), exact)


def test_odd_experts_have_scales_that_are_no_powers_of_two() -> None:
    scales = made([0, 1], STANDARD["block128_fnuz"]).w1_scales
    assert scales is not None
    mantissa = torch.frexp(scales).mantissa
    assert (mantissa[0] == 0.5).all()
    assert (mantissa[1] != 0.5).any()


@pytest.mark.parametrize("values", ["normal", "integers", "wide"])
@pytest.mark.parametrize("weighting", ["ones", "positive", "signed", "zeros", "single"])
def test_inputs_are_the_seeds_own_and_finite(values: Values, weighting: Weighting) -> None:
    rows = tuple((0, 1, 2, 3) for _ in range(24))
    case = one(experts_cell(), *rows, values=values, weighting=weighting, seed=5)
    found = layer_inputs(case, 0, 0, (rows,), CPU)
    again = layer_inputs(case, 0, 0, (rows,), CPU)
    other = layer_inputs(one(experts_cell(), *rows, values=values, weighting=weighting, seed=6), 0, 0, (rows,), CPU)
    assert torch.equal(found.rows, again.rows)
    assert not torch.equal(found.rows, other.rows)
    assert found.rows.isfinite().all()
    assert bool((found.weights < 0).any()) == (weighting in ("signed", "zeros", "single"))
    assert bool((found.weights == 0).any()) == (weighting in ("zeros", "single"))
    if weighting == "single":
        assert ((found.weights != 0).sum(1) == 1).all()


def test_what_lies_beyond_the_valid_rows_is_poison() -> None:
    given = Inputs(torch.ones(2, 64), torch.zeros(2, 4, dtype=torch.int32), torch.ones(2, 4))
    longer = poisoned(given, 5, 8)
    assert torch.equal(longer.rows[:2], given.rows)
    assert longer.rows[2:].isnan().any(1).sum() == 2
    assert (longer.rows[2::2] == torch.finfo(torch.float32).max).all()
    assert longer.weights[2:].isnan().all()
    assert ((longer.ids[2:] >= 0) & (longer.ids[2:] < 8)).all()


def test_one_bad_element_is_named() -> None:
    accepted = Interval(torch.zeros(3, 4).double(), torch.full((3, 4), -1.0).double(), torch.ones(3, 4).double())
    ids = torch.arange(6).reshape(3, 2)
    fine, ratio = judge_output("experts.output", 0, torch.full((3, 4), 0.5), accepted, ids)
    assert fine is None
    assert ratio == 0.5
    got = torch.zeros(3, 4)
    got[2, 1] = 1.25
    bad, ratio = judge_output("experts.output", 0, got, accepted, ids, where="shard 1: ")
    assert bad is not None
    assert (bad.token, bad.element, bad.got, bad.routed) == (2, 1, "1.25", "[4, 5]")
    assert bad.message == "shard 1: 1 of 12 elements in 1 of 3 rows are outside"
    got[2, 1] = torch.nan
    assert judge_output("experts.output", 0, got, accepted, ids)[0] is not None


def test_shapes_types_and_bits_are_told_apart() -> None:
    got = torch.zeros(2, 3, dtype=torch.bfloat16)
    assert judge_layout("experts.layout", 0, got, (2, 3), torch.bfloat16) is None
    assert judge_layout("experts.layout", 0, got, (2, 4), torch.bfloat16) is not None
    assert judge_layout("experts.layout", 0, got, (2, 3), torch.float16) is not None
    assert judge_same_bits("experts.bits", 0, got, got.clone(), "") is None
    other = got.clone()
    other[1, 2] = -0.0
    assert judge_same_bits("experts.bits", 0, got, other, "") is not None


@pytest.mark.parametrize("relation", TWO_CALLS)
def test_a_relation_undoes_itself_on_a_linear_map(relation: Relation) -> None:
    contract = experts_contract(bits_at_any_rows=True)
    generator = torch.Generator().manual_seed(4)
    # Integers, whose products and sums stay far below 2**24: float32 rounds nothing, in whatever order.
    rows = torch.randint(-8, 9, (5, 64), generator=generator).float()
    ids = torch.randint(0, 8, (5, 4), generator=generator, dtype=torch.int32)
    given = Inputs(rows, ids, torch.randint(1, 9, (5, 4), generator=generator).float())

    def experts(rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return rows * (weights * (1 + ids)).sum(1, keepdim=True)

    second = second_call(relation, given, 3, contract, 7, experts=8, room=64)
    back = second.back(experts(second.rows, second.ids, second.weights)[:3])
    assert torch.equal(back, experts(given.rows, given.ids, given.weights)[:3])
    if relation in ("zero routes", "masked routes"):
        assert (second.ids == given.ids).all()  # no weight is zero
    if relation in ("token order", "slot order", "scaled weights", "larger buffer"):
        changed = (second.rows, second.ids, second.weights)
        held = (given.rows, given.ids, given.weights)
        assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(changed, held, strict=True))


def test_bits_are_asked_for_only_where_they_are_promised() -> None:
    given = Inputs(torch.randn(5, 64), torch.zeros(5, 4, dtype=torch.int32), torch.randn(5, 4))
    loose = experts_contract(deterministic=False)
    for relation in TWO_CALLS:
        assert not second_call(relation, given, 5, loose, 7, experts=8, room=64).same_bits
    tight = experts_contract(bits_at_any_rows=True, boundaries=(10,))
    larger = second_call("larger buffer", given, 5, tight, 7, experts=8, room=64)
    assert not larger.same_bits  # the longer buffer takes the other path
    assert second_call(
        "larger buffer", given, 5, experts_contract(bits_at_any_rows=True), 7, experts=8, room=9
    ).same_bits
    assert LayerRound(one(experts_cell(), (0, 1, 2, 3)).rounds[0].routing).relation == ""
