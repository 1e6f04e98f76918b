"""Calls of row operators and correct results of them, for tests of the judges. Proves nothing by itself."""

from __future__ import annotations

from dataclasses import replace

import torch

from accelerated.operators import NormContract, NormResult, QuantContract, QuantResult
from accelerated.reference_rows import laid_out
from conformance.rank.judge_rows import Answered
from reference.codecs import Codec
from reference.formats import E2M1
from reference.layouts import pack_e2m1, unpack_e2m1
from reference.norm_numerics import NormNumerics, QuantisedFrom, SumOrder
from reference.quantisation import quantise
from reference.rms_norm import normalise, ordered_sum

#: Row of zeros, and where an element of its own lies.
ZERO_ROW, NAN_ROW = 3, 4


def some_rows(rows: int = 6, hidden: int = 256, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    """``[M, N]``: ordinary rows of different magnitudes, and one of zeros where there are enough."""
    made = torch.randn(rows, hidden, generator=torch.Generator().manual_seed(seed))
    made *= torch.exp2((torch.arange(rows) % 9 - 4).float()).unsqueeze(1)
    if rows > ZERO_ROW:
        made[ZERO_ROW] = 0
    return made.to(dtype)


def quantised(rows: torch.Tensor, contract: QuantContract, scale: float = 0.0625, num_rows: int = -1) -> Answered:
    """A quantiser's call with a correct result."""
    codec = contract.codec
    made = quantise(rows, codec, scale=scale if codec.static else None)
    return Answered(rows.unsqueeze(0), None, torch.ones(rows.shape[1]), 1e-6, scale, num_rows, laid_out(made, codec))


def normed(
    numerics: NormNumerics,
    *,
    ranks: int = 1,
    rows: int = 6,
    hidden: int = 256,
    dtype: torch.dtype = torch.bfloat16,
    residual: bool = True,
    codec: Codec | None = None,
    first: int = 0,
) -> tuple[Answered, NormContract]:
    """A norm's call with a correct result; its sum over ranks begins with rank ``first``."""
    terms = torch.stack([some_rows(rows, hidden, dtype, seed) for seed in range(ranks)])
    added = some_rows(rows, hidden, dtype, 99) if residual else None
    weight = (1 + some_rows(1, hidden, torch.float32, 7)[0] / 4).to(dtype)
    made = normalise(ordered_sum(terms, first), added, weight, 1e-5, numerics, dtype)
    seen = made.output if numerics.quantised_from is QuantisedFrom.ROUNDED else made.unrounded
    result = NormResult(
        made.output,
        made.residual if residual else None,
        laid_out(quantise(seen, codec), codec) if codec is not None else None,
    )
    contract = NormContract(lambda _: numerics, residual=residual, codec=codec)
    return Answered(terms, added, weight, 1e-5, 1.0, -1, result), contract


def in_any_order(numerics: NormNumerics) -> NormNumerics:
    """The same with an open order of additions."""
    return replace(numerics, sum_order=SumOrder.ANY, round_reduced=False)


def codes_of(answered: Answered) -> QuantResult:
    """The quantised part of a result."""
    assert isinstance(answered.result, QuantResult | NormResult)
    found = answered.result if isinstance(answered.result, QuantResult) else answered.result.quantised
    assert found is not None
    return found


def change_code(result: QuantResult, codec: Codec, row: int, element: int, by: int) -> None:
    """Add to the magnitude of one code."""
    if codec.payload is E2M1:
        codes = unpack_e2m1(result.codes)
        codes[row, element] += by
        result.codes.copy_(pack_e2m1(codes))
    else:
        result.codes[row, element] += by
