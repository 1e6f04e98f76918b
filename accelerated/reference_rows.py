"""The specification's quantisers, norms and AllReduce + RMSNorm as row operators of the backend ``reference``.

Scope: they are driven like any library's and judged by the oracles, which share no code with them; its routers are in
:mod:`accelerated.reference_routers`. What a pass does not prove: anything about an accelerated library.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NoReturn

from accelerated import reference_routers
from accelerated.contract import Standing, Support
from accelerated.operators import Family, NormContract, NormResult, QuantContract, QuantResult, RowProblem
from reference.codecs import STANDARD, Codec, Granularity, PayloadRule, ScaleFormat
from reference.norm_numerics import NormInput, NormNumerics, QuantisedFrom, SumOrder, WeightProduct

if TYPE_CHECKING:
    import torch

    from accelerated.interface import RankContext
    from accelerated.routers import RouteContract
    from reference.quantisation import Quantised


@dataclass(frozen=True)
class _Norm:
    """One norm operator of the specification."""

    numerics: NormNumerics
    residual: bool = True
    codec: str = ""
    split: bool = False


_ROUNDED = NormNumerics(quantised_from=QuantisedFrom.ROUNDED)
_LOCAL = {
    "rms_norm": _Norm(_ROUNDED, residual=False),
    "rms_norm_add": _Norm(_ROUNDED),
    "rms_norm_add_rounded": _Norm(replace(_ROUNDED, norm_input=NormInput.ROUNDED)),
    "rms_norm_add_gemma": _Norm(replace(_ROUNDED, gemma=True)),
    "rms_norm_weight_first": _Norm(replace(_ROUNDED, product=WeightProduct.WEIGHT_FIRST), residual=False),
    "rms_norm_rounded_norm": _Norm(replace(_ROUNDED, product=WeightProduct.ROUNDED_NORM), residual=False),
    "rms_norm_add_token": _Norm(_ROUNDED, codec="token_fnuz"),
}
_REDUCED = {
    "fused": _Norm(_ROUNDED),
    "fused_unrounded": _Norm(replace(_ROUNDED, round_reduced=False, sum_order=SumOrder.ANY)),
    "fused_gemma": _Norm(replace(_ROUNDED, gemma=True)),
    "fused_no_residual": _Norm(_ROUNDED, residual=False),
    "split": _Norm(_ROUNDED, split=True),
    "split_token": _Norm(_ROUNDED, codec="token_fnuz", split=True),
    "fused_group128": _Norm(_ROUNDED, codec="group128_fnuz"),
    "fused_mxfp4": _Norm(_ROUNDED, codec="mxfp4_even"),
}
OPERATORS = {
    Family.QUANTISE.value: tuple(STANDARD),
    Family.NORM.value: tuple(_LOCAL),
    Family.ALLREDUCE_NORM.value: tuple(_REDUCED),
    Family.ROUTE.value: reference_routers.ROUTERS,
}


def support(problem: RowProblem, operator: str) -> Support:
    """Everything that a format can hold."""
    if problem.family is Family.ROUTE:
        return reference_routers.support(problem, operator)
    codec = STANDARD.get(operator)
    if codec is not None and codec.payload.bits == 4 and problem.hidden % 2:
        return Support(Standing.REFUSED, f"hidden is {problem.hidden}; two codes share a byte, so give an even one")
    return Support(Standing.CLAIMED)


def contract(problem: RowProblem, operator: str) -> QuantContract | NormContract | RouteContract:
    """Declared behaviour."""
    if problem.family is Family.ROUTE:
        return reference_routers.contract(problem, operator)
    if problem.family is Family.QUANTISE:
        # What a codec leaves open, the executable specification decides.
        codec = replace(STANDARD[operator], may_flush=False, zero_codes_defined=True)
        if codec.payload_rule is PayloadRule.APPROXIMATE_RECIPROCAL:
            codec = replace(codec, payload_rule=PayloadRule.RECIPROCAL)
        return QuantContract(codec, takes_num_rows=codec.granularity in (Granularity.TOKEN, Granularity.GROUP))
    declared = (_LOCAL if problem.family is Family.NORM else _REDUCED)[operator]
    return NormContract(
        numerics=lambda rows: declared.numerics,
        residual=declared.residual,
        codec=STANDARD[declared.codec] if declared.codec else None,
    )


def build(
    context: RankContext, problem: RowProblem, operator: str
) -> ReferenceQuantiser | ReferenceNorm | reference_routers.ReferenceRouter:
    """An operator of the specification."""
    if problem.family is Family.ROUTE:
        return reference_routers.ReferenceRouter(operator)
    if problem.family is Family.QUANTISE:
        return ReferenceQuantiser(STANDARD[operator])
    local = problem.family is Family.NORM
    return ReferenceNorm(context, (_LOCAL if local else _REDUCED)[operator], local)


class ReferenceQuantiser:
    """:func:`reference.quantisation.quantise`."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec

    def quantise(
        self,
        rows: torch.Tensor,
        *,
        scale: torch.Tensor | None = None,
        num_rows: torch.Tensor | None = None,
        out: QuantResult | None = None,
    ) -> QuantResult:
        from reference.quantisation import Quantised, quantise

        if out is not None:
            _refuse_out()
        made = quantise(
            rows,
            self._codec,
            scale=None if scale is None else float(scale),
            num_rows=None if num_rows is None else int(num_rows),
        )
        beyond = rows.shape[0] - made.codes.shape[0]
        if beyond:
            # Rows that do not exist are not in the result; the interface has room for them.
            codes = made.codes.new_zeros(rows.shape)
            scales = made.scales.new_ones(rows.shape[0], made.scales.shape[1])
            codes[: rows.shape[0] - beyond], scales[: rows.shape[0] - beyond] = made.codes, made.scales
            made = Quantised(codes, scales)
        return laid_out(made, self._codec)

    def close(self) -> None:
        return None


