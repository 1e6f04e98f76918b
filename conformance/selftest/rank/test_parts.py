"""Additivity of the experts: a slot or a shard that counts otherwise in company than alone is found.

Scope: rank/parts.py, and the two relations in rank/expert_program.py on the specification's experts. A pass proves
nothing about a backend.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
import torch.distributed as dist

from accelerated.experts import ExpertContract, ExpertOperation
from accelerated.interface import RankContext
from accelerated.reference_experts import Always, ReferenceExperts, contract
from conformance.cases import LayerCase, LayerCell, Relation
from conformance.engine.protocol import Mismatch
from conformance.layer_rules import relations_of, takes
from conformance.rank.expert_program import ExpertProgram
from conformance.rank.inputs import Inputs
from conformance.rank.parts import one_slot_each, slot_calls, slots_together
from conformance.rank.relations import second_call
from conformance.selftest.suite.layer_cells import PLAIN, experts_cell, experts_contract, one
from reference.codecs import STANDARD
from reference.expert_numerics import SlotSum, WeightStage

CPU = torch.device("cpu")
#: A quantiser of the intermediate whose groups are not known: no acceptance sees a small slot.
WIDE = replace(PLAIN, intermediate_codec=STANDARD["mxfp4_up"], intermediate_any_group=True)
OPERATOR = "experts.bf16"


class Broken(ReferenceExperts):
    """Experts that go wrong in company: only where several slots of a token count, or several experts are held."""

    def __init__(self, cell: LayerCell, change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        problem = cell.problem()
        super().__init__(problem, OPERATOR)  # type: ignore[arg-type]
        self._change = change

    def experts(
        self,
        rows: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        *,
        scales: torch.Tensor | None = None,
        num_rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return super().experts(rows, ids, self._change(weights, ids), scales=scales, num_rows=num_rows)


def right(weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return weights


def drops_the_least(weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The least of several weights is taken for zero."""
    several = (weights != 0).sum(1, keepdim=True) > 1
    least = torch.where(weights == 0, torch.inf, weights.abs()).argmin(1, keepdim=True)
    return torch.where(several, weights.scatter(1, least, 0.0), weights)


def judged(
    relation: Relation,
    change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    declared: ExpertContract,
    whole: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = right,
) -> Mismatch | None:
    cell = experts_cell(kernel_type=OPERATOR, shards=2 if relation == "shards added" else 1)
    tokens = [(t, t + 3, t + 5, t + 6) for t in range(2)]
    case = one(cell, *tokens, relation=relation, values="normal", weighting="signed", seed=3)
    assert takes(declared, case)
    return run(case, change, declared, whole)


