"""The judge of norms: correct results pass, each corruption is named by its check and placed.

Scope: the norms' half of conformance/rank/judge_rows.py on tensors built here. A pass proves nothing about how the
tensors came to be, nor about the width of the intervals.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from accelerated.contract import ContractError
from accelerated.operators import NormContract, NormResult
from conformance.engine.protocol import Mismatch
from conformance.rank import judge_rows
from conformance.rank.judge_rows import Answered, judge_call
from conformance.selftest.rank.row_answers import change_code, codes_of, normed
from reference.codecs import STANDARD
from reference.formats import Ties
from reference.norm_numerics import NormInput, NormNumerics, QuantisedFrom, SumOrder, WeightProduct
from reference.rms_norm import normalise, ordered_sum, store

PLAIN = NormNumerics()
NUMERICS = {
    "plain": PLAIN,
    "unrounded sum": NormNumerics(round_reduced=False),
    "rounded input": NormNumerics(norm_input=NormInput.ROUNDED),
    "either input": NormNumerics(norm_input=NormInput.EITHER),
    "weight first": NormNumerics(product=WeightProduct.WEIGHT_FIRST),
    "either product": NormNumerics(product=WeightProduct.EITHER),
    "rounded norm": NormNumerics(product=WeightProduct.ROUNDED_NORM),
    "gemma": NormNumerics(gemma=True),
    "truncating": NormNumerics(store=Ties.TRUNCATE),
    "two stores": NormNumerics(store=Ties.TRUNCATE, residual_store=Ties.EVEN),
    "any order": NormNumerics(sum_order=SumOrder.ANY, round_reduced=False),
    "rotated": NormNumerics(sum_order=SumOrder.ROTATED),
    "flushing": NormNumerics(may_flush=True),
    "few additions": NormNumerics(square_additions=16),
}
#: Two of the above that differ in every respect that a corruption could hide behind.
TWO = ("plain", "any order")


def judged(answered: Answered, contract: NormContract, check: str) -> Mismatch:
    mismatch, ratio = judge_call(2, answered, contract)
    assert mismatch is not None, f"the corruption passed with {ratio}"
    assert mismatch.check == check, mismatch.text()
    return mismatch


def result_of(answered: Answered) -> NormResult:
    assert isinstance(answered.result, NormResult)
    return answered.result


def step(tensor: torch.Tensor | None, row: int, element: int, units: int) -> None:
    """Move an element of a 16-bit type away from zero by units in its last place."""
    assert tensor is not None
    tensor.view(torch.int16)[row, element] += units


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("name", NUMERICS)
def test_the_specification_passes(name: str, ranks: int, dtype: torch.dtype) -> None:
    for residual in (True, False):
        for rows in (6, 1, 0):
            answered, contract = normed(NUMERICS[name], ranks=ranks, rows=rows, dtype=dtype, residual=residual)
            mismatch, ratio = judge_call(0, answered, contract)
            assert mismatch is None, mismatch.text()
            assert ratio <= 1


@pytest.mark.parametrize("first", range(4))
def test_a_sum_in_another_order_passes_where_the_order_is_open(first: int) -> None:
    for name, passes in (("rotated", True), ("any order", True), ("unrounded sum", first == 0)):
        answered, contract = normed(NUMERICS[name], ranks=4, rows=40, dtype=torch.float32, first=first)
        assert (judge_call(0, answered, contract)[0] is None) == passes, name


@pytest.mark.parametrize("name", NUMERICS)
def test_residual_off_by_one_unit(name: str) -> None:
    answered, contract = normed(NUMERICS[name], ranks=2)
    step(result_of(answered).residual, 4, 77, 1)
    mismatch = judged(answered, contract, "norm.residual")
    assert (mismatch.token, mismatch.element) == (4, 77)


@pytest.mark.parametrize("name", NUMERICS)
@pytest.mark.parametrize("units", [2, -2])
def test_output_off_by_two_units(name: str, units: int) -> None:
    answered, contract = normed(NUMERICS[name], ranks=2)
    row = 5  # the last one
    step(result_of(answered).output, row, 254, units)
    mismatch = judged(answered, contract, "norm.output")
    assert (mismatch.token, mismatch.element) == (row, 254)


@pytest.mark.parametrize("name", ["plain", "gemma", "rounded input"])
def test_most_elements_are_known_to_the_bit(name: str) -> None:
    """One unit in the last place is caught wherever the interval holds one value; that is most of them."""
    caught = 0
    for element in range(0, 256, 8):
        answered, contract = normed(NUMERICS[name])
        step(result_of(answered).output, 1, element, 1)
        caught += judge_call(0, answered, contract)[0] is not None
    assert caught >= 28


@pytest.mark.parametrize("name", TWO)
@pytest.mark.parametrize("field", ["output", "residual"])
def test_another_row(name: str, field: str) -> None:
    answered, contract = normed(NUMERICS[name], ranks=2)
    tensor = getattr(result_of(answered), field)
    tensor[1] = tensor[2].clone()
    assert judged(answered, contract, f"norm.{field}").token == 1


def with_result(answered: Answered, contract: NormContract, total: torch.Tensor, **changes: object) -> None:
    """The result of another sum over ranks, or of other numerics, residual, weight or epsilon."""
    arguments = {
        "residual": answered.residual,
        "weight": answered.weight,
        "epsilon": answered.epsilon,
        "numerics": contract.numerics(0),
        **changes,
    }
    made = normalise(total, dtype=answered.terms.dtype, **arguments)  # type: ignore[arg-type]
    answered.result = NormResult(made.output, made.residual if contract.residual else None)


@pytest.mark.parametrize("name", TWO)
@pytest.mark.parametrize("missing", range(3))
def test_a_missing_rank(name: str, missing: int) -> None:
    answered, contract = normed(NUMERICS[name], ranks=3)
    others = [rank for rank in range(3) if rank != missing]
    with_result(answered, contract, ordered_sum(answered.terms[others]))
    judged(answered, contract, "norm.residual")
    answered, contract = normed(NUMERICS[name], ranks=3, residual=False)
    with_result(answered, contract, ordered_sum(answered.terms[others]))
    judged(answered, contract, "norm.output")


WRONG_NORMS: list[tuple[str, dict[str, object], str]] = [
    ("the residual is forgotten", {"residual": None}, "norm.residual"),
    ("another epsilon", {"epsilon": 0.01}, "norm.output"),
    ("the weight is forgotten", {"weight": torch.ones(256)}, "norm.output"),
    ("one more in the weight", {"numerics": replace(PLAIN, gemma=True)}, "norm.output"),
    ("a truncating store", {"numerics": replace(PLAIN, store=Ties.TRUNCATE)}, "norm.residual"),
    ("the sum is not rounded", {"numerics": replace(PLAIN, round_reduced=False)}, "norm.residual"),
    ("the norm of the rounded sum", {"numerics": replace(PLAIN, norm_input=NormInput.ROUNDED)}, "norm.output"),
    ("a rounding before the weight", {"numerics": replace(PLAIN, product=WeightProduct.ROUNDED_NORM)}, "norm.output"),
]


@pytest.mark.parametrize(("changes", "check"), [w[1:] for w in WRONG_NORMS], ids=[w[0] for w in WRONG_NORMS])
def test_another_norm(changes: dict[str, object], check: str) -> None:
    answered, contract = normed(PLAIN, ranks=3, rows=40)
    with_result(answered, contract, ordered_sum(answered.terms), **changes)
    judged(answered, contract, check)


MALFORMED: list[tuple[str, Callable[[NormResult], None], str]] = [
    ("no output", lambda r: setattr(r, "output", None), "norm.output"),
    ("no residual", lambda r: setattr(r, "residual", None), "norm.residual"),
    ("float32", lambda r: setattr(r, "output", r.output.float()), "norm.output"),  # type: ignore[union-attr]
    ("too few rows", lambda r: setattr(r, "residual", r.residual[1:]), "norm.residual"),  # type: ignore[index]
    ("flat", lambda r: setattr(r, "output", r.output.flatten()), "norm.output"),  # type: ignore[union-attr]
]


@pytest.mark.parametrize(("corrupt", "check"), [m[1:] for m in MALFORMED], ids=[m[0] for m in MALFORMED])
def test_malformed(corrupt: Callable[[NormResult], None], check: str) -> None:
    for rows in (6, 0):
        answered, contract = normed(PLAIN, rows=rows)
        corrupt(result_of(answered))
        if rows or check == "norm.output":
            assert "came back as" in judged(answered, contract, check).message


def test_a_norm_that_promises_nothing_has_no_contract() -> None:
    _, contract = normed(PLAIN, residual=False)
    with pytest.raises(ContractError, match="promises no result"):
        replace(contract, element_output=False)
    with pytest.raises(ContractError, match="per tensor, static=False, has no check yet"):
        replace(contract, codec=STANDARD["tensor_fn"])


@pytest.mark.parametrize(("row", "told"), [(0, False), (1, True), (4, False), (5, True)])
def test_a_rank_judges_its_share_and_names_the_row_of_the_call(row: int, told: bool) -> None:
    for field in ("output", "residual"):
        answered, contract = normed(PLAIN, ranks=2)
        answered.share = slice(1, None, 2)
        step(getattr(result_of(answered), field), row, 3, 2)
        mismatch, _ = judge_call(0, answered, contract)
        assert (mismatch is not None) == told
        assert mismatch is None or (mismatch.token, mismatch.element) == (row, 3)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_share_is_judged_in_parts_and_placed_as_a_whole(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_rows, "_AT_ONCE", 256 * 3)
    for row in range(13):
        answered, contract = normed(PLAIN, ranks=2, rows=13, codec=STANDARD["group128_fnuz"])
        answered.share = slice(rank, None, 2)
        assert judge_call(0, answered, contract)[0] is None
        step(result_of(answered).output, row, 5, 2)
        mismatch, _ = judge_call(0, answered, contract)
        assert (None if mismatch is None else mismatch.token) == (row if row % 2 == rank else None)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
def test_a_spoilt_row_is_free_and_its_neighbours_are_not(value: float) -> None:
    answered, contract = normed(PLAIN, ranks=2)
    answered.terms[1, 2, 9] = answered.terms[0, 2, 9] = value
    for tensor in (result_of(answered).output, result_of(answered).residual):
        assert tensor is not None
        tensor[2] = torch.nan
    assert judge_call(0, answered, contract)[0] is None
    step(result_of(answered).output, 3, 9, 3)
    assert judged(answered, contract, "norm.output").token == 3
    answered.terms[0, 3, 9] = torch.nan
    assert judge_call(0, answered, contract)[0] is None


# ------------------------------------------------------------------------------------------------ quantised outputs
CODECS = ["token_fnuz", "group128_fnuz", "mxfp4_even", "group128_hip_fnuz"]


@pytest.mark.parametrize("seen", QuantisedFrom)
@pytest.mark.parametrize("name", CODECS)
def test_a_quantised_output(name: str, seen: QuantisedFrom) -> None:
    codec = STANDARD[name]
    numerics = NormNumerics(quantised_from=seen)
    answered, contract = normed(numerics, ranks=2, codec=codec)
    mismatch, _ = judge_call(0, answered, contract)
    assert mismatch is None, mismatch.text()
    answered.share = slice(1, None, 2)
    change_code(codes_of(answered), codec, 5, 200, 2 if int(codes_of(answered).codes[5, 100]) % 8 < 4 else -2)
    assert judged(answered, contract, "norm.codes").token == 5
    for place in ((5, 0), (1, -1)):
        answered, contract = normed(numerics, ranks=2, codec=codec)
        answered.share = slice(1, None, 2)
        scales = codes_of(answered).scales
        if scales.dtype == torch.uint8:
            scales[place] += 1
        else:
            scales[place] *= 1.02
        assert judged(answered, contract, "norm.scales").token == place[0]


def test_a_quantised_output_that_is_absent_or_laid_out_otherwise() -> None:
    codec = STANDARD["group128_fnuz"]
    answered, contract = normed(PLAIN, codec=codec)
    codes_of(answered).scales = codes_of(answered).scales.T.contiguous().T
    judged(answered, contract, "quantise.layout")
    result_of(answered).quantised = None
    assert "promises a quantised output" in judged(answered, contract, "quantise.layout").message


def test_the_quantiser_of_a_call_with_so_many_rows() -> None:
    answered, contract = normed(PLAIN, rows=6, codec=STANDARD["group128_fnuz"])
    by_rows = {6: STANDARD["group128_fnuz"], 5: STANDARD["token_fnuz"]}
    assert judge_call(0, answered, replace(contract, codecs=by_rows.__getitem__))[0] is None
    judged(answered, replace(contract, codecs=lambda rows: by_rows[rows - 1]), "quantise.layout")


# ---------------------------------------------------------------------------------------------------------- the mean
def test_a_truncated_residual_is_named() -> None:
    answered, contract = normed(PLAIN, ranks=4, rows=40)
    residual = result_of(answered).residual
    assert residual is not None
    assert answered.residual is not None
    exact = answered.terms.double().sum(0) + answered.residual.double()
    residual.copy_(store(exact.float(), residual.dtype, Ties.TRUNCATE))
    assert "-0.5" in judged(answered, contract, "norm.residual").message


def test_rounding_to_nearest_is_never_biased() -> None:
    """In whatever order the ranks are added, on values of few bits too, where ties are frequent."""
    for ranks in (2, 4, 8):
        for first in range(2):
            for round_reduced in (True, False):
                numerics = replace(PLAIN, sum_order=SumOrder.ANY, round_reduced=round_reduced)
                answered, contract = normed(numerics, ranks=ranks, rows=24, first=first)
                mismatch, _ = judge_call(0, answered, contract)
                assert mismatch is None, mismatch.text()
