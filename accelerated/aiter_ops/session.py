"""AITER in one rank process.

Scope: checks that the live device is the one whose contract was declared, and builds operations. Quantisers and norms
need no initialisation; the fused AllReduce brings its own. What an open session does not prove: that any kernel
compiles; that shows at the first call.
"""

from __future__ import annotations

import os

import torch

from accelerated.aiter_ops import routing_contract
from accelerated.aiter_ops.contract import contract
from accelerated.aiter_ops.library import AiterLibrary
from accelerated.aiter_ops.norms import AiterNorm
from accelerated.aiter_ops.quantisers import AiterQuantiser
from accelerated.aiter_ops.routing import AiterRouter
from accelerated.experts import ExpertOperation, ExpertProblem
from accelerated.interface import RankContext
from accelerated.operators import Family, NormContract, NormOperation, QuantOperation, RowProblem
from accelerated.routers import RouteOperation
from accelerated.sorting import SortOperation
from reference.catalogue import architecture


class AiterSession:
    """AITER loaded in one rank process.

    AITER takes the FP8 format from the live device (aiter/utility/dtypes.py:11), once from the environment instead,
    and falls back to ``torch.uint8`` without a word on a device it does not know: a contract for another format would
    judge every scale and code wrongly, so that a difference is an error here.

    Raises:
        RuntimeError: the device is not of the architecture, or has not the FP8 format, that was declared.
    """

    def __init__(self, library: AiterLibrary, context: RankContext) -> None:
        self._library: AiterLibrary | None = library
        self._context = context
        self._reduces = False
        self._arch = context.arch.partition(":")[0]
        if context.device.type == "cuda":
            torch.cuda.set_device(context.device)
        seen = str(library.get_gfx_runtime())
        if seen != self._arch:
            raise RuntimeError(
                f"AITER sees {seen} but the suite was told {self._arch}; give the architecture of the device (--arch)"
            )
        found, declared = str(library.dtypes.fp8).removeprefix("torch."), architecture(self._arch).fp8.dtype
        if found != declared:
            forced = os.environ.get("GPU_ARCHS", "not set")
            raise RuntimeError(
                f"aiter.dtypes.fp8 is {found} but {self._arch} has {declared} (GPU_ARCHS is {forced}); unset "
                "GPU_ARCHS, or use an AITER that knows the device"
            )

    def build(
        self, problem: RowProblem | ExpertProblem, operator: str
    ) -> QuantOperation | NormOperation | RouteOperation | ExpertOperation | SortOperation:
        """Construct an operation; collective for ALLREDUCE_NORM only.

        Raises:
            RuntimeError: the session is closed.
            ContractError: unknown operator.
        """
        if self._library is None:
            raise RuntimeError("the session is closed; open another in a new process")
        if isinstance(problem, ExpertProblem):
            return self._experts(self._library, problem, operator)
        if problem.family is Family.ALLREDUCE_NORM:
            from accelerated.aiter_ops import allreduce

            self._reduces = True
            return allreduce.build(self._library, self._context, problem, operator)
        if problem.family is Family.ROUTE:
            return AiterRouter(self._library, operator, routing_contract.contract(problem, operator, self._arch))
        declared = contract(problem, operator, self._arch)
        if isinstance(declared, NormContract):
            return AiterNorm(self._library, operator, declared)
        return AiterQuantiser(self._library, operator, declared)

    def _experts(self, library: AiterLibrary, problem: ExpertProblem, operator: str) -> ExpertOperation | SortOperation:
        """The experts of one rank, or their sort."""
        from accelerated.aiter_ops import experts_contract

        if operator in experts_contract.SORTS:
            from accelerated.aiter_ops.sorting import AiterSort

            return AiterSort(library, problem, experts_contract.sort_contract(problem, operator))
        from accelerated.aiter_ops.experts import AiterExperts

        return AiterExperts(library, operator, problem, experts_contract.contract(problem, operator, self._arch))

    def close(self) -> None:
        """Forget the library. Ends the groups that an all-reduce made, on every rank; there is nothing else to end."""
        if self._library is not None and self._reduces:
            from accelerated.aiter_ops import allreduce

            allreduce.release(self._library)
        self._library = None
