"""The specification's experts as operators of the backend ``reference``.

Scope: :func:`reference.experts.forward` driven like any library's experts and judged by the oracle, which shares no
code with it. What a pass does not prove: anything about an accelerated library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from accelerated.contract import ContractError, Standing, Support
from accelerated.experts import ExpertContract, ExpertProblem
from reference.codecs import STANDARD, Codec, Granularity
from reference.expert_numerics import SWIGLU_LIMIT, Activation, ExpertNumerics, SlotSum
from reference.formats import E2M1, FORMATS

if TYPE_CHECKING:
    import torch

    from reference.expert_weights import ExpertWeights


@dataclass(frozen=True)
class Form:
    """One experts operator: its numerics in bfloat16, and what its calls take.

    Attributes:
        numerics: ``intermediate_store`` and ``gemm1_store`` stand for the element type where they are given.
        stored: the products with W1 are stored in the element type as well.
        wired: rows may come quantised.
        biased: with biases.
    """

    numerics: ExpertNumerics
    stored: bool = False
    wired: bool = False
    biased: bool = False


_PLAIN = ExpertNumerics()
#: What checkpoints and the libraries for them do to weights, rows and intermediates.
_TOKEN = replace(
    _PLAIN,
    input_codec=STANDARD["token_fn"],
    weight_codec=STANDARD["token_fn"],
    intermediate_codec=STANDARD["token_fn"],
)
_BLOCK = replace(
    _PLAIN,
    input_codec=STANDARD["group128_fn"],
    weight_codec=STANDARD["block128_fn"],
    intermediate_codec=STANDARD["group128_fn"],
)
_MXFP4 = replace(
    _PLAIN,
    input_codec=STANDARD["mxfp4_up"],
    weight_codec=STANDARD["mxfp4_up"],
    intermediate_codec=STANDARD["mxfp4_up"],
)
_SWIGLU = replace(_PLAIN, activation=Activation.SWIGLU, limit=SWIGLU_LIMIT, weight_codec=STANDARD["mxfp4_up"])

#: Operators by name; "stored_terms" rounds where kernels do that store every product (Triton).
FORMS: Mapping[str, Form] = {
    "experts.bf16": Form(_PLAIN),
    "experts.bf16_gelu": Form(replace(_PLAIN, activation=Activation.GELU)),
    "experts.fp8_token": Form(_TOKEN, wired=True),
    "experts.fp8_block": Form(_BLOCK, wired=True),
    "experts.mxfp4": Form(_MXFP4, wired=True),
    "experts.swiglu_mxfp4": Form(_SWIGLU, biased=True),
    "experts.stored_terms": Form(replace(_PLAIN, slot_sum=SlotSum.ROUNDED_TERMS), stored=True),
}
OPERATORS: Sequence[str] = tuple(FORMS)


@dataclass(frozen=True)
class Always:
    """Numerics that do not depend on the number of rows."""

    numerics: ExpertNumerics

    def __call__(self, rows: int) -> ExpertNumerics:
        """The same for every call."""
        return self.numerics


def support(problem: ExpertProblem, operator: str) -> Support:
    """Everything that the groups of the scales divide."""
    try:
        numerics = _form(operator).numerics
    except ContractError as error:
        return Support(Standing.REFUSED, str(error))
    for name, size in (("hidden", problem.hidden), ("intermediate", problem.intermediate)):
        for codec in (numerics.input_codec, numerics.weight_codec, numerics.intermediate_codec):
            group = 0 if codec is None else codec.group
            if group and size % group:
                return Support(
                    Standing.REFUSED, f"{name} is {size}; {operator} has scales of {group} elements: give a multiple"
                )
    return Support(Standing.CLAIMED)


def contract(problem: ExpertProblem, operator: str) -> ExpertContract:
    """Declared behaviour.

    Raises:
        ContractError: unknown operator.
    """
    form, element = _form(operator), FORMATS[problem.dtype]
    numerics = replace(form.numerics, intermediate_store=element, gemm1_store=element if form.stored else None)
    return ExpertContract(
        numerics=Always(numerics),
        wire=numerics.input_codec if form.wired else None,
        biased=form.biased,
        # Rows of one expert are multiplied together: how torch adds up may depend on how many they are.
        rows_alone=False,
        # An expert has the same rows whatever else its rank holds.
        bits_at_any_shards=True,
    )


def _form(operator: str) -> Form:
    if operator not in FORMS:
        raise ContractError(f"unknown experts operator {operator!r}; choose one of {', '.join(FORMS)}")
    return FORMS[operator]


class ReferenceExperts:
    """:func:`reference.experts.forward` on the experts of one rank."""

    def __init__(self, problem: ExpertProblem, operator: str) -> None:
        import torch

        declared = contract(problem, operator)
        self._numerics: ExpertNumerics = declared.numerics(1)
        self._wire = declared.wire
        self._dtype: torch.dtype = getattr(torch, problem.dtype)
        self._hidden, self._experts = problem.hidden, problem.experts + problem.shared
        self._forward: Callable[..., torch.Tensor] | None = None

    def load(self, weights: ExpertWeights, owned: Sequence[int]) -> None:
        """See :class:`accelerated.experts.ExpertOperation`."""
        from functools import partial

        import torch

        from reference.expert_gemm import Dense
        from reference.experts import forward

        slot_of = torch.full((self._experts,), -1, dtype=torch.int64, device=weights.w1.device)
        slot_of[list(owned)] = torch.arange(len(owned), device=slot_of.device)
        self._forward = partial(
            forward, local=Dense(weights), slot_of=slot_of, numerics=self._numerics, dtype=self._dtype
        )

    def quantise(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See :class:`accelerated.experts.ExpertOperation`; codes and E8M0 scales as bytes."""
        import torch

        from reference.layouts import pack_e2m1
        from reference.quantisation import quantise

        if self._wire is None:
            return rows, None
        quantised = quantise(rows, self._wire)
        packed = self._wire.payload is E2M1
        codes = pack_e2m1(quantised.codes) if packed else quantised.codes.to(torch.uint8)
        scales = (torch.log2(quantised.scales) + 127).to(torch.uint8) if packed else quantised.scales.float()
        return codes, scales

    def experts(
        self,
        rows: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        *,
        scales: torch.Tensor | None = None,
        num_rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See :class:`accelerated.experts.ExpertOperation`; rows from ``num_rows`` on come back as zeros."""
        import torch

        if self._forward is None:
            raise RuntimeError("there are no weights, or the operation is closed; call load first")
        if num_rows is not None:
            beyond = torch.arange(ids.shape[0], device=ids.device)[:, None] >= num_rows
            ids = ids.masked_fill(beyond, -1)
        if scales is not None:
            rows = self._values(rows, scales)
        return self._forward(rows, ids, weights, quantised=scales is not None)

    def close(self) -> None:
        """Release the weights."""
        self._forward = None

    def _values(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """What codes of the wire stand for, ``[M, H]`` float64."""
        import torch

        from reference.layouts import unpack_e2m1
        from reference.rounding import decode, decode_e8m0
        from reference.scales import expand

        wire: Codec | None = self._wire
        if wire is None:
            raise ValueError("scales given to experts whose contract has no wire")
        assert wire.granularity in (Granularity.TOKEN, Granularity.GROUP)
        stored = codes.contiguous().view(torch.uint8)
        wide = unpack_e2m1(stored) if wire.payload is E2M1 else stored.long()
        each = scales.double() if scales.dtype == torch.float32 else decode_e8m0(scales.contiguous().view(torch.uint8))
        return decode(wide, wire.payload) * expand(each, wire, *wide.shape)
