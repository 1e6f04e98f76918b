"""Routers as row operators: their contracts, their results and the forms that every backend names alike.

Scope: what :mod:`accelerated.operators` is for quantisers and norms. A router's problem is a ``RowProblem`` of the
family ``ROUTE`` with one rank, E in ``hidden`` and the logits' element type; what it computes is its form, the last
part of the operator's name (``topk_softmax.softmax_k8``). Data without torch. What conforming to this interface does
not prove: that the contract is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from accelerated.contract import ContractError
from accelerated.operators import ROW_BYTES
from reference.router_numerics import GroupScore, Ranking, RouterNumerics, Score

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class RouteForm:
    """What a router computes, whatever computes it.

    Attributes:
        numerics: its parameters; a backend replaces the fields that say how it rounds.
        biased: a correction bias takes part in the choice, not in the weights.
        source: the model that routes so.
        experts: the only numbers of experts it is for; any that its groups divide, if empty.
    """

    numerics: RouterNumerics
    biased: bool
    source: str
    experts: tuple[int, ...] = ()

    def refusal(self, experts: int) -> str:
        """Why it has no answer for so many experts; empty if it has one."""
        if self.experts and experts not in self.experts:
            return f"{experts} experts; the form is for {', '.join(map(str, self.experts))}"
        return self.numerics.refusal(experts)


_DEEPSEEK_V3 = RouterNumerics(
    Score.SIGMOID, 8, scale=2.5, groups=8, groups_kept=4, group_score=GroupScore.TOP2
)  # config.json: n_group 8, topk_group 4, num_experts_per_tok 8, routed_scaling_factor 2.5, norm_topk_prob

#: Routers by name.
FORMS: dict[str, RouteForm] = {
    "softmax_k8": RouteForm(RouterNumerics(Score.SOFTMAX, 8), False, "Qwen3 (norm_topk_prob)"),
    "softmax_k2": RouteForm(RouterNumerics(Score.SOFTMAX, 2), False, "Mixtral"),
    "softmax_k5_plain": RouteForm(
        RouterNumerics(Score.SOFTMAX, 5, renormalise=False), False, "Qwen2-MoE's weights with an odd k"
    ),
    "sigmoid_k1": RouteForm(RouterNumerics(Score.SIGMOID, 1, renormalise=False), False, "Llama-4"),
    "sigmoid_bias_k6": RouteForm(
        RouterNumerics(Score.SIGMOID, 6, scale=2.5), True, "DeepSeek-V3's scores without groups (dots.llm1, GLM-4.5)"
    ),
    "sigmoid_bias_k8_plain": RouteForm(
        RouterNumerics(Score.SIGMOID, 8, renormalise=False, scale=2.5), True, "the same without renormalisation"
    ),
    "sqrtsoftplus_bias_k6": RouteForm(RouterNumerics(Score.SQRT_SOFTPLUS, 6, scale=1.5), True, "DeepSeek-V4"),
    "grouped_g8t4k8": RouteForm(_DEEPSEEK_V3, True, "DeepSeek-V3"),
    "grouped_g4t2k6_softmax": RouteForm(
        RouterNumerics(Score.SOFTMAX, 6, renormalise=False, scale=16.0, groups=4, groups_kept=2),
        False,
        "DeepSeek-V2 (there 3 of 8 groups)",
    ),
    "grouped_bias_e72": RouteForm(
        RouterNumerics(
            Score.SIGMOID, 6, renormalise=False, scale=2.5, groups=2, groups_kept=1, group_score=GroupScore.TOP2
        ),
        True,
        "DeepSeek-V3's choice over a number of experts that is no power of two",
        (72,),
    ),
    "after_k4": RouteForm(RouterNumerics(Score.CHOSEN_SOFTMAX, 4, ranking=Ranking.LOGIT), False, "gpt-oss"),
}


def form_of(operator: str) -> RouteForm:
    """Form of an operator named ``<entry>.<form>``.

    Raises:
        ContractError: its last part names no form.
    """
    name = operator.rpartition(".")[2]
    if name not in FORMS:
        raise ContractError(f"operator {operator!r} ends in no known form; choose one of {', '.join(FORMS)}")
    return FORMS[name]


@dataclass(frozen=True)
class Always:
    """Numerics that do not depend on the number of rows."""

    numerics: RouterNumerics

    def __call__(self, rows: int) -> RouterNumerics:
        """The same for every call."""
        return self.numerics


@dataclass(frozen=True)
class RouteContract:
    """Declared behaviour of one router at one problem.

    Attributes:
        numerics: of a call with so many rows; paths differ by size. k and the groups do not.
        bias_dtype: element type of the correction bias, a key of :data:`accelerated.operators.ROW_BYTES`, or "" where
            there is none.
        boundaries: row counts m of which m and m + 1 take different paths; the suite runs both sides.
        takes_empty: a call with no rows is legal.
        descending: ids come in order of descending choice; otherwise their order is open.
        rows_alone: a row has the same bits whatever other rows are in the call, at the same number of rows.

    Raises:
        ContractError: an element type that no check models.
    """

    numerics: Callable[[int], RouterNumerics]
    bias_dtype: str = ""
    boundaries: tuple[int, ...] = ()
    takes_empty: bool = True
    descending: bool = False
    rows_alone: bool = True

    def __post_init__(self) -> None:
        if self.bias_dtype and self.bias_dtype not in ROW_BYTES:
            raise ContractError(f"bias_dtype is {self.bias_dtype!r}; choose one of {', '.join(sorted(ROW_BYTES))}")

    @property
    def takes_bias(self) -> bool:
        """Whether a call has a correction bias; then every call has one."""
        return bool(self.bias_dtype)

    @property
    def top_k(self) -> int:
        """k, of every call."""
        return self.numerics(1).top_k


@dataclass
class RouteResult:
    """What a router returns.

    Attributes:
        weights: ``[M, k]`` float32.
        ids: ``[M, k]`` int32, of experts 0 to E - 1.
    """

    weights: torch.Tensor
    ids: torch.Tensor


class RouteOperation(Protocol):
    """One router, alive until :meth:`close`."""

    def route(self, logits: torch.Tensor, bias: torch.Tensor | None) -> RouteResult:
        """Choose experts. No host sync.

        Args:
            logits: contiguous ``[M, E]`` in the problem's element type, M from 0 to the problem's capacity.
            bias: ``[E]`` in the contract's ``bias_dtype``; None where the contract takes none.
        """

    def close(self) -> None:
        """Release the operator."""
