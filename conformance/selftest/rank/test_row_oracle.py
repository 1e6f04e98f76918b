"""The oracles as judges of the specification's row operators: they agree with it, and not with a seeded fault in it.

Scope: conformance/rank/oracle_rows.py and accelerated/reference_rows.py on one rank; AllReduce + RMSNorm runs on gloo
ranks elsewhere. An agreement proves nothing about an accelerated library.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from accelerated import reference_rows
from accelerated.operators import Family, NormContract, NormResult, QuantContract, QuantResult, RowProblem
from accelerated.reference_rows import ReferenceNorm, ReferenceQuantiser
from conformance.engine.protocol import Mismatch
from conformance.rank.judge_rows import Answered
from conformance.rank.oracle_rows import judge_by_oracle
from conformance.selftest.rank.row_answers import some_rows
from reference import allreduce_rms_norm, quantisation, rms_norm
from reference.quantisation import Quantised
from reference.rms_norm import Normalised

QUANTISERS = reference_rows.OPERATORS[Family.QUANTISE.value]
NORMS = reference_rows.OPERATORS[Family.NORM.value]
SCALE = 0.37


def asked_of(family: Family, operator: str, rows: torch.Tensor) -> tuple[Any, QuantContract | NormContract]:
    """An operator of the specification and its contract."""
    problem = RowProblem(family, 1, rows.shape[1], 64, str(rows.dtype).removeprefix("torch."))
    assert reference_rows.support(problem, operator).reason == ""
    contract = reference_rows.contract(problem, operator)
    assert isinstance(contract, QuantContract | NormContract)
    context: Any = type("Context", (), {"group": None})()
    return reference_rows.build(context, problem, operator), contract


def quantised(operator: str, rows: torch.Tensor, num_rows: int = -1) -> tuple[Answered, QuantContract]:
    quantiser, contract = asked_of(Family.QUANTISE, operator, rows)
    assert isinstance(quantiser, ReferenceQuantiser)
    assert isinstance(contract, QuantContract)
    result = quantiser.quantise(
        rows,
        scale=torch.tensor([SCALE]) if contract.codec.static else None,
        num_rows=torch.tensor([num_rows], dtype=torch.int32) if num_rows >= 0 else None,
    )
    given = float(torch.tensor(SCALE))
    return Answered(rows[None], None, torch.ones(rows.shape[1]), 1e-6, given, num_rows, result), contract


def normed(operator: str, rows: torch.Tensor) -> tuple[Answered, NormContract]:
    norm, contract = asked_of(Family.NORM, operator, rows)
    assert isinstance(norm, ReferenceNorm)
    assert isinstance(contract, NormContract)
    residual = some_rows(rows.shape[0], rows.shape[1], rows.dtype, 9) if contract.residual else None
    weight = (1 + some_rows(1, rows.shape[1], torch.float32, 7)[0] / 4).to(rows.dtype)
    result = norm.normalise(rows, residual, weight, 1e-5)
    return Answered(rows[None], residual, weight, 1e-5, 1.0, -1, result), contract


def verdict(answered: Answered, contract: QuantContract | NormContract) -> Mismatch | None:
    mismatch, ratio = judge_by_oracle(3, answered, contract)
    assert mismatch is not None or ratio <= 1
    return mismatch


def hard_rows(hidden: int = 256, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Ordinary rows, powers of two, tiny and large ones."""
    rows = some_rows(8, hidden, torch.float32)
    rows[5] = torch.exp2((torch.arange(hidden) % 17 - 8).float())
    rows[6] *= 2.0**-100 if dtype is torch.float32 else 2.0**-130
    rows[7] *= 2.0**14
    return rows.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("operator", QUANTISERS)
def test_the_specifications_quantisers_pass(operator: str, dtype: torch.dtype) -> None:
    for rows in (hard_rows(256, dtype), hard_rows(200, dtype)[:1], hard_rows(256, dtype)[:0]):
        mismatch = verdict(*quantised(operator, rows))
        assert mismatch is None, mismatch.text()


@pytest.mark.parametrize("operator", ["token_fn", "group128_fnuz", "mxfp4_even"])
def test_rows_that_do_not_exist_take_no_part(operator: str) -> None:
    rows = hard_rows()
    rows[3:] = torch.nan
    for count in (0, 1, 3):
        mismatch = verdict(*quantised(operator, rows, count))
        assert mismatch is None, mismatch.text()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("operator", NORMS)
