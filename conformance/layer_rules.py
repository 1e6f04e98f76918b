"""What a contract takes of a case of experts or of a whole layer.

Scope: rules as data without torch, for the draws, the reduction and replay alike. That a case is taken does not prove
that a backend takes it.
"""

from __future__ import annotations

from typing import get_args

from accelerated.contract import MaskedSlots
from accelerated.experts import ExpertContract, LayerContract
from accelerated.sorting import SortContract
from conformance.cases import Explicit, LayerCase, LayerCell, LayerRound, Relation, Rows, routing_counts
from conformance.recipes import Row
from reference.expert_numerics import ExpertNumerics, WeightStage

RELATIONS: tuple[Relation, ...] = get_args(Relation)[1:]


def drops_masked(contract: ExpertContract | LayerContract) -> bool:
    """Whether slots of -1 contribute nothing on the whole path."""
    if isinstance(contract, LayerContract):
        return contract.masked_slots is MaskedSlots.DROPPED
    return contract.drops_masked


def takes_duplicates(contract: ExpertContract | LayerContract) -> bool:
    """Whether a row may name an expert twice."""
    return contract.experts.takes_duplicates if isinstance(contract, LayerContract) else contract.takes_duplicates


def without_repeats(rows: Rows, experts: int) -> Rows:
    """Every repeated id replaced by the next expert that its row does not name yet."""

    def changed(row: Row) -> Row:
        found: list[int] = []
        for expert in row:
            rest = ((expert + step) % experts for step in range(experts))
            found.append(expert if expert < 0 else next(e for e in rest if e not in found))
        return tuple(found)

    return tuple(tuple(map(changed, tokens)) for tokens in rows)


def relations_of(contract: ExpertContract, cell: LayerCell) -> tuple[Relation, ...]:
    """Relations that say something about a cell: the mathematics promises it and the contract takes the calls."""
    held: dict[Relation, bool] = {
        "slot order": cell.top_k + cell.shared > 1,
        "expert order": cell.experts > cell.shards,
        "larger buffer": contract.takes_num_rows,
        # Before a non-linear activation a factor is not one afterwards.
        "scaled weights": contract.numerics(1).weight_stage is WeightStage.AFTER_W2,
        "slots apart": contract.numerics(1).weight_stage is WeightStage.AFTER_W2 and cell.top_k + cell.shared > 1,
        "masked routes": contract.drops_masked,
        "shards added": cell.shards > 1,
    }
    return tuple(name for name in RELATIONS if held.get(name, True)) if cell.check != "sort" else ()


def suits(a_round: LayerRound, contract: ExpertContract, cell: LayerCell) -> bool:
    """Whether a round's relation has what it needs."""
    if not a_round.relation:
        return True
    if a_round.relation == "larger buffer":
        spare = cell.rows - sum(routing_counts(a_round.routing)) - a_round.tail
        if not (a_round.counted or a_round.tail) or spare < 1:
            return False
    if a_round.relation == "shards added":
        # One rank that holds every expert may look ids up unmasked, and its rows are not quantised twice.
        routing = a_round.routing
        masked = isinstance(routing, Explicit) and any(-1 in row for rows in routing.rows for row in rows)
        if masked or a_round.quantised:
            return False
    return a_round.relation in relations_of(contract, cell)


def takes(contract: ExpertContract | LayerContract, case: LayerCase) -> bool:
    """Whether the contract says something about every round of a case with explicit rows."""
    experts = contract.experts if isinstance(contract, LayerContract) else contract
    for a_round in case.rounds:
        rows = a_round.routing.rows if isinstance(a_round.routing, Explicit) else ()
        if (case.cell.router or not experts.takes_duplicates) and rows != without_repeats(rows, case.cell.logical):
            return False
        if (case.cell.router or not drops_masked(contract)) and any(-1 in row for tokens in rows for row in tokens):
            return False
        if isinstance(contract, LayerContract):
            continue
        if (a_round.tail or a_round.counted) and not experts.takes_num_rows:
            return False
        if not suits(a_round, experts, case.cell):
            return False
        if a_round.quantised and experts.wire is None:
            return False
        if rows and not rows[0] and not a_round.tail and not experts.takes_empty:
            return False
    return True


def as_experts(contract: SortContract) -> ExpertContract:
    """What the generator asks of a contract, for a sort."""
    return ExpertContract(
        numerics=lambda rows: ExpertNumerics(),
        takes_num_rows=contract.takes_num_rows,
        takes_remote=contract.masked,
        drops_masked=contract.masked,
        takes_duplicates=False,
        takes_empty=False,
    )
