"""The program of the sort of (token, slot) pairs by local expert: exact, for every expert-parallel rank in turn.

Scope: what of a sort's buffers is defined, against :mod:`reference.sorting`; what lies behind it is not looked at. What
a pass does not prove: anything about the kernels that read the sort.
"""

from __future__ import annotations

import torch

from accelerated.interface import RankContext
from accelerated.sorting import SortContract, SortOperation, SortResult
from conformance.cases import LayerCase, LayerCell, expand
from conformance.engine.protocol import Mismatch
from conformance.rank.guard import backend_code, expect_tensor, synchronise
from conformance.rank.inputs import Inputs
from conformance.rank.layer_inputs import layer_inputs, poisoned
from conformance.rank.phases import SetPhase
from reference.placement import owned_experts
from reference.sorting import Sorted, sort


class SortProgram:
    """One cell's operators, one per shard, ready to run cases."""

    def __init__(
        self, context: RankContext, operations: list[SortOperation], contract: SortContract, cell: LayerCell
    ) -> None:
        self._context, self._operations, self._contract, self._cell = context, operations, contract, cell
        self._slots = []
        for shard, operation in enumerate(operations):
            owned = owned_experts(cell.experts, cell.shards, shard, cell.placement)
            with backend_code():
                operation.place(owned)
            slots = torch.full((cell.experts,), -1, dtype=torch.int64, device=context.device)
            slots[torch.tensor(owned)] = torch.arange(len(owned), device=context.device)
            self._slots.append(slots)

    def run(self, case: LayerCase, phase: SetPhase) -> tuple[Mismatch | None, float]:
        """Run and judge a case; the first failed check, and no ratio: a sort is right or wrong."""
        for index, a_round in enumerate(case.rounds):
            phase("inputs", index)
            inputs = layer_inputs(case, index, 0, expand(case.cell, a_round.routing), self._context.device)
            counted = self._contract.takes_num_rows and (a_round.tail > 0 or a_round.counted)
            valid = inputs.rows.shape[0]
            given = poisoned(inputs, a_round.tail if counted else 0, self._cell.experts)
            for shard in range(len(self._operations)):
                phase("call", index)
                mismatch = self._one(shard, index, given, valid if counted else None)
                if mismatch is not None:
                    return mismatch, 0.0
        return None, 0.0

    def _one(self, shard: int, index: int, given: Inputs, count: int | None) -> Mismatch | None:
        device = self._context.device
        handed = given.clone()
        limit = None if count is None else torch.full((1,), count, dtype=torch.int32, device=device)
        with backend_code():
            found = self._operations[shard].sort(handed.ids, handed.weights, num_rows=limit)
            for name in ("entries", "weights", "experts", "totals"):
                expect_tensor(name, getattr(found, name), device)
            if self._contract.clears:
                expect_tensor("output", found.output, device)
        synchronise(device)
        wanted = sort(given.ids, given.weights, self._slots[shard], self._contract.block, num_rows=count)
        where = f"shard {shard} of {self._cell.shards}: "
        shape = (given.rows.shape[0], self._cell.hidden) if self._contract.clears else None
        mismatch = _bad_layout(index, found, where, shape, self._cell.dtype) or judge_sort(
            index, found, wanted, where, clears=self._contract.clears
        )
        if mismatch is None and not (
            torch.equal(handed.ids, given.ids) and torch.equal(handed.weights.nan_to_num(), given.weights.nan_to_num())
        ):
            mismatch = Mismatch("inputs.modified", index, f"{where}the backend changed its ids or weights")
        return mismatch


def _bad_layout(
    index: int, found: SortResult, where: str, output: tuple[int, int] | None, dtype: str
) -> Mismatch | None:
    """Element types and dimensions of a sort's buffers; ``output``: shape of the one that is cleared, if any."""
    for name, kind in (
        ("entries", torch.int32),
        ("weights", torch.float32),
        ("experts", torch.int32),
        ("totals", torch.int32),
    ):
        got = getattr(found, name)
        least = 2 if name == "totals" else 0
        if got.dtype != kind or got.dim() != 1 or got.shape[0] < least:
            message = f"{where}{name} are {list(got.shape)} {got.dtype}"
            return Mismatch("sort.layout", index, message, got=message, wanted=f"one dimension of {kind}")
    if output is not None and found.output is not None:
        wanted = getattr(torch, dtype)
        if tuple(found.output.shape) != output or found.output.dtype != wanted:
            message = f"{where}the cleared buffer is {list(found.output.shape)} {found.output.dtype}"
            return Mismatch("sort.layout", index, message, got=message, wanted=f"{list(output)} {wanted}")
    return None


def judge_sort(index: int, found: SortResult, wanted: Sorted, where: str, *, clears: bool) -> Mismatch | None:
    """Compare the defined part of a sort with the model's; ``clears``: the rows that count of the output are zero."""
    totals = found.totals[:2].tolist()
    total = len(wanted.entries)
    if totals != [total, wanted.rows]:
        message = f"{where}{totals[0]} entries of {totals[1]} rows are said to be in use"
        return Mismatch("sort.totals", index, message, got=str(totals), wanted=str([total, wanted.rows]))
    for name, got, want in (
        ("entries", found.entries, wanted.entries),
        ("weights", found.weights, wanted.weights),
        ("experts", found.experts, wanted.experts),
    ):
        if got.shape[0] < want.shape[0]:
            message = f"{where}{got.shape[0]} {name}, {want.shape[0]} are in use"
            return Mismatch(f"sort.{name}", index, message)
        differ = (got[: want.shape[0]].to(want.dtype) != want).nonzero().flatten().tolist()
        if differ:
            at = differ[0]
            message = f"{where}{len(differ)} of {want.shape[0]} {name} differ, the first at {at}"
            return Mismatch(f"sort.{name}", index, message, got=str(got[at].item()), wanted=str(want[at].item()))
    if clears and found.output is not None and bool((found.output[: wanted.rows] != 0).any()):
        return Mismatch("sort.cleared", index, f"{where}rows that the experts add to are not zero")
    return None
