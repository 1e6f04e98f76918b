"""The program of row operators: quantisers, norms, AllReduce + RMSNorm, routers; drained and free-running.

Inputs of every call are made first. *Drained* synchronises after each call; *free-running* runs every call without
host sync and without a collective of ours. What every call returned is copied on its stream, and compared with the copy
after the last call, because an operator may hand out a buffer and write to it again. Judging starts after the last
call; each rank judges its share of the rows, for the ranks' bits are compared first. What a pass does not prove:
anything about rows of another length.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from accelerated.interface import RankContext
from accelerated.operators import (
    Family,
    NormContract,
    NormOperation,
    NormResult,
    QuantContract,
    QuantOperation,
    QuantResult,
)
from accelerated.routers import RouteContract, RouteOperation, RouteResult
from conformance.engine.protocol import Mismatch
from conformance.rank import judge_routes, row_count
from conformance.rank.byte_views import byte_view
from conformance.rank.guard import backend_code, synchronise
from conformance.rank.judge_rows import Answered, judge_call
from conformance.rank.oracle_rows import judge_by_oracle
from conformance.rank.out_buffers import OutBuffers
from conformance.rank.phases import SetPhase
from conformance.rank.row_inputs import RowInputs
from conformance.row_cases import Call, Pattern, RowCase, RowCell
from conformance.row_values import DISTINCT, bias_of, poison, rows_of, shape_of, weight_of

RowOperation = QuantOperation | NormOperation | RouteOperation
RowContract = QuantContract | NormContract | RouteContract
RowResult = QuantResult | NormResult | RouteResult
#: Tensors of a result.
_NAMES = ("output", "residual", "codes", "scales")


class RowProgram:
    """One cell's operator and contract, ready to run cases."""

    def __init__(
        self,
        context: RankContext,
        operation: RowOperation,
        contract: RowContract,
        judged_by: str,
        cell: RowCell,
    ) -> None:
        self._context, self._operation, self._contract = context, operation, contract
        self._judged_by, self._cell = judged_by, cell
        self._shape = shape_of(cell, contract)
        self._dtype = getattr(torch, cell.dtype)
        self._compiled = self._compile() if cell.check == "compiled" else None

    def run(self, case: RowCase, phase: SetPhase) -> tuple[Mismatch | None, float]:
        """Run and judge a case; the first failed check of this rank and the largest error/bound."""
        phase("inputs", 0)
        pristine = [self._inputs(call) for call in case.calls]
        handed = [one.clone() for one in pristine]
        phase("expected", 0)
        terms = [self._terms(one.rows) for one in pristine]
        self._out = self._buffers(case)
        self._kept: list[dict[str, torch.Tensor]] = []
        eager: list[NormResult] = []
        if case.cell.check == "compiled":
            phase("call", 0)
            eager = self._eagerly(case, pristine)
        results = [self._call(index, call, handed[index], phase) for index, call in enumerate(case.calls)]
        self._synchronise()
        kept = self._kept
        phase("judge", 0)
        worst = 0.0
        # Before the first verdict: a rank that has one stops there, and the others would wait for it.
        differing = self._differing_ranks(results)
        for index, call in enumerate(case.calls):
            found = results[index]
            mismatch = self._side_effects(index, handed[index], pristine[index], found, kept[index])
            mismatch = mismatch or differing.get(index)
            if mismatch is None and eager:
                mismatch = _laid_out_otherwise(index, found, eager[index])
            if mismatch is None:
                mismatch = self._disturbed(index, pristine[index], found)
            if mismatch is None:
                answered = Answered(
                    terms=terms[index],
                    residual=pristine[index].residual,
                    weight=pristine[index].weight,
                    epsilon=call.epsilon,
                    scale=call.scale,
                    num_rows=call.num_rows,
                    result=found,
                    share=self._share(),
                )
                judge = judge_by_oracle if self._judged_by == "oracle" else judge_call
                mismatch, ratio = judge(index, answered, self._contract)
                worst = max(worst, ratio)
            if mismatch is not None:
                return mismatch, worst
        if self._cell.mode == "drained":
            return self._calls_of_fewer_rows(pristine, results), worst
        return None, worst

    def _disturbed(self, index: int, given: RowInputs, found: RowResult) -> Mismatch | None:
        """Rows of a router that a row beside them changed, before they are judged: it explains what they are. Calls the
        operator again."""
        if not isinstance(found, RouteResult) or self._cell.mode != "drained":
            return None
        router: RouteOperation = self._operation  # type: ignore[assignment]
        assert isinstance(self._contract, RouteContract)
        return judge_routes.disturbed(index, router, self._contract, given, found)

    def _calls_of_fewer_rows(self, pristine: list[RowInputs], results: list[RowResult]) -> Mismatch | None:
        """Last, because it calls the operator again."""
        for index, (given, found) in enumerate(zip(pristine, results, strict=True)):
            if not isinstance(self._contract, QuantContract) or not isinstance(found, QuantResult):
                return None
            quantiser: QuantOperation = self._operation  # type: ignore[assignment]
            mismatch = row_count.mismatch(index, quantiser, self._contract, given, found)
            if mismatch is not None:
                return mismatch
        return None

    def _buffers(self, case: RowCase) -> OutBuffers | None:
        """Buffers for the calls that write to ours."""
        if isinstance(self._contract, RouteContract) or self._contract.codec is None:
            return None
        if not any(call.into for call in case.calls):
            return None
        return OutBuffers(self._contract.codec, self._context.device)

    def _eagerly(self, case: RowCase, pristine: list[RowInputs]) -> list[NormResult]:
        """Results of the operator itself, before it is called compiled."""
        norm: NormOperation = self._operation  # type: ignore[assignment]
        calls = zip(case.calls, pristine, strict=True)
        handed = ((call, given.clone()) for call, given in calls)
        return [norm.normalise(g.rows, g.residual, g.weight, call.epsilon) for call, g in handed]

    def _compile(self) -> Callable[..., NormResult]:
        """The operator under ``torch.compile``, compiled for the row counts that it specialises on."""
        norm: NormOperation = self._operation  # type: ignore[assignment]
        # Inductor needs a compiler on the host; without a GPU the tracing is what is of interest.
        kind = "inductor" if self._context.device.type == "cuda" else "aot_eager"
        compiled: Callable[..., NormResult] = torch.compile(norm.normalise, backend=kind, dynamic=True)
        least = 0 if self._contract.takes_empty else 1
        for rows in sorted({least, 1, self._cell.capacity}):
            call = Call(rows, (Pattern("normal"),), residual=(Pattern("normal"),))
            given = self._inputs(call)
            with backend_code():
                compiled(given.rows, given.residual, given.weight, call.epsilon)
        return compiled

    # ------------------------------------------------------------------ inputs
    def _inputs(self, call: Call) -> RowInputs:
        device = self._context.device
        rows = self._all_rows(call, self._context.rank)
        poison(call, rows)
        residual = None
        if isinstance(self._contract, NormContract) and self._contract.residual:
            # The same on every rank, as in a tensor-parallel layer.
            residual = self._all_rows(call, 0, residual=True)
        static = isinstance(self._contract, QuantContract) and self._contract.codec.static
        return RowInputs(
            rows,
            residual,
            self._weight(call),
            torch.full((1,), call.scale, dtype=torch.float32, device=device) if static else None,
            torch.full((1,), call.num_rows, dtype=torch.int32, device=device) if call.num_rows >= 0 else None,
        )

    def _weight(self, call: Call) -> torch.Tensor:
        """Of a norm, or the bias of a router in its own element type."""
        contract = self._contract
        if not isinstance(contract, RouteContract):
            return self._tensor(weight_of(call, self._cell))
        if not contract.takes_bias:
            return torch.empty(0, device=self._context.device)
        values = torch.as_tensor(bias_of(call, self._cell, contract.bias_dtype))
        return values.to(getattr(torch, contract.bias_dtype)).to(self._context.device)

    def _tensor(self, values: object) -> torch.Tensor:
        return torch.as_tensor(values).to(self._dtype).to(self._context.device)

    def _all_rows(self, call: Call, rank: int, *, residual: bool = False) -> torch.Tensor:
        distinct = self._tensor(rows_of(call, self._cell, self._shape, rank, residual=residual))
        if call.rows <= DISTINCT:
            return distinct
        return distinct[torch.arange(call.rows, device=distinct.device) % DISTINCT]

    def _terms(self, rows: torch.Tensor) -> torch.Tensor:
        """``[W, M, N]``: the rows of every rank."""
        if self._cell.world_size == 1:
            return rows.unsqueeze(0)
        terms = rows.new_empty(self._cell.world_size, *rows.shape)
        if rows.numel():
            dist.all_gather(list(terms), rows, group=self._context.group)
        return terms

    def _share(self) -> slice:
        identical = isinstance(self._contract, NormContract) and self._contract.ranks_identical
        return slice(self._context.rank, None, self._cell.world_size) if identical else slice(None)

    # ------------------------------------------------------------------ the backend
    def _call(self, index: int, call: Call, given: RowInputs, phase: SetPhase) -> RowResult:
        if call.delays_ms and call.delays_ms[self._context.rank]:
            time.sleep(call.delays_ms[self._context.rank] / 1000)
        phase("call", index)
        result: RowResult
        if isinstance(self._contract, RouteContract):
            router: RouteOperation = self._operation  # type: ignore[assignment]
            result = router.route(given.rows, given.weight if self._contract.takes_bias else None)
        elif self._cell.family is Family.QUANTISE:
            quantiser: QuantOperation = self._operation  # type: ignore[assignment]
            out = self._out.of(*given.rows.shape) if call.into and self._out is not None else None
            result = quantiser.quantise(given.rows, scale=given.scale, num_rows=given.num_rows, out=out)
            if out is not None:
                # What lies in the buffers counts, whatever came back; a later call may be given the same ones.
                static = given.scale is not None
                result = QuantResult(_copy(out.codes), _copy(result.scales if static else out.scales))
        else:
            norm: NormOperation = self._operation  # type: ignore[assignment]
            normalise = self._compiled or norm.normalise
            with backend_code():
                result = normalise(given.rows, given.residual, given.weight, call.epsilon)
        with backend_code():
            self._kept.append({name: tensor.clone() for name, tensor in tensors_of(result).items()})
        if self._cell.mode == "drained":
            self._synchronise()
        return result

    def _synchronise(self) -> None:
        synchronise(self._context.device)

    # ------------------------------------------------------------------ what no model is needed for
    def _side_effects(
        self,
        index: int,
        handed: RowInputs,
        pristine: RowInputs,
        result: RowResult,
        kept: dict[str, torch.Tensor],
    ) -> Mismatch | None:
        """Inputs left alone, results left alone by later calls."""
        in_place = isinstance(self._contract, NormContract) and self._contract.in_place
        for name, tensor in handed.tensors().items():
            if in_place and name in ("rows", "residual"):
                continue
            if not _same(tensor, pristine.tensors()[name]):
                return Mismatch("inputs.modified", index, f"the backend changed its input {name}")
        if self._out is not None and (where := self._out.damaged()):
            return Mismatch("outputs.guard", index, f"something was written behind the {where}")
        for name, tensor in tensors_of(result).items():
            if not _same(tensor, kept[name]):
                return Mismatch("outputs.overwritten", index, f"a later call changed the {name} that came back")
        return None

    def _differing_ranks(self, results: Sequence[RowResult]) -> dict[int, Mismatch]:
        """By call: which result is not the same on every rank. Compares digests of all of them in one exchange."""
        contract = self._contract
        if not isinstance(contract, NormContract) or not contract.ranks_identical or self._cell.world_size == 1:
            return {}
        mine = torch.zeros(len(results), len(_NAMES), dtype=torch.int64, device=self._context.device)
        for index, result in enumerate(results):
            for name, tensor in tensors_of(result).items():
                mine[index, _NAMES.index(name)] = _digest(tensor)
        everyone = [torch.zeros_like(mine) for _ in range(self._cell.world_size)]
        dist.all_gather(everyone, mine, group=self._context.group)
        found: dict[int, Mismatch] = {}
        for rank, other in enumerate(everyone):
            for index, place in (other != everyone[0]).nonzero().tolist():
                message = f"{_NAMES[place]} of rank {rank} and of rank 0 differ"
                found.setdefault(index, Mismatch("norm.ranks", index, message, source_rank=rank))
        return found


