"""Real AITER Triton operators against the reference, in a process of its own; see ``test_aiter_triton_real.py``.

Scope: the operators' contracts on adversarial rows, that a wrong contract is noticed, and the defects known at AITER
e4048607, each with its smallest input. Interpreted, a pass shows that the algorithm is right, not that hardware is.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from accelerated.aiter_ops import triton_contract
from accelerated.aiter_ops.triton_backend import AiterTritonBackend, aiter_triton
from accelerated.aiter_ops.triton_library import LibraryError
from accelerated.aiter_ops.triton_operations import TritonNorm, TritonQuantiser, TritonSession
from accelerated.contract import Standing
from accelerated.interface import RankContext
from accelerated.operators import Family, NormContract, QuantContract, RowProblem
from conformance.rank.judge_rows import Answered, judge_call
from conformance.selftest.reference.ranks import World
from reference.codecs import Codec, Granularity, PayloadRule, ScaleLayout, ScaleRule
from reference.formats import Ties
from reference.norm_numerics import NormInput, NormNumerics
from reference.rounding import decode

BF16 = torch.bfloat16
#: 41 / 64: dividing by it and multiplying by its rounded reciprocal differ (41 * fl(1 / 41) is not 1).
_STATIC_SCALE = 41 / 64


@functools.cache
def _opened(world_size: int) -> tuple[AiterTritonBackend, TritonSession]:
    """Backend and session of whatever architecture the environment has AITER report."""
    warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of the interpreter: log2 of zero, 1 / 0
    errors = []
    for arch in triton_contract.FP8:
        context = RankContext(0, world_size, torch.device("cpu"), torch.distributed.group.WORLD, arch)  # type: ignore[arg-type]
        try:
            return aiter_triton(arch), aiter_triton(arch).open(context)
        except LibraryError as error:
            errors.append(str(error))
    raise LibraryError("; ".join(errors))


def _problem(name: str, hidden: int) -> RowProblem:
    return RowProblem(triton_contract.OPERATORS[name].family, 1, hidden, 512)


def _runs(family: Family, widths: tuple[int, ...]) -> Iterator[tuple[str, int]]:
    """Operators at the widths that they take."""
    backend, _ = _opened(1)
    for name in triton_contract.names(family):
        for hidden in widths:
            if backend.support(_problem(name, hidden), name).standing is not Standing.REFUSED:
                yield name, hidden


def _quantise(name: str, rows: torch.Tensor, codec: Codec | None = None) -> str:
    """What is wrong with one call's result, judged by the declared codec or by ``codec``; "" if nothing."""
    backend, session = _opened(1)
    problem = _problem(name, rows.shape[1])
    contract, operation = backend.contract(problem, name), session.build(problem, name)
    assert isinstance(contract, QuantContract)
    assert isinstance(operation, TritonQuantiser)
    scale = torch.tensor([_STATIC_SCALE]) if contract.codec.static else None
    result = operation.quantise(rows.clone(), scale=scale)
    contract = replace(contract, codec=codec) if codec else contract
    answered = Answered(rows[None], None, torch.empty(0), 0.0, _STATIC_SCALE, -1, result)
    mismatch, _ = judge_call(0, answered, contract)
    return "" if mismatch is None else f"{name} at {tuple(rows.shape)}: {mismatch}"


def _normalise(name: str, rows: torch.Tensor, residual: torch.Tensor, contract: NormContract | None = None) -> str:
    """The same for a norm; weights from the last row."""
    backend, session = _opened(1)
    problem = _problem(name, rows.shape[1])
    declared, operation = backend.contract(problem, name), session.build(problem, name)
    assert isinstance(declared, NormContract)
    assert isinstance(operation, TritonNorm)
    added = residual if declared.residual else None
    weight = rows[-1].roll(1) + 1
    result = operation.normalise(rows.clone(), None if added is None else added.clone(), weight, 1e-6)
    mismatch, _ = judge_call(0, Answered(rows[None], added, weight, 1e-6, 0.0, -1, result), contract or declared)
    return "" if mismatch is None else f"{name} at {tuple(rows.shape)}: {mismatch}"