class ReferenceNorm:
    """:mod:`reference.allreduce_rms_norm`."""

    def __init__(self, context: RankContext, declared: _Norm, local: bool) -> None:
        self._group, self._declared, self._local = context.group, declared, local

    def normalise(
        self, rows: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, epsilon: float
    ) -> NormResult:
        from reference import allreduce_rms_norm as reduced

        declared = self._declared
        codec = STANDARD[declared.codec] if declared.codec else None
        if self._local:
            made = reduced.local_rms_norm(rows, residual, weight, epsilon, numerics=declared.numerics, codec=codec)
        else:
            form = reduced.split if declared.split else reduced.all_reduce_rms_norm
            made = form(rows, residual, weight, epsilon, numerics=declared.numerics, group=self._group, codec=codec)
        quantised = None if made.quantised is None or codec is None else laid_out(made.quantised, codec)
        return NormResult(made.output, made.residual, quantised)

    def close(self) -> None:
        return None


def laid_out(made: Quantised, codec: Codec) -> QuantResult:
    """Codes as bytes and scales in the codec's layout."""
    import torch

    from reference.formats import E8M0_BIAS, E8M0_NAN
    from reference.layouts import lay_out_scales, pack_e2m1

    codes = pack_e2m1(made.codes) if codec.payload.bits == 4 else made.codes.to(torch.uint8)
    scales = made.scales.float()
    if codec.scale_format is ScaleFormat.E8M0:
        exponent = torch.frexp(made.scales)[1] - 1 + E8M0_BIAS
        scales = torch.where(made.scales.isnan(), E8M0_NAN, exponent).to(torch.uint8)
    if codec.granularity is Granularity.TENSOR:
        return QuantResult(codes, scales.flatten())
    return QuantResult(codes, lay_out_scales(scales, codec.scale_layout))


def _refuse_out() -> NoReturn:
    raise ValueError("the specification returns new tensors; give no out")
