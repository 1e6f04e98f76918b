"""A rank's process group, backend session and current operator.

Order of life: process group, backend session (library initialisation), operators one after another, then the reverse.
Exceptions that come out of backend code are wrapped in :class:`BackendError`, so that a failing product and a failing
harness are never confused.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from accelerated.contract import exchange
from accelerated.experts import ExpertContract, LayerContract
from accelerated.interface import RankContext
from accelerated.operators import NormContract, NormOperation, NormResult, QuantContract, QuantOperation, QuantResult
from accelerated.registry import backend
from accelerated.routers import RouteContract
from accelerated.sorting import SortContract
from conformance.cases import AnyCase, AnyCell, Case, GraphCell, LayerCase, LayerCell, SequenceCell
from conformance.engine.protocol import Mismatch
from conformance.rank.cross_layer import Neighbours
from conformance.rank.expert_program import ExpertProgram
from conformance.rank.experts import LocalExperts
from conformance.rank.graph_program import graph_program
from conformance.rank.guard import backend_code, expect_tensor
from conformance.rank.guarded_exchange import GuardedExchange
from conformance.rank.guarded_layers import GuardedExperts, GuardedLayer, Together
from conformance.rank.guarded_routers import GuardedRouter
from conformance.rank.main import RankSetup
from conformance.rank.programs import Program
from conformance.rank.rendezvous import store_of
from conformance.rank.row_programs import RowProgram
from conformance.rank.sequence_program import sequence_program
from conformance.rank.sort_program import SortProgram
from conformance.rank.whole_experts import whole_experts
from conformance.rank.whole_layer import WholeLayerProgram, whole_layer
from conformance.row_cases import RowCase, RowCell

#: Programs of experts and layers.
AnyLayerProgram = WholeLayerProgram | ExpertProgram | SortProgram


class HarnessError(Exception):
    """Something of ours is inconsistent."""


class _GuardedQuantiser:
    """A quantiser whose exceptions are marked as the backend's."""

    def __init__(self, operation: QuantOperation) -> None:
        self._operation = operation

    def quantise(
        self,
        rows: torch.Tensor,
        *,
        scale: torch.Tensor | None = None,
        num_rows: torch.Tensor | None = None,
        out: QuantResult | None = None,
    ) -> QuantResult:
        with backend_code():
            result = self._operation.quantise(rows, scale=scale, num_rows=num_rows, out=out)
            _expect_kind("the quantiser's result", result, QuantResult)
            expect_tensor("codes", result.codes, rows.device)
            expect_tensor("scales", result.scales, rows.device)
            return result

    def close(self) -> None:
        with backend_code():
            self._operation.close()


class _GuardedNorm:
    """A norm whose exceptions are marked as the backend's."""

    def __init__(self, operation: NormOperation) -> None:
        self._operation = operation

    def normalise(
        self, rows: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, epsilon: float
    ) -> NormResult:
        with backend_code():
            result = self._operation.normalise(rows, residual, weight, epsilon)
            _expect_kind("the norm's result", result, NormResult)
            for name in ("output", "residual"):
                if getattr(result, name) is not None:
                    expect_tensor(name, getattr(result, name), rows.device)
            if result.quantised is not None:
                _expect_kind("quantised output", result.quantised, QuantResult)
                expect_tensor("codes", result.quantised.codes, rows.device)
                expect_tensor("scales", result.quantised.scales, rows.device)
            return result

    def close(self) -> None:
        with backend_code():
            self._operation.close()


def _expect_kind(name: str, got: object, kind: type, *, optional: bool = False) -> None:
    """What is no result at all is the backend's failure, too.

    Raises:
        TypeError: ``got`` is something else.
    """
    if not isinstance(got, kind) and not (optional and got is None):
        raise TypeError(f"{name} is {type(got).__name__}; the interface asks for {kind.__name__}")


