"""AITER's row operators, and their double, as backends of the suite.

Scope: the driver-side half (standing, contract, preflight) and the way into a session. A clean preflight does not prove
that the library works on the device; it proves that the known reasons for failure are absent.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from accelerated.aiter_ops import contract as declared
from accelerated.aiter_ops import routing_contract
from accelerated.aiter_ops.library import AiterLibrary, load_aiter, load_standin, probe_aiter
from accelerated.contract import Support
from accelerated.experts import ExpertContract, ExpertProblem
from accelerated.interface import Finding
from accelerated.mori_ep.backend import torch_is_rocm
from accelerated.operators import Family, NormContract, QuantContract, RowProblem
from accelerated.routers import RouteContract
from accelerated.sorting import SortContract

if TYPE_CHECKING:
    from accelerated.aiter_ops.session import AiterSession
    from accelerated.interface import RankContext

#: Read by the double: the gfx architecture it acts as.
STANDIN_ARCH_VARIABLE = "AITER_STANDIN_ARCH"


class AiterBackend:
    """AITER's quantisers, norms and fused AllReduce + RMSNorm, or their double.

    Args:
        name: name of the backend in reports.
        standin: True for the double.
        load: gives the library in a rank process.
        arch: gfx architecture the driver declares contracts for; target features (``gfx942:sramecc+``) are cut off.
    """

    judged_by = "reference"
    #: It offers no dispatch and combine.
    kernel_types: Sequence[str] = ()
    #: What frameworks run under ``torch.compile``: the split form and its local norm.
    compiled_operators: Sequence[str] = ("rmsnorm_add", "split")

    def __init__(self, name: str, standin: bool, load: Callable[[], AiterLibrary], arch: str) -> None:
        self.name = name
        self.standin = standin
        self._load = load
        self._arch = arch.partition(":")[0]

    @property
    def operators(self) -> Mapping[str, Sequence[str]]:
        """Operator names by family value."""
        from accelerated.aiter_ops import allreduce_contract, experts_contract, experts_numerics

        return {
            Family.QUANTISE.value: declared.QUANTISERS,
            Family.NORM.value: declared.NORMS,
            Family.ALLREDUCE_NORM.value: tuple(allreduce_contract.OPERATORS),
            Family.ROUTE.value: routing_contract.ROUTERS,
            Family.EXPERTS.value: tuple(experts_numerics.OPERATORS),
            Family.SORT.value: experts_contract.SORTS,
        }

    def support(self, problem: RowProblem | ExpertProblem, operator: str) -> Support:
        """Standing on the declared architecture."""
        if isinstance(problem, ExpertProblem):
            from accelerated.aiter_ops import experts_contract

            sorts = operator in experts_contract.SORTS
            standing = experts_contract.sort_support if sorts else experts_contract.support
            return standing(problem, operator, self._arch)
        if problem.family is Family.ALLREDUCE_NORM:
            from accelerated.aiter_ops import allreduce_contract

            return allreduce_contract.support(problem, operator, self._arch)
        if problem.family is Family.ROUTE:
            return routing_contract.support(problem, operator, self._arch)
        return declared.support(problem, operator, self._arch)

    def contract(
        self, problem: RowProblem | ExpertProblem, operator: str
    ) -> QuantContract | NormContract | RouteContract | ExpertContract | SortContract:
        """Declared behaviour on the declared architecture.

        Raises:
            ContractError: unknown operator or architecture.
        """
        if isinstance(problem, ExpertProblem):
            from accelerated.aiter_ops import experts_contract

            if operator in experts_contract.SORTS:
                return experts_contract.sort_contract(problem, operator)
            return experts_contract.contract(problem, operator, self._arch)
        if problem.family is Family.ALLREDUCE_NORM:
            from accelerated.aiter_ops import allreduce_contract

            return allreduce_contract.contract(problem, operator, self._arch)
        if problem.family is Family.ROUTE:
            return routing_contract.contract(problem, operator, self._arch)
        return declared.contract(problem, operator, self._arch)

    def preflight(self, device: str) -> list[Finding]:
        """Findings for ``device`` (``"cuda"`` or ``"cpu"``); none for the double, which runs anywhere."""
        if self.standin:
            return []
        findings = []
        if device.partition(":")[0] != "cuda":
            findings.append(Finding(f"aiter needs a ROCm device, not {device}", "give --device cuda on a ROCm machine"))
        elif torch_is_rocm() is False:
            findings.append(
                Finding("aiter needs a ROCm device, and this torch is no ROCm build", "use the ROCm image's torch")
            )
        return findings + probe_aiter()

    def open(self, context: RankContext) -> AiterSession:
        """Load the library in a rank process.

        Raises:
            LibraryError: the library is missing, broken or unrelated.
            RuntimeError: the device is another architecture than ``context.arch``, or has another FP8 format.
        """
        from accelerated.aiter_ops.session import AiterSession

        if self.standin:
            # No device tells the double what to act as; the real library looks for itself.
            os.environ[STANDIN_ARCH_VARIABLE] = context.arch
        return AiterSession(self._load(), context)


def aiter(arch: str) -> AiterBackend:
    """The real library."""
    return AiterBackend("aiter", standin=False, load=load_aiter, arch=arch)


def aiter_standin(arch: str) -> AiterBackend:
    """The double in :mod:`accelerated.standin.aiter_ops`."""
    return AiterBackend("aiter-standin", standin=True, load=load_standin, arch=arch)
