"""AITER's Triton operators: a session, and quantisers and norms behind the interface of row operators.

Scope: argument order, output buffers, and views of the results; no arithmetic. Sources: ROCm/aiter e4048607,
aiter/ops/triton/{quant,normalization}/, aiter/ops/quant.py:391-407, aiter/utility/fp4_utils.py:536. Arguments that an
operator does not take are an error, never dropped. What a call that returns does not prove: anything about its result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from accelerated.aiter_ops import triton_contract as declared
from accelerated.aiter_ops import triton_experts_contract, triton_moe_library, triton_routing_contract
from accelerated.aiter_ops.triton_experts import SortedExperts
from accelerated.aiter_ops.triton_experts_ragged import RaggedExperts
from accelerated.aiter_ops.triton_library import TritonLibrary
from accelerated.aiter_ops.triton_moe_library import TritonMoe
from accelerated.aiter_ops.triton_routing import TritonRouter
from accelerated.contract import ContractError, Standing
from accelerated.experts import ExpertOperation, ExpertProblem
from accelerated.operators import Family, NormOperation, NormResult, QuantOperation, QuantResult, RowProblem
from accelerated.routers import RouteOperation

#: Padding that serving uses with add_rmsnorm_pad; the tail is cut off here.
PAD_TO = 256

_Quantise = Callable[[TritonLibrary, torch.Tensor, torch.Tensor | None, QuantResult | None], QuantResult]
_Normalise = Callable[[TritonLibrary, torch.Tensor, torch.Tensor | None, torch.Tensor, float], NormResult]


class TritonSession:
    """AITER's Triton operators in one rank process.

    Args:
        library: the loaded tree.
        moe: its mixture-of-experts part; loaded when it is first needed, if None.
    """

    def __init__(self, library: TritonLibrary, moe: TritonMoe | None = None) -> None:
        self.library = library
        self._moe = moe

    @property
    def moe(self) -> TritonMoe:
        """The mixture-of-experts part of the tree.

        Raises:
            LibraryError: it does not import.
        """
        if self._moe is None:
            self._moe = triton_moe_library.load()
        return self._moe

    def build(
        self, problem: RowProblem | ExpertProblem, operator: str
    ) -> QuantOperation | NormOperation | RouteOperation | ExpertOperation:
        """One operator.

        Raises:
            ContractError: the operator is unknown, or refused at this problem.
        """
        if isinstance(problem, ExpertProblem):
            triton_experts_contract.contract(problem, operator, self.library.arch)
            found = triton_experts_contract.OPERATORS[operator].form
            form = SortedExperts if found is triton_experts_contract.Form.SORTED else RaggedExperts
            return form(self.library, self.moe, problem, operator)
        if problem.family is Family.ROUTE:
            triton_routing_contract.contract(problem, operator, self.library.arch)
            return TritonRouter(self.moe, problem, operator, self.library.arch)
        standing = declared.support(problem, operator, self.library.arch)
        if standing.standing is Standing.REFUSED:
            raise ContractError(standing.reason)
        if declared.OPERATORS[operator].family is Family.QUANTISE:
            return TritonQuantiser(self.library, problem, operator)
        return TritonNorm(self.library, problem, operator)

    def close(self) -> None:
        return None


class TritonQuantiser:
    """One quantiser; scales and codes come back in the library's own layout, codes as bytes."""

    def __init__(self, library: TritonLibrary, problem: RowProblem, operator: str) -> None:
        self._library = library
        self._problem = problem
        self._operator = operator
        self._call = _QUANTISERS[operator]

    def quantise(
        self,
        rows: torch.Tensor,
        *,
        scale: torch.Tensor | None = None,
        num_rows: torch.Tensor | None = None,
        out: QuantResult | None = None,
    ) -> QuantResult:
        """Quantise ``rows [M, N]``.

        Raises:
            ValueError: rows do not fit the problem, or an argument is given that the operator does not take.
        """
        _check_rows(rows, self._problem)
        static = self._operator == "triton.per_tensor_static"
        if static != (scale is not None):
            raise ValueError(f"{self._operator} {'needs' if static else 'takes no'} scale")
        if num_rows is not None:
            raise ValueError(f"{self._operator} takes no num_rows; its contract says so")
        if out is not None and not declared.OPERATORS[self._operator].takes_out:
            raise ValueError(f"{self._operator} takes no out; its contract says so")
        with torch.no_grad():
            return self._call(self._library, rows, scale, out)

    def close(self) -> None:
        return None