class RankSession:
    """Everything a rank keeps between commands."""

    def __init__(self, setup: RankSetup, phase: Callable[[str, int], None]) -> None:
        self._setup, self._phase = setup, phase
        # Eight ranks on two cores: one thread each, or they thrash.
        torch.set_num_threads(1)
        device = torch.device(setup.device)
        cuda = device.type == "cuda"
        if cuda:
            torch.cuda.set_device(device)
        phase("process group", 0)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=store_of(setup),
            rank=setup.rank,
            world_size=setup.world_size,
            timeout=datetime.timedelta(hours=1),  # the driver's limits are the ones that count
        )
        group = dist.group.WORLD
        assert group is not None
        self._context = RankContext(setup.rank, setup.world_size, device, group, setup.arch)
        phase("open backend", 0)
        self._backend = backend(setup.backend, arch=setup.arch)
        self._session = self._backend.open(self._context)
        self._operation: Any = None
        self._neighbours = Neighbours(self._backend, self._session, setup.arch)
        self._program: Program | RowProgram | AnyLayerProgram | None = None

    def build(self, cell: AnyCell) -> None:
        """Replace the operator. Collective, in the same order on every rank."""
        self._drop_operation()
        self._phase("build", 0)
        problem = cell.problem()
        contract = self._backend.contract(problem, cell.kernel_type)
        with backend_code():
            built: Any = self._session.build(problem, cell.kernel_type)
        if isinstance(cell, RowCell):
            self._program = self._row_program(cell, built, contract)
            return
        if isinstance(cell, LayerCell):
            self._program = self._layer_program(cell, built, contract)
            return
        if isinstance(cell, SequenceCell):
            self._operation = self._program = sequence_program(self._context, self._backend, self._session, cell, built)
            return
        if isinstance(cell, GraphCell):
            self._operation = self._program = graph_program(self._context, self._backend, self._session, cell, built)
            return
        self._operation = GuardedExchange(built, cell.problem())
        experts = LocalExperts(cell, self._context.rank, self._context.device)
        self._program = Program(self._context, self._operation, exchange(contract), self._backend.judged_by, experts)

    def _row_program(self, cell: RowCell, built: Any, contract: object) -> RowProgram:
        assert isinstance(contract, QuantContract | NormContract | RouteContract)
        guarded: _GuardedQuantiser | _GuardedNorm | GuardedRouter
        if isinstance(contract, RouteContract):
            guarded = GuardedRouter(built)
        else:
            guarded = _GuardedQuantiser(built) if isinstance(contract, QuantContract) else _GuardedNorm(built)
        self._operation = guarded
        return RowProgram(self._context, guarded, contract, self._backend.judged_by, cell)

    def _sort_program(self, cell: LayerCell, built: Any, contract: SortContract) -> SortProgram:
        """The program of a sort: one operator for each shard."""
        sorts = [built]
        for _ in range(1, cell.shards):
            with backend_code():
                sorts.append(self._session.build(cell.problem(), cell.kernel_type))
        self._operation = Together(sorts)
        return SortProgram(self._context, sorts, contract, cell)

    def _layer_program(self, cell: LayerCell, built: Any, contract: object) -> AnyLayerProgram:
        """The program of a layer, or of its experts alone: one operator for each shard then."""
        judged_by = self._backend.judged_by
        if isinstance(contract, LayerContract):
            layer = GuardedLayer(built)
            self._operation = layer
            self._operation, program = whole_layer(
                self._context, self._neighbours, self._backend, self._session, layer, cell
            )
            return program
        if isinstance(contract, SortContract):
            return self._sort_program(cell, built, contract)
        if not isinstance(contract, ExpertContract):
            raise HarnessError(f"{type(contract).__name__} for {cell.label}; its program knows experts and layers")
        shards = [GuardedExperts(built)]
        for _ in range(1, cell.shards):
            with backend_code():
                shards.append(GuardedExperts(self._session.build(cell.problem(), cell.kernel_type)))
        self._operation = Together(shards)
        whole = whole_experts(self._backend, self._session, cell, shards)
        return ExpertProgram(self._context, list(shards), contract, judged_by, cell, whole)

    def run(self, case: AnyCase) -> tuple[Mismatch | None, float]:
        """Run a case on the current operator.

        Raises:
            HarnessError: there is none, or it is of the other kind.
        """
        if isinstance(self._program, RowProgram) and isinstance(case, RowCase):
            return self._program.run(case, self._phase)
        if isinstance(self._program, AnyLayerProgram) and isinstance(case, LayerCase):
            return self._program.run(case, self._phase)
        if isinstance(self._program, Program) and isinstance(case, Case):
            return self._program.run(case, self._phase)
        raise HarnessError(f"a case of {case.cell.label} was sent to {type(self._program).__name__}")

    @property
    def kernels(self) -> tuple[str, ...]:
        """Kernels that the backend named while it ran the last case of a dispatch/combine."""
        return self._program.kernels if isinstance(self._program, Program) else ()

    def canary(self, token: int) -> None:
        """All ranks exchange a number over the process group; a wrong one is an infrastructure failure."""
        self._phase("canary", 0)
        mine = torch.tensor([token * 1000 + self._context.rank], device=self._context.device)
        everyone = [torch.zeros_like(mine) for _ in range(self._context.world_size)]
        dist.all_gather(everyone, mine, group=self._context.group)
        got = [int(value) for value in everyone]
        if got != [token * 1000 + rank for rank in range(self._context.world_size)]:
            raise HarnessError(f"the canary exchange returned {got} on rank {self._context.rank}")

    def close(self) -> None:
        """Operators, then the library, then the process group."""
        self._drop_operation()
        self._phase("close", 0)
        self._neighbours.close()
        self._session.close()
        dist.destroy_process_group()

    def _drop_operation(self) -> None:
        if self._operation is not None:
            self._phase("drop operator", 0)
            self._operation.close()
        self._operation = self._program = None


os.environ.setdefault("OMP_NUM_THREADS", "1")
