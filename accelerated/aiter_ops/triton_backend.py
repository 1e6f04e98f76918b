"""Backend ``aiter-triton``: real Triton operators of a ROCm AITER source tree that the user names.

Scope: quantisers, norms, routers and experts; the driver-side half (standing, contract, preflight) and the way into a
session. On a CPU the kernels run in Triton's interpreter: then a pass shows that the algorithm is right and nothing
about AMD hardware, which :attr:`AiterTritonBackend.caveat` says. A clean preflight does not prove that the tree
imports.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from accelerated.aiter_ops import triton_contract as declared
from accelerated.aiter_ops import triton_experts_contract as experts
from accelerated.aiter_ops import triton_library
from accelerated.aiter_ops import triton_routing_contract as routing
from accelerated.experts import ExpertContract, ExpertProblem
from accelerated.operators import Family

if TYPE_CHECKING:
    from accelerated.aiter_ops.triton_operations import TritonSession
    from accelerated.contract import Support
    from accelerated.interface import Finding, RankContext
    from accelerated.operators import NormContract, QuantContract, RowProblem
    from accelerated.routers import RouteContract


class AiterTritonBackend:
    """Real AITER Triton operators.

    Args:
        arch: gfx architecture the driver declares contracts for; target features (``gfx942:sramecc+``) are cut off.
    """

    name = "aiter-triton"
    standin = False
    judged_by = "reference"
    kernel_types: Sequence[str] = ()
    #: Operators by family.
    operators: ClassVar[dict[str, tuple[str, ...]]] = {
        **{family.value: declared.names(family) for family in (Family.QUANTISE, Family.NORM)},
        Family.ROUTE.value: routing.names(),
        Family.EXPERTS.value: experts.names(),
    }

    def __init__(self, arch: str) -> None:
        self._arch = arch.partition(":")[0]

    @property
    def caveat(self) -> str:
        """What every report has to say beside a result; empty where the kernels are compiled for a device."""
        return triton_library.CAVEAT if triton_library.interpreted() else ""

    @property
    def patience(self) -> float:
        """Factor on the time limits of a case: an interpreted launch takes as long as hundreds of compiled ones."""
        return 20.0 if triton_library.interpreted() else 1.0

    @property
    def longest_buffer(self) -> int:
        """Rows of an experts' buffer that are worth running: every one of them costs the interpreter."""
        return 128 if triton_library.interpreted() else 1024

    def support(self, problem: RowProblem | ExpertProblem, kernel_type: str) -> Support:
        """Standing of operator ``kernel_type`` on the declared architecture."""
        if isinstance(problem, ExpertProblem):
            return experts.support(problem, kernel_type, self._arch)
        if problem.family is Family.ROUTE:
            return routing.support(problem, kernel_type, self._arch)
        return declared.support(problem, kernel_type, self._arch)

    def contract(
        self, problem: RowProblem | ExpertProblem, kernel_type: str
    ) -> QuantContract | NormContract | RouteContract | ExpertContract:
        """Declared behaviour on the declared architecture.

        Raises:
            ContractError: the operator is unknown, or refused at this problem.
        """
        if isinstance(problem, ExpertProblem):
            return experts.contract(problem, kernel_type, self._arch)
        if problem.family is Family.ROUTE:
            return routing.contract(problem, kernel_type, self._arch)
        return declared.contract(problem, kernel_type, self._arch)

    def preflight(self, device: str) -> list[Finding]:
        """Findings for ``device`` (``"cuda"`` or ``"cpu"``)."""
        return triton_library.probe(device)

    def open(self, context: RankContext) -> TritonSession:
        """Load AITER from the named tree in a rank process.

        Raises:
            LibraryError: the tree is missing or broken, or reports another architecture than ``context.arch``.
        """
        from accelerated.aiter_ops.triton_operations import TritonSession

        return TritonSession(triton_library.load(context.arch.partition(":")[0]))


def aiter_triton(arch: str) -> AiterTritonBackend:
    """The real operators, from the tree that ``EP_AITER_SOURCE`` names."""
    return AiterTritonBackend(arch)