def test_the_specifications_norms_pass(operator: str, dtype: torch.dtype) -> None:
    for rows in (hard_rows(256, dtype), hard_rows(200, dtype)[:1], hard_rows(256, dtype)[:0]):
        mismatch = verdict(*normed(operator, rows))
        assert mismatch is None, mismatch.text()
    spoilt = hard_rows(256, dtype)
    spoilt[2, 7] = torch.nan
    mismatch = verdict(*normed(operator, spoilt))
    assert mismatch is None, mismatch.text()


def shifted_codes(made: Quantised) -> Quantised:
    codes = made.codes.clone()
    codes[-1, 9] ^= 1
    return Quantised(codes, made.scales)


def stretched_scales(made: Quantised) -> Quantised:
    scales = made.scales.clone()
    scales[-1, -1] *= 2
    return Quantised(made.codes, scales)


@pytest.mark.parametrize(("spoil", "check"), [(shifted_codes, "quantise.codes"), (stretched_scales, "quantise.scales")])
@pytest.mark.parametrize("operator", ["tensor_static_fn", "token_fn", "group128_fnuz", "block128_fn", "mxfp4_even"])
def test_a_fault_in_the_specifications_quantiser(
    operator: str, spoil: Callable[[Quantised], Quantised], check: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = quantisation.quantise
    monkeypatch.setattr(quantisation, "quantise", lambda *given, **named: spoil(right(*given, **named)))
    mismatch = verdict(*quantised(operator, hard_rows()[:5]))
    assert mismatch is not None
    assert (mismatch.check, mismatch.round) == (check, 3)


def moved(field: str, by: float) -> Callable[[Normalised], Normalised]:
    def move(made: Normalised) -> Normalised:
        tensor = getattr(made, field).clone()
        tensor[4, 11] *= 1 + by
        return Normalised(**{**vars(made), field: tensor})

    return move


@pytest.mark.parametrize(
    ("operator", "spoil", "check"),
    [
        ("rms_norm", moved("output", 0.02), "norm.output"),
        ("rms_norm_add", moved("residual", 0.02), "norm.residual"),
        ("rms_norm_add_gemma", moved("output", -0.02), "norm.output"),
    ],
)
def test_a_fault_in_the_specifications_norm(
    operator: str, spoil: Callable[[Normalised], Normalised], check: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = rms_norm.normalise
    monkeypatch.setattr(allreduce_rms_norm, "normalise", lambda *given, **named: spoil(right(*given, **named)))
    mismatch = verdict(*normed(operator, hard_rows()[:6]))
    assert mismatch is not None
    assert (mismatch.check, mismatch.token, mismatch.element) == (check, 4, 11)


def test_a_fault_in_a_fused_quantiser(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is judged by the output that came back, of which every rank holds a share."""
    for row, seen in ((4, False), (5, True)):
        answered, contract = normed("rms_norm_add_token", hard_rows()[:6])
        assert verdict(answered, contract) is None
        assert isinstance(answered.result, NormResult)
        quantised_output = answered.result.quantised
        assert isinstance(quantised_output, QuantResult)
        answered.share = slice(1, None, 2)
        quantised_output.codes[row, 60] ^= 1
        mismatch = verdict(answered, contract)
        assert (mismatch is not None) == seen
        assert mismatch is None or (mismatch.check, mismatch.token, mismatch.element) == ("quantise.codes", row, 60)


def test_a_layout_is_read_before_it_is_judged() -> None:
    answered, contract = quantised("group128_fn", hard_rows())
    assert isinstance(answered.result, QuantResult)
    answered.result.scales = answered.result.scales.T.contiguous().T
    mismatch = verdict(answered, contract)
    assert mismatch is not None
    assert mismatch.check == "quantise.layout"


def test_the_specification_takes_no_buffers_of_ours() -> None:
    quantiser, _ = asked_of(Family.QUANTISE, "token_fn", hard_rows())
    out = QuantResult(torch.zeros(1), torch.zeros(1))
    with pytest.raises(ValueError, match="give no out"):
        quantiser.quantise(hard_rows(), out=out)


def test_packed_codes_of_odd_rows_are_refused() -> None:
    problem = RowProblem(Family.QUANTISE, 1, 33, 8)
    assert "33" in reference_rows.support(problem, "mxfp4_even").reason
    assert reference_rows.support(problem, "token_fn").reason == ""