def run(
    case: LayerCase,
    change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    declared: ExpertContract,
    whole: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> Mismatch | None:
    cell, alone = case.cell, msgspec.structs.replace(case.cell, shards=1)
    with tempfile.TemporaryDirectory() as directory:
        store = dist.FileStore(str(Path(directory) / "store"))  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            context = RankContext(0, 1, CPU, dist.group.WORLD, "")  # type: ignore[arg-type]
            shards: Sequence[ExpertOperation] = [Broken(cell, change) for _ in range(cell.shards)]
            program = ExpertProgram(
                context, list(shards), declared, "reference", cell, lambda: (Broken(alone, whole), declared)
            )
            return program.run(case, lambda name, index: None)[0]
        finally:
            dist.destroy_process_group()


def contract_of(numerics: object = None) -> ExpertContract:
    declared = contract(experts_cell().problem(), OPERATOR)  # type: ignore[arg-type]
    return declared if numerics is None else replace(declared, numerics=Always(numerics))  # type: ignore[arg-type]


def test_a_slot_that_is_lost_in_company_only_is_found_where_the_acceptance_is_wide() -> None:
    assert judged("slots apart", right, contract_of()) is None
    wide = contract_of(WIDE)
    assert judged("", drops_the_least, wide) is None  # which is why there is such a relation
    found = judged("slots apart", drops_the_least, wide)
    assert found is not None
    assert found.check == "experts.parts"
    loose = replace(wide, deterministic=False)
    assert judged("slots apart", drops_the_least, loose) is None  # nothing is promised
    assert judged("slots apart", drops_the_least, replace(loose, one_term_bits=True)) is not None


@pytest.mark.parametrize("kind", SlotSum)
def test_slots_add_up_under_every_kind_of_sum(kind: SlotSum) -> None:
    numerics = replace(PLAIN, slot_sum=kind)
    generator = torch.Generator().manual_seed(1)
    exact = torch.randn(5, 7, 16, generator=generator)
    weights = torch.ones(7, 5)
    alone = [term.bfloat16() for term in exact]
    total = alone[0].float() if kind is not SlotSum.FLOAT32 else exact[0]
    for term, stored in zip(exact[1:], alone[1:], strict=True):
        total = total + (term if kind is SlotSum.FLOAT32 else stored.float())
        total = total.bfloat16().float() if kind is SlotSum.ATOMIC else total
    whole = slots_together(alone, weights, numerics, torch.bfloat16)
    assert float(whole.error_over_bound(total.bfloat16()).max()) <= 1
    without = slots_together([torch.zeros_like(alone[0]), *alone[1:]], weights, numerics, torch.bfloat16)
    assert (without.error_over_bound(total.bfloat16()) > 1).double().mean() > 0.5


def test_calls_taken_apart_are_the_whole_again() -> None:
    given = Inputs(torch.randn(3, 8), torch.zeros(3, 4, dtype=torch.int32), torch.randn(3, 4))
    calls = slot_calls(given)
    assert torch.equal(torch.stack([call.weights for call in calls]).sum(0), given.weights)
    assert all(int((call.weights != 0).sum()) == 3 and torch.equal(call.ids, given.ids) for call in calls)


def test_one_rank_with_every_expert_is_judged_and_compared_with_the_shards() -> None:
    assert judged("shards added", right, contract_of()) is None
    found = judged("shards added", right, contract_of(), whole=drops_the_least)
    assert found is not None
    assert found.check == "experts.shards"
    assert found.message.startswith("one rank with every expert")
    wide = contract_of(WIDE)
    found = judged("shards added", right, wide, whole=drops_the_least)
    assert found is not None
    assert found.message.startswith("the shards added up")
    # Which is all that sees it, and only where bits are promised.
    assert judged("shards added", right, replace(wide, bits_at_any_shards=False), whole=drops_the_least) is None


def test_every_shard_has_its_first_slot_of_a_row() -> None:
    ids = torch.tensor([[0, 1, 4, 5], [4, -1, -1, 0], [3, 2, 1, 0]])
    shard_of = torch.tensor([0, 0, 0, 0, 1, 1])
    found = one_slot_each(ids, torch.full((3, 4), 2.0), shard_of)
    assert found.tolist() == [[2, 0, 2, 0], [2, 2, 0, 2], [2, 0, 0, 0]]


def test_relations_that_say_nothing_are_not_asked_for() -> None:
    cell = experts_cell()
    assert {"slots apart", "shards added", "masked routes", "larger buffer"} <= set(
        relations_of(experts_contract(), cell)
    )
    early = experts_contract(numerics=Always(replace(PLAIN, weight_stage=WeightStage.BEFORE_ACTIVATION)))
    assert {"scaled weights", "slots apart"}.isdisjoint(relations_of(early, cell))
    assert "masked routes" not in relations_of(experts_contract(drops_masked=False), cell)
    assert "larger buffer" not in relations_of(experts_contract(takes_num_rows=False), cell)
    assert "shards added" not in relations_of(experts_contract(), experts_cell(shards=1))
    assert {"slot order", "slots apart"}.isdisjoint(relations_of(experts_contract(), experts_cell(top_k=1)))
    assert "expert order" not in relations_of(experts_contract(), experts_cell(experts=4, shards=4))
    full = one(cell, *[(0, 1, 2, 3)] * cell.capacity, relation="larger buffer", counted=True)
    assert not takes(experts_contract(), full)
    assert takes(experts_contract(), one(cell, (0, 1, 2, 3), relation="larger buffer", counted=True))
    # One rank that holds every expert may have no mask to drop a slot with.
    assert not takes(experts_contract(), one(cell, (-1, 1, 2, 3), relation="shards added"))
    assert takes(experts_contract(), one(cell, (0, 1, 2, 3), relation="shards added"))
    assert not takes(experts_contract(), one(cell, (0, 1, 2, 3), relation="larger buffer"))


def test_a_zero_route_names_another_expert_and_a_masked_one_none() -> None:
    """The second calls of these relations differ from the first wherever a weight is zero, and only there."""
    ids = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 8]], dtype=torch.int32)
    weights = torch.tensor([[0.0, 1, 0, 2], [1, 0, 1, 0.0]])
    given = Inputs(torch.ones(2, 8), ids, weights)
    zero = second_call("zero routes", given, 2, experts_contract(), 0, experts=8, room=9)
    assert torch.equal(zero.ids != ids, (weights == 0) & (ids < 8))
    assert all(len(set(row)) == 4 for row in zero.ids.tolist())
    masked = second_call("masked routes", given, 2, experts_contract(), 0, experts=8, room=9)
    assert torch.equal(masked.ids == -1, weights == 0)
    assert bool((masked.weights != 0).all())
    with pytest.raises(ValueError, match="room for 2"):
        second_call("larger buffer", given, 2, experts_contract(), 0, experts=8, room=2)
