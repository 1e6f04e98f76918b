"""AITER's routers behind the router interface.

Scope: calls, and the buffers that the entries fill: float32 weights and int32 ids. The assembled kernels work on four
rows at a time; ``fused_topk`` allocates for them itself. A call that returns is not proven to have written anything:
the suite poisons fresh memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from accelerated.aiter_ops.library import AiterLibrary
from accelerated.aiter_ops.routing_contract import entry_of
from accelerated.routers import RouteContract, RouteForm, RouteResult, form_of
from reference.router_numerics import Score

#: ``topk_gating``'s names of scores.
_SCORE_FUNCTIONS = {
    Score.SOFTMAX: "softmax",
    Score.CHOSEN_SOFTMAX: "softmax",
    Score.SIGMOID: "sigmoid",
    Score.SQRT_SOFTPLUS: "sqrtsoftplus",
}

#: Fills weights and ids from logits and bias.
Fill = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, "torch.Tensor | None"], None]


class AiterRouter:
    """One entry with one form's arguments."""

    def __init__(self, library: AiterLibrary, operator: str, declared: RouteContract) -> None:
        self._form, self._declared = form_of(operator), declared
        entry = entry_of(operator)
        self._fused: Any = library.part("fused_moe").fused_topk if entry == "fused_topk" else None
        self._fill: Fill | None = None if self._fused is not None else _entry(library, entry, self._form)

    def route(self, logits: torch.Tensor, bias: torch.Tensor | None) -> RouteResult:
        """See :meth:`accelerated.routers.RouteOperation.route`.

        Raises:
            ValueError: a bias is given where the contract takes none, is missing, or has another element type: the
                kernels read its bytes as they are and raise nothing.
        """
        self._check(bias)
        top_k = self._form.numerics.top_k
        if self._fill is None:
            # Of the hidden states it reads the number of rows and the device.
            return RouteResult(*self._fused(logits, logits, top_k, self._form.numerics.renormalise))
        weights = torch.empty((logits.shape[0], top_k), dtype=torch.float32, device=logits.device)
        ids = torch.empty((logits.shape[0], top_k), dtype=torch.int32, device=logits.device)
        self._fill(weights, ids, logits, bias)
        return RouteResult(weights, ids)

    def close(self) -> None:
        """Nothing to release."""

    def _check(self, bias: torch.Tensor | None) -> None:
        found = "" if bias is None else str(bias.dtype).removeprefix("torch.")
        if found != self._declared.bias_dtype:
            raise ValueError(
                f"the bias is {found or 'missing'}; this router takes {self._declared.bias_dtype or 'none'} "
                f"(RouteContract.bias_dtype)"
            )


def _entry(library: AiterLibrary, entry: str, form: RouteForm) -> Fill:
    """The entry with the form's arguments."""
    numerics = form.numerics
    renormalise, scale = numerics.renormalise, numerics.scale

    def softmax(weights: torch.Tensor, ids: torch.Tensor, logits: torch.Tensor, bias: torch.Tensor | None) -> None:
        library.part("ops.moe_op").topk_softmax(weights, ids, torch.empty_like(ids), logits, renormalise)

    def sigmoid(weights: torch.Tensor, ids: torch.Tensor, logits: torch.Tensor, bias: torch.Tensor | None) -> None:
        library.part("ops.moe_op").topk_sigmoid(weights, ids, logits)

    def gating(weights: torch.Tensor, ids: torch.Tensor, logits: torch.Tensor, bias: torch.Tensor | None) -> None:
        library.part("ops.topk").topk_gating(
            weights,
            ids,
            logits,
            bias,
            need_renorm=renormalise,
            routed_scaling_factor=scale,
            score_func=_SCORE_FUNCTIONS[numerics.score],
        )

    def grouped(weights: torch.Tensor, ids: torch.Tensor, logits: torch.Tensor, bias: torch.Tensor | None) -> None:
        library.part("ops.topk").grouped_topk(
            logits,
            weights,
            ids,
            numerics.groups,
            numerics.groups_kept,
            renormalise,
            is_softmax=numerics.score is Score.SOFTMAX,
            routed_scaling_factor=scale,
        )

    def biased(weights: torch.Tensor, ids: torch.Tensor, logits: torch.Tensor, bias: torch.Tensor | None) -> None:
        library.part("ops.topk").biased_grouped_topk(
            logits, bias, weights, ids, numerics.groups, numerics.groups_kept, renormalise, routed_scaling_factor=scale
        )

    return {
        "topk_softmax": softmax,
        "topk_sigmoid": sigmoid,
        "topk_gating": gating,
        "grouped_topk": grouped,
        "biased_grouped_topk": biased,
    }[entry]