class TritonNorm:
    """One norm, with or without residual and quantised output."""

    def __init__(self, library: TritonLibrary, problem: RowProblem, operator: str) -> None:
        self._library = library
        self._problem = problem
        self._operator = operator
        self._call = _NORMS[operator]

    def normalise(
        self, rows: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, epsilon: float
    ) -> NormResult:
        """Normalise ``rows [M, N]``.

        Raises:
            ValueError: rows do not fit the problem, or a residual is given or missing against the contract.
        """
        _check_rows(rows, self._problem)
        wanted = declared.OPERATORS[self._operator].residual
        if wanted != (residual is not None):
            raise ValueError(f"{self._operator} {'needs' if wanted else 'takes no'} residual")
        with torch.no_grad():
            return self._call(self._library, rows, residual, weight, epsilon)

    def close(self) -> None:
        return None


def _check_rows(rows: torch.Tensor, problem: RowProblem) -> None:
    count, hidden = rows.shape
    if hidden != problem.hidden or count > problem.capacity or not rows.is_contiguous():
        raise ValueError(
            f"rows have shape {tuple(rows.shape)} and strides {rows.stride()}; "
            f"give at most {problem.capacity} contiguous rows of {problem.hidden}"
        )


def _per_tensor_static(
    library: TritonLibrary, rows: torch.Tensor, scale: torch.Tensor | None, out: QuantResult | None
) -> QuantResult:
    assert scale is not None
    codes = _codes(library, rows, out)
    library.quant.static_per_tensor_quant_fp8_i8(codes, rows, scale)
    return QuantResult(_bytes(codes), scale)


def _per_tensor(
    library: TritonLibrary, rows: torch.Tensor, scale: torch.Tensor | None, out: QuantResult | None
) -> QuantResult:
    codes = _codes(library, rows, out)
    # The kernel only ever raises the scale.
    scales = rows.new_zeros(1, dtype=torch.float32) if out is None else out.scales.zero_()
    library.quant.dynamic_per_tensor_quant_fp8_i8(codes, rows, scales)
    return QuantResult(_bytes(codes), scales)


def _per_token(
    library: TritonLibrary, rows: torch.Tensor, scale: torch.Tensor | None, out: QuantResult | None
) -> QuantResult:
    codes = _codes(library, rows, out)
    scales = rows.new_empty((rows.shape[0], 1), dtype=torch.float32) if out is None else out.scales
    library.quant.dynamic_per_token_quant_fp8_i8(codes, rows, scales)
    return QuantResult(_bytes(codes), scales)


def _per_1x128(
    library: TritonLibrary, rows: torch.Tensor, scale: torch.Tensor | None, out: QuantResult | None
) -> QuantResult:
    quantise = library.hip_free_quant.get_triton_quant(library.quant_type.per_1x128)
    codes, scales = quantise(rows, quant_dtype=library.fp8)
    return QuantResult(_bytes(codes), scales)


def _mxfp4(
    library: TritonLibrary, rows: torch.Tensor, scale: torch.Tensor | None, out: QuantResult | None
) -> QuantResult:
    return _pair(library.quant.dynamic_mxfp4_quant(rows))


def _per_1x32_fp4(shuffle: bool) -> _Quantise:
    def call(
        library: TritonLibrary, rows: torch.Tensor, scale: torch.Tensor | None, out: QuantResult | None
    ) -> QuantResult:
        return _pair(library.fp4.dynamic_mxfp4_quant(rows, shuffle=shuffle))

    return call


def _mxfp8(fnuz: bool) -> _Quantise:
    dtype = torch.float8_e4m3fnuz if fnuz else torch.float8_e4m3fn

    def call(
        library: TritonLibrary, rows: torch.Tensor, scale: torch.Tensor | None, out: QuantResult | None
    ) -> QuantResult:
        return _pair(library.quant.dynamic_mxfp8_quant(rows, quant_dtype=dtype))

    return call


_QUANTISERS: dict[str, _Quantise] = {
    "triton.per_tensor_static": _per_tensor_static,
    "triton.per_tensor": _per_tensor,
    "triton.per_token": _per_token,
    "triton.per_1x128": _per_1x128,
    "triton.mxfp4": _mxfp4,
    "triton.per_1x32_fp4": _per_1x32_fp4(shuffle=False),
    "triton.per_1x32_fp4_shuffled": _per_1x32_fp4(shuffle=True),
    "triton.mxfp8": _mxfp8(fnuz=False),
    "triton.mxfp8_fnuz": _mxfp8(fnuz=True),
}


def _rms_norm(
    library: TritonLibrary, rows: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, epsilon: float
) -> NormResult:
    return NormResult(output=library.rmsnorm.rms_norm(rows, weight, epsilon))


def _rmsnorm_add(
    library: TritonLibrary, rows: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, epsilon: float
) -> NormResult:
    output, summed = torch.empty_like(rows), torch.empty_like(rows)
    library.rmsnorm.rmsnorm2d_fwd_with_add(output, rows, residual, summed, weight, epsilon)
    return NormResult(output=output, residual=summed)


