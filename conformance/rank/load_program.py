"""The program of a layer whose experts are replicated: outputs, replicas, and the load that each rank counts.

A rebalance weighs loads, and a rank sees only its own experts, but tokens of every rank: a load counted from the
rank's own tokens gives placements that look reasonable and are wrong. After the last round each rank's counts are
compared with those of all ranks' tokens, which every rank knows from the routing and the replica maps, and the sum over
ranks and replicas with how often the tokens name each logical expert; both are exact. Then the last round is run again
with every expert placed otherwise: where the contract promises the bits of a single term, the outputs must have them,
which an acceptance of experts that do not say how they round could not tell. What a pass does not prove: that the load
reaches a rebalance, or that what it does with it is any good.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from accelerated.experts import LayerContract, LayerOperation
from accelerated.interface import RankContext
from conformance.cases import LayerCase, LayerCell, Rows, expand
from conformance.engine.protocol import Mismatch
from conformance.layer_pairs import one_term, rows_keep_bits
from conformance.rank.judge_experts import judge_equal
from conformance.rank.layer_program import LayerProgram, tables_of
from conformance.rank.phases import SetPhase
from conformance.rank.recorded_layer import RecordedLayer
from reference import eplb
from reference.eplb_tensors import physical_ids, physical_load
from reference.placement import owned_experts


class LoadProgram:
    """A :class:`conformance.rank.layer_program.LayerProgram` that judges loads as well."""

    def __init__(
        self, context: RankContext, operation: LayerOperation, contract: LayerContract, judged_by: str, cell: LayerCell
    ) -> None:
        self._context, self._cell, self._contract = context, cell, contract
        self._layer = RecordedLayer(operation, loads=True)
        self._program = LayerProgram(context, self._layer, contract, judged_by, cell)

    def run(self, case: LayerCase, phase: SetPhase) -> tuple[Mismatch | None, float]:
        """Run and judge a case; the first failed check of this rank and the largest error/bound."""
        self._layer.clear()
        mismatch, ratio = self._program.run(case, phase)
        # Collective, so whatever the outputs are; a rank that raised ends the others' waiting by its answer.
        found = self._judge_loads(case, [load.cpu() for load in self._layer.loads])
        moved = self._judge_replicas(case, phase) if replicas_promised(self._contract, case) else None
        return mismatch or found or moved, ratio

    def _judge_replicas(self, case: LayerCase, phase: SetPhase) -> Mismatch | None:
        """The last round once more, with every replica on another rank and its tokens on other replicas. Collective."""
        last = len(case.rounds) - 1
        first = self._layer.outputs[last]
        output = self._program.again(case, last, tuple(reversed(tables_of(case)[last])), phase)
        rows = expand(case.cell, case.rounds[last].routing, self._context.rank)[self._context.rank]
        whose = "those that other replicas of the same experts gave"
        return judge_equal("eplb.replicas", last, output, first, rows, self._context.rank, whose)

    def _judge_loads(self, case: LayerCase, loads: list[torch.Tensor]) -> Mismatch | None:
        cell, rank = self._cell, self._context.rank
        tables = tables_of(case)
        routings = [expand(cell, a_round.routing) for a_round in case.rounds]
        wanted = [load_of(rows, table, cell) for rows, table in zip(routings, tables, strict=True)]
        owned = list(owned_experts(cell.experts, cell.world_size, rank))
        total = torch.zeros(len(loads), cell.experts, dtype=torch.int64)
        well_formed = [tuple(one.shape) == (len(owned),) and one.dtype == torch.int64 for one in loads]
        for index, load in enumerate(loads):
            if well_formed[index]:
                total[index, owned] = load
        everywhere = total.to(self._context.device)
        dist.all_reduce(everywhere, group=self._context.group)
        for index, load in enumerate(loads):
            if not well_formed[index]:
                said = f"returned {list(load.shape)} {load.dtype}"
                return Mismatch("eplb.load", index, said, got=said, wanted=f"[{len(owned)}] torch.int64")
            mismatch = judge_load(index, load, wanted[index][owned], owned) or judge_logical_load(
                index, everywhere[index].tolist(), tables[index], routings[index], cell.logical
            )
            if mismatch is not None:
                return mismatch
        return None


def replicas_promised(contract: LayerContract, case: LayerCase) -> bool:
    """Whether the last round has the same bits wherever its experts lie: one term, in a buffer of one size."""
    return (
        contract.buffer_rows is not None and rows_keep_bits(contract.experts) and one_term(case.cell, case.rounds[-1])
    )


def load_of(rows: Rows, table: tuple[int, ...], cell: LayerCell) -> torch.Tensor:
    """Load int64 ``[P]`` of all ranks' tokens ``rows`` under a map: each rank's replicas follow from its own rows."""
    maps = eplb.logical_maps(table, cell.logical)
    loads = [torch.zeros(cell.experts, dtype=torch.int64)]
    for tokens in rows:
        ids = torch.tensor(tokens, dtype=torch.int64).reshape(len(tokens), cell.top_k)
        loads.append(physical_load(physical_ids(ids, maps), cell.experts, len(tokens)))
    return torch.stack(loads).sum(0)


def judge_load(index: int, got: torch.Tensor, wanted: torch.Tensor, owned: list[int]) -> Mismatch | None:
    """Counts of one rank's physical experts ``owned`` against those of all ranks' tokens."""
    if torch.equal(got, wanted):
        return None
    slot = int((got != wanted).nonzero()[0])
    return Mismatch(
        "eplb.load",
        index,
        f"the load of this rank's physical experts {owned} is {got.tolist()}, and {wanted.tolist()} slots of all "
        f"ranks' tokens came to them; first at physical expert {owned[slot]}",
        got=str(int(got[slot])),
        wanted=str(int(wanted[slot])),
        bound="the same count",
    )


def judge_logical_load(
    index: int, physical: list[int], table: tuple[int, ...], rows: Rows, logical: int
) -> Mismatch | None:
    """Counts of all ranks, summed over replicas, against how often the tokens name each logical expert."""
    named = [0] * logical
    for expert in (e for tokens in rows for row in tokens for e in row if e >= 0):
        named[expert] += 1
    got = [int(count) for count in eplb.logical_load(table, physical, logical)]
    if got == named:
        return None
    expert = next(e for e in range(logical) if got[e] != named[e])
    return Mismatch(
        "eplb.logical_load",
        index,
        f"the loads of all ranks, summed over replicas, are {got}, and the tokens name the logical experts {named} "
        f"times; first at logical expert {expert}",
        got=str(got[expert]),
        wanted=str(named[expert]),
        bound="the same count",
    )
