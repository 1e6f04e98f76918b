"""A backend with a kernel type for every way in which a build can fail to have it. Proves nothing by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from accelerated.contract import Standing, Support
from accelerated.reference_backend import ReferenceOperation, ReferenceSession
from conformance.selftest.engine.backends import (
    ExchangeBackend,
    RaisesAtClose,
    raise_value_error,
    read_address_zero,
    wait_in_python,
)

if TYPE_CHECKING:
    import torch

    from accelerated.interface import RankContext, Received

NAME = "conformance.selftest.suite.capable_backend:Capable"
LEAVES_BADLY = "conformance.selftest.suite.capable_backend:LeavesBadly"
ABSENT = "conformance.selftest.suite.capable_backend:Absent"


def import_what_is_not_there() -> None:
    raise ImportError("no kernel of that name in this build")


def use_what_is_none() -> None:
    raise AttributeError("'NoneType' object has no attribute 'data_ptr'")


AT_BUILD = {
    "refuses": raise_value_error,
    "lacks": import_what_is_not_there,
    "stumbles": use_what_is_none,
    "dies": read_address_zero,
}


class _LosesARow(ReferenceOperation):
    def prepare(
        self, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor | None = None
    ) -> Received:
        received = super().prepare(rows, ids, weights, scales)
        received.count -= 1
        return received


class _Session(ReferenceSession):
    def build(self, problem: Any, kernel_type: str) -> ReferenceOperation:
        AT_BUILD.get(kernel_type, lambda: None)()
        if kernel_type == "waits" and self._context.rank == 0:
            wait_in_python()
        operation = _LosesARow if kernel_type == "answers wrongly" else ReferenceOperation
        return operation(self._context, problem, 1)


class Capable(ExchangeBackend):
    """The specification's dispatch/combine under names that say what becomes of them."""

    name = NAME
    judged_by = "reference"
    kernel_types = ("works", "unclaimed", "declined", "answers wrongly", *AT_BUILD, "waits")

    def support(self, problem: Any, kernel_type: str) -> Support:
        varied = problem.wire or problem.codec or problem.modes
        if varied and (kernel_type != "dies" or problem.modes != ("weightless",)):
            return Support(Standing.REFUSED, "plain calls only")
        if kernel_type == "declined" or problem.nodes > 1:
            return Support(Standing.REFUSED, f"{kernel_type} on {problem.nodes} nodes is declined")
        return Support(Standing.UNCLAIMED if kernel_type == "unclaimed" else Standing.CLAIMED)

    def open(self, context: RankContext) -> ReferenceSession:
        return _Session(context)


class LeavesBadly(RaisesAtClose):
    """Unclaimed, and its library does not finalise."""

    def support(self, problem: Any, kernel_type: str) -> Support:
        plain = not problem.wire and not problem.codec and not problem.modes and problem.nodes == 1
        return Support(Standing.UNCLAIMED) if plain else Support(Standing.REFUSED, "plain calls on one node only")


class Absent(Capable):
    """Its library does not initialise."""

    name = ABSENT

    def open(self, context: RankContext) -> ReferenceSession:
        raise OSError("no such device")
