"""The specification's routers as row operators of the backend ``reference``.

Scope: one operator per form, ``route.<form>``, driven like any library's and judged by the oracle, which shares no code
with it. What a pass does not prove: anything about an accelerated library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from accelerated.contract import Standing, Support
from accelerated.operators import RowProblem
from accelerated.routers import FORMS, Always, RouteContract, RouteResult, form_of

if TYPE_CHECKING:
    import torch

    from reference.router_numerics import RouterNumerics

#: Operators, as a session is asked for them.
ROUTERS = tuple(f"route.{form}" for form in FORMS)


def support(problem: RowProblem, operator: str) -> Support:
    """Every number of experts that the form has an answer for."""
    reason = form_of(operator).refusal(problem.hidden)
    return Support(Standing.REFUSED, reason) if reason else Support(Standing.CLAIMED)


def contract(problem: RowProblem, operator: str) -> RouteContract:
    """Declared behaviour; the bias is float32 whatever the logits are."""
    form = form_of(operator)
    return RouteContract(Always(form.numerics), "float32" if form.biased else "", descending=True)


class ReferenceRouter:
    """:func:`reference.routers.route`."""

    def __init__(self, operator: str) -> None:
        self._numerics: RouterNumerics = form_of(operator).numerics

    def route(self, logits: torch.Tensor, bias: torch.Tensor | None) -> RouteResult:
        from reference.routers import route

        return RouteResult(*route(logits, bias, self._numerics))

    def close(self) -> None:
        return None
