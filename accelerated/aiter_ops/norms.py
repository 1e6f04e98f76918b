"""AITER's RMSNorm entries behind the operator interface.

Scope: eager calls on the caller's tensors, with output buffers allocated as upstream's callers allocate them. Every
argument goes by keyword, because twins of these entries order theirs differently; what the library raises is raised.
What a pass through it does not prove: that callers allocate buffers of the right type; the library checks few of them.

Source of semantics: AITER e4048607, aiter/ops/rmsnorm.py (356, 369, 416, 439, 506, 535).
"""

from __future__ import annotations

from typing import Any

import torch

from accelerated.aiter_ops.library import AiterLibrary
from accelerated.operators import NormContract, NormResult, QuantResult


class AiterNorm:
    """One norm operator.

    Args:
        library: AITER or its double.
        operator: a name of :data:`accelerated.aiter_ops.contract.NORMS`.
        contract: declared for it.
    """

    def __init__(self, library: AiterLibrary, operator: str, contract: NormContract) -> None:
        self._library: AiterLibrary | None = library
        self._operator = operator
        self._contract = contract
        self._model_sensitive = int(operator.endswith("_t5"))

    def normalise(
        self, rows: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, epsilon: float
    ) -> NormResult:
        """See :class:`accelerated.operators.NormOperation`. ``fused_add_rms_norm_cu`` overwrites rows and residual.

        Raises:
            RuntimeError: the operation is closed, or what the library raises.
            ValueError: a residual for an operator without, or none for one with.
        """
        if self._library is None:
            raise RuntimeError(f"{self._operator} was called after close; build a new operation")
        if self._contract.residual != (residual is not None):
            raise ValueError(f"{self._operator}: give a residual to an operator that adds one, and only there")
        common: dict[str, Any] = {"input": rows, "weight": weight, "epsilon": epsilon}
        if self._contract.codec is not None:
            return self._quantised(self._library, rows, residual, common)
        norms = self._library.rmsnorm
        if self._contract.in_place:
            norms.fused_add_rms_norm_cu(residual_in=residual, **common)
            return NormResult(output=rows, residual=residual)
        if self._operator == "rms_norm_cu":
            output = torch.empty_like(rows)
            norms.rms_norm_cu(out=output, **common)
            return NormResult(output=output)
        if self._operator.endswith("_3d"):
            # The number of dimensions alone decides which kernel runs.
            common["input"], residual = rows[None], None if residual is None else residual[None]
        if residual is None:
            output = norms.rms_norm(use_model_sensitive_rmsnorm=self._model_sensitive, **common)
            return NormResult(output=output.view(rows.shape))
        output, residual_out = torch.empty_like(residual), torch.empty_like(residual)
        norms.rmsnorm2d_fwd_with_add(
            out=output,
            residual_in=residual,
            residual_out=residual_out,
            gemma_norm=self._operator.endswith("_gemma"),
            use_model_sensitive_rmsnorm=self._model_sensitive,
            **common,
        )
        return NormResult(output=output.view(rows.shape), residual=residual_out.view(rows.shape))

    def close(self) -> None:
        """Release the operator; the library keeps nothing between calls."""
        self._library = None

    def _quantised(
        self, library: AiterLibrary, rows: torch.Tensor, residual: torch.Tensor | None, common: dict[str, Any]
    ) -> NormResult:
        assert self._contract.codec is not None
        group = self._contract.codec.group
        codes = torch.empty(rows.shape, dtype=library.dtypes.fp8, device=rows.device)
        scales = torch.empty(
            rows.shape[0], rows.shape[1] // group if group else 1, dtype=torch.float32, device=rows.device
        )
        options = {
            "out": codes,
            "yscale": scales,
            "use_model_sensitive_rmsnorm": self._model_sensitive,
            "group_size": group,
            "shuffle_scale": self._operator.endswith("_transposed"),
            **common,
        }
        residual_out = None
        if residual is None:
            library.rmsnorm.rmsnorm2d_fwd_with_dynamicquant(**options)
        else:
            residual_out = torch.empty_like(rows)
            library.rmsnorm.rmsnorm2d_fwd_with_add_dynamicquant(
                residual_in=residual, residual_out=residual_out, **options
            )
        return NormResult(residual=residual_out, quantised=QuantResult(codes.view(torch.uint8), scales))