def _random(count: int, hidden: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, hidden, generator=torch.Generator().manual_seed(seed))


def _hard_rows(hidden: int) -> list[torch.Tensor]:
    """Magnitudes that differ by row and by block, one zero group, ties, thresholds of scales, NaN and infinities."""
    ties = [0.25, 0.75, -1.25, 1.75, 2.5, -3.5, 5.0, 6.0, -0.0, 4.5, 7.0 / 16, 9.0 / 16, 15.5, 16.5, 0.0, 3.0]
    row_of_ties = torch.tensor(ties).repeat(hidden // 16 + 1)[:hidden]
    largest = torch.tensor([1.0, 1.5, 1.75, 1.875, 1.9375, 1.9921875])[:, None]
    spoilt = _random(4, hidden)
    spoilt[1, hidden // 2], spoilt[2, 0], spoilt[3, -1] = torch.nan, torch.inf, -torch.inf
    blocks = [
        _random(5, hidden),
        _random(4, hidden) * torch.tensor([1e-30, 1e-6, 1e8, 1e30])[:, None],
        _random(3, hidden) * torch.exp2(((torch.arange(hidden) // 32) % 17 - 8).float()),
        row_of_ties * torch.tensor([1.0, 2.0**-3, 2.0**5])[:, None],
        torch.cat([largest, _random(6, hidden - 1).clamp(-1, 1)], dim=1),
        spoilt,
    ]
    if hidden > 32:
        blocks.append(_random(2, hidden).index_fill(1, torch.arange(32), 0.0))
    return [block.to(BF16) for block in blocks]


def quantisers_keep_their_contracts(world: World) -> None:
    # 36 and 100 leave the last group ragged and fill no block.
    for name, hidden in _runs(Family.QUANTISE, (4, 36, 100, 128)):
        if name == "triton.mxfp8_fnuz":
            continue
        blocks = _hard_rows(hidden)
        # A scale per tensor judges blocks one by one; the others take one row, and as many as make another path.
        together = [torch.cat(blocks)[:1], torch.cat([*blocks, *blocks])]
        for rows in blocks if "tensor" in name else together:
            assert _quantise(name, rows) == ""


def quantisers_take_every_bfloat16(world: World) -> None:
    codes = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(BF16).reshape(64, 1024)
    rows = torch.where(codes.abs() <= 6, codes, torch.ones_like(codes)).index_fill(1, torch.arange(0, 1024, 32), 6.0)
    for name, _ in _runs(Family.QUANTISE, (1024,)):
        # per_1x128 is per_token on rows of 128, the shuffled one differs by its layout.
        if name not in ("triton.mxfp8_fnuz", "triton.per_1x128", "triton.per_1x32_fp4_shuffled"):
            assert _quantise(name, rows) == ""


def no_rows_are_no_error(world: World) -> None:
    for name, hidden in _runs(Family.QUANTISE, (128,)):
        if triton_contract.OPERATORS[name].takes_empty:
            assert _quantise(name, torch.empty(0, hidden, dtype=BF16)) == ""
    for name, hidden in _runs(Family.NORM, (128,)):
        operation = _opened(1)[1].build(_problem(name, hidden), name)
        assert isinstance(operation, TritonNorm)
        empty = torch.empty(0, hidden, dtype=BF16)
        residual = empty if triton_contract.OPERATORS[name].residual else None
        operation.normalise(empty, residual, torch.ones(hidden, dtype=BF16), 1e-6)


def norms_keep_their_contracts(world: World) -> None:
    for name, hidden in _runs(Family.NORM, (100, 384)):
        # Squares of these are finite; residuals of another magnitude, and some that cancel the row.
        rows = torch.cat([*_hard_rows(hidden), torch.zeros(2, hidden, dtype=BF16)]).clamp(-1e15, 1e15)
        residual = (_random(len(rows), hidden, 1) / 3).to(BF16)
        residual[::4] = -rows[::4]
        assert _normalise(name, rows[:1], residual[:1]) == ""
        assert _normalise(name, rows, residual) == ""


def norms_keep_their_contracts_beyond_one_block(world: World) -> None:
    # 65536 bytes are one block (normalization/rmsnorm.py:23).
    for name in (
        "triton.rms_norm",
        "triton.rmsnorm_add",
        "triton.rmsnorm_dynamicquant",
        "triton.rmsnorm_add_dynamicquant",
    ):
        assert _normalise(name, _random(2, 32840).to(BF16), _random(2, 32840, 1).to(BF16)) == ""


def padding_is_zero(world: World) -> None:
    library = _opened(1)[1].library
    for hidden in (100, 256, 300):
        rows = _random(2, hidden).to(BF16)
        output, _ = library.add_pad(rows, torch.ones(hidden, dtype=BF16), 1e-6, rows, 256)
        assert output.shape[1] == -(-hidden // 256) * 256
        assert not output[:, hidden:].any()


def a_wrong_codec_is_noticed(world: World) -> None:
    backend, _ = _opened(1)
    changes: dict[str, list[dict[str, Any]]] = {
        "triton.per_tensor_static": [{"payload_rule": PayloadRule.DIVIDE}, {"ties": Ties.AWAY}],
        "triton.per_tensor": [{"scale_rule": ScaleRule.RECIPROCAL}, {"granularity": Granularity.TOKEN}],
        "triton.per_token": [{"scale_rule": ScaleRule.RECIPROCAL}, {"payload_rule": PayloadRule.DIVIDE}],
        "triton.per_1x128": [{"maximum": 224.0}, {"ties": Ties.TRUNCATE}],
        "triton.mxfp4": [
            *({"scale_rule": rule} for rule in (ScaleRule.UP, ScaleRule.DOWN, ScaleRule.CEIL)),
            {"ties": Ties.AWAY},
            {"scale_layout": ScaleLayout.ROW_MAJOR},
        ],
        "triton.per_1x32_fp4": [{"ties": Ties.AWAY}, {"scale_layout": ScaleLayout.COLUMN_MAJOR}],
        "triton.per_1x32_fp4_shuffled": [{"scale_layout": ScaleLayout.ROW_MAJOR}],
        "triton.mxfp8": [{"scale_rule": rule} for rule in (ScaleRule.UP, ScaleRule.DOWN, ScaleRule.EVEN)],
    }
    for name, fields in changes.items():
        declared = backend.contract(_problem(name, 128), name)
        assert isinstance(declared, QuantContract)
        codec = declared.codec
        inputs = _telling_rows(codec)
        assert [_quantise(name, rows) for rows in inputs] == [""] * len(inputs)
        for field in fields:
            assert any(_quantise(name, rows, replace(codec, **field)) for rows in inputs), f"{name} {field}"


def _telling_rows(codec: Codec) -> list[torch.Tensor]:
    """Float32 rows of 128: every midpoint of the payload, at scale 41 / 64 and at 1, behind the largest value."""
    values = decode(torch.arange(codec.payload.max_code + 1), codec.payload)
    middles = (values[1:] + values[:-1]) / 2
    row = torch.cat([values[-1:], middles])
    row = row.repeat(128 // len(row) + 1)[None, :128].float()
    row[:, ::32] = codec.maximum
    scaled = [row * _STATIC_SCALE, row, row / codec.maximum * 1.8, row / codec.maximum * 1.75]
    return [*scaled, *_random(8, 8 * 128).reshape(8, 8, 128).unbind()]


def _always(numerics: NormNumerics) -> Callable[[int], NormNumerics]:
    return lambda rows: numerics


def a_wrong_norm_is_noticed(world: World) -> None:
    backend, _ = _opened(1)
    rows, residual = _random(16, 384).to(BF16), _random(16, 384, 1).to(BF16)
    for name, hidden in _runs(Family.NORM, (384,)):
        contract = backend.contract(_problem(name, hidden), name)
        assert isinstance(contract, NormContract)
        numerics = contract.numerics(16)
        other = NormInput.UNROUNDED if numerics.norm_input is NormInput.ROUNDED else NormInput.ROUNDED
        wrong = [replace(numerics, gemma=True)]
        # Without a residual there is nothing to round.
        wrong += [replace(numerics, norm_input=other)] if contract.residual else []
        for changed in wrong:
            mutated = replace(contract, numerics=_always(changed))
            assert _normalise(name, rows, residual, mutated) != "", f"{name} {changed}"


# ------------------------------------------------------------------------- defects known at e4048607: gone is good news
_GONE = "AITER no longer does this: delete the scenario, and tighten the declaration if one was widened for it"


def defect_a_zero_row_is_nan(world: World) -> None:
    # _triton_kernels/quant/quant.py:73-76: scale 0, 0 * (1 / 0); also where 1 / scale overflows, below 2**-128 * 240.
    for name in ("triton.per_token", "triton.per_1x128", "triton.per_tensor"):
        for value in (0.0, 2.0**-121):
            rows = torch.zeros(1, 128, dtype=BF16)
            rows[0, 0] = value
            assert "quantise." in _quantise(name, rows), _GONE


def defect_a_reused_scale_only_grows(world: World) -> None:
    # _triton_kernels/quant/quant.py:51: an atomic maximum into the caller's buffer; the adapter zeroes it.
    library = _opened(1)[1].library
    codes, scales = torch.empty(1, 4, dtype=library.fp8), torch.zeros(1)
    for largest in (8.0, 1.0):
        library.quant.dynamic_per_tensor_quant_fp8_i8(codes, torch.full((1, 4), largest, dtype=BF16), scales)
    limit = torch.finfo(library.fp8).max
    assert scales.item() == torch.tensor(8.0 / limit).item(), _GONE


def defect_strided_rows_write_past_the_codes(world: World) -> None:
    # _triton_kernels/quant/quant.py:67, 85: codes are stored at the stride of the rows.
    library = _opened(1)[1].library
    wide, buffer = torch.ones(2, 8, dtype=BF16), torch.zeros(16, dtype=torch.uint8)
    codes = buffer[:8].view(library.fp8).view(2, 4)
    library.quant.dynamic_per_token_quant_fp8_i8(codes, wide[:, :4], torch.empty(2, 1))
    assert buffer[8:].any(), _GONE


def defect_the_largest_scales_are_off(world: World) -> None:
    # _triton_kernels/quant/quant.py:112-115: from 1.75 * 2**127 on, rounding carries to infinity, clamped to 2**127.
    for name in ("triton.mxfp4", "triton.per_1x32_fp4", "triton.mxfp8"):
        assert _quantise(name, torch.full((1, 32), 1.7421875 * 2.0**127).to(BF16)) == ""
        assert "quantise.scales" in _quantise(name, torch.full((1, 32), 1.75 * 2.0**127).to(BF16)), _GONE


def defect_fnuz_codes_clip(world: World) -> None:
    # _triton_kernels/quant/quant.py:397: the exponent of FN's 448 also for FNUZ, whose largest value is 240.
    if triton_contract.OPERATORS["triton.mxfp8_fnuz"].only == _opened(1)[1].library.arch:
        assert "quantise.scales" in _quantise("triton.mxfp8_fnuz", torch.ones(1, 32).to(BF16)), _GONE


def defect_mxfp4_takes_no_empty_input(world: World) -> None:
    library = _opened(1)[1].library
    try:
        library.quant.dynamic_mxfp4_quant(torch.empty(0, 32, dtype=BF16))
    except ZeroDivisionError:
        return
    raise AssertionError(_GONE)


def defect_mxfp4_drops_an_odd_column(world: World) -> None:
    # ops/triton/quant/quant.py:172 asserts N / 2 even by N // 2, which lets N = 5 pass.
    codes, _ = _opened(1)[1].library.quant.dynamic_mxfp4_quant(torch.ones(1, 5, dtype=BF16))
    assert codes.shape == (1, 2), _GONE