def tensors_of(result: RowResult) -> dict[str, torch.Tensor]:
    """Tensors of a result by name."""
    if isinstance(result, RouteResult):
        return {"weights": result.weights, "ids": result.ids}
    if isinstance(result, QuantResult):
        return {"codes": result.codes, "scales": result.scales}
    found = {"output": result.output, "residual": result.residual}
    if result.quantised is not None:
        found |= {"codes": result.quantised.codes, "scales": result.quantised.scales}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _laid_out_otherwise(index: int, compiled: RowResult, eager: RowResult) -> Mismatch | None:
    """Shapes, strides and element types of a compiled operator against the operator's own."""
    left, right = tensors_of(compiled), tensors_of(eager)
    if left.keys() != right.keys():
        return Mismatch(
            "compiled.layout", index, f"returned {sorted(left)}", got=str(sorted(left)), wanted=str(sorted(right))
        )
    for name, tensor in left.items():
        got, wanted = ((tuple(t.shape), t.stride(), t.dtype) for t in (tensor, right[name]))
        if got != wanted:
            return Mismatch("compiled.layout", index, f"{name} is laid out otherwise", got=str(got), wanted=str(wanted))
    return None


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides."""
    return tensor.clone(memory_format=torch.preserve_format)


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.shape == right.shape and torch.equal(byte_view(left), byte_view(right))


def _digest(tensor: torch.Tensor) -> torch.Tensor:
    """A number that depends on every byte and its place: int64 arithmetic wraps around, the same everywhere.

    Every (place, word of eight bytes) is mixed by itself before the sum, so that changes that cancel are no likelier
    than chance.
    """
    held = byte_view(tensor)
    size = held.numel()
    words = torch.nn.functional.pad(held, (0, -size % 8)).view(torch.int64)
    # Equal words at different places must differ before they are mixed; an odd factor loses nothing.
    mixed = words ^ (torch.arange(1, words.numel() + 1, device=held.device) * -0x61C8864680B583EB)
    for shift, factor in ((31, 0x7FB5D329728EA185), (27, 0x1DADEF4BC2DD44D), (33, 1)):
        # Without the mask the sign fills up, and a word would mix with its complement to the same.
        mixed = (mixed ^ ((mixed >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return mixed.sum() + size