def _fused_rmsnorm_add(
    library: TritonLibrary, rows: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, epsilon: float
) -> NormResult:
    return _element(library.fused_add(rows, weight, epsilon, residual), residual)


def _add_rmsnorm_pad(
    library: TritonLibrary, rows: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, epsilon: float
) -> NormResult:
    result = _element(library.add_pad(rows, weight, epsilon, residual, PAD_TO), residual)
    assert result.output is not None
    return NormResult(output=result.output[:, : rows.shape[1]], residual=result.residual)


def _dynamicquant(
    library: TritonLibrary, rows: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, epsilon: float
) -> NormResult:
    codes = _codes(library, rows, None)
    scales = rows.new_empty((rows.shape[0], 1), dtype=torch.float32)
    quantised = QuantResult(_bytes(codes), scales)
    if residual is None:
        output = library.rmsnorm.rmsnorm2d_fwd_with_dynamicquant(
            codes, rows, scales, weight, epsilon, dump_rms_norm=True
        )
        return NormResult(output=output, quantised=quantised)
    summed = torch.empty_like(rows)
    library.rmsnorm.rmsnorm2d_fwd_with_add_dynamicquant(codes, rows, residual, summed, scales, weight, epsilon)
    return NormResult(residual=summed, quantised=quantised)


def _rms_fp8_group(**layout: bool) -> _Normalise:
    def call(
        library: TritonLibrary, rows: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, epsilon: float
    ) -> NormResult:
        pair, output, _, summed = library.quant.fused_rms_fp8_group_quant(
            rows,
            weight,
            epsilon,
            group_size=128,
            dtype_quant=library.fp8,
            res1=residual,
            output_unquantized_inp1=True,
            **layout,
        )
        return NormResult(output=output, residual=summed, quantised=_pair(pair))

    return call


def _rms_mxfp4(shuffle: bool) -> _Normalise:
    def call(
        library: TritonLibrary, rows: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, epsilon: float
    ) -> NormResult:
        pair, output, _, summed = library.quant.fused_rms_mxfp4_quant(
            rows, weight, epsilon, res1=residual, shuffle=shuffle, output_unquantized_inp1=True
        )
        return NormResult(output=output, residual=summed, quantised=_pair(pair))

    return call


def _rms_mxfp8(
    library: TritonLibrary, rows: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, epsilon: float
) -> NormResult:
    return NormResult(quantised=_pair(library.quant.fused_rms_mxfp8_quant(rows, weight, epsilon)))


_NORMS: dict[str, _Normalise] = {
    "triton.rms_norm": _rms_norm,
    "triton.rmsnorm_add": _rmsnorm_add,
    "triton.fused_rmsnorm": _fused_rmsnorm_add,
    "triton.fused_rmsnorm_add": _fused_rmsnorm_add,
    "triton.rmsnorm_pad": _add_rmsnorm_pad,
    "triton.add_rmsnorm_pad": _add_rmsnorm_pad,
    "triton.rmsnorm_dynamicquant": _dynamicquant,
    "triton.rmsnorm_add_dynamicquant": _dynamicquant,
    "triton.rms_fp8_group_quant": _rms_fp8_group(),
    "triton.rms_fp8_group_quant_strided": _rms_fp8_group(transpose_scale=True, is_x_scale_strided=True),
    "triton.rms_fp8_group_quant_transposed": _rms_fp8_group(transpose_scale=True),
    "triton.add_rms_fp8_group_quant": _rms_fp8_group(),
    "triton.rms_mxfp4": _rms_mxfp4(shuffle=False),
    "triton.rms_mxfp4_shuffled": _rms_mxfp4(shuffle=True),
    "triton.add_rms_mxfp4": _rms_mxfp4(shuffle=False),
    "triton.rms_mxfp8": _rms_mxfp8,
}


def _codes(library: TritonLibrary, rows: torch.Tensor, out: QuantResult | None) -> torch.Tensor:
    """Buffer of FP8 codes: new, or a view of the caller's bytes."""
    codes: torch.Tensor = torch.empty_like(rows, dtype=library.fp8) if out is None else out.codes.view(library.fp8)
    return codes


def _bytes(codes: torch.Tensor) -> torch.Tensor:
    return codes.view(torch.uint8)


def _pair(result: Any) -> QuantResult:
    codes, scales = result
    return QuantResult(_bytes(codes), scales if scales.dtype == torch.float32 else _bytes(scales))


def _element(result: Any, residual: torch.Tensor | None) -> NormResult:
    """``output``, or ``(output, residual)`` where there is a residual."""
    if residual is None:
        return NormResult(output=result)
    output, summed = result
    return NormResult(output=output, residual=summed)
