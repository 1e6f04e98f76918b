"""AITER's double, through the adapters, keeps the declared contracts; doubles with one thing wrong do not.

Scope: judged by the reference's acceptance sets, on two architectures. A pass does not prove that AITER's kernels keep
the contract, nor that the double errs where they do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, cast

import pytest
import torch

from accelerated.aiter_ops import backend
from accelerated.aiter_ops.contract import NORMS, QUANTISERS
from accelerated.contract import Standing
from accelerated.interface import RankContext
from accelerated.operators import Family, NormContract, QuantContract, QuantResult, RowProblem
from accelerated.standin.aiter_ops import device, kernels, mx
from accelerated.standin.aiter_ops.ops import rmsnorm
from reference.codecs import Codec, Granularity, ScaleFormat
from reference.layouts import logical_scales, unpack_e2m1
from reference.quantisation import accepted_scales, accepted_values, undefined, undefined_groups
from reference.rms_norm import expected, quantised_acceptance
from reference.rounding import decode, decode_e8m0

ROWS, EPSILON = 9, 1e-6


def logical(result: QuantResult, codec: Codec, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values ``[rows, columns]`` and scales by index, of the first ``rows`` rows."""
    count = 1 if codec.granularity is Granularity.TENSOR else result.codes.shape[0]
    scales = logical_scales(result.scales, codec.scale_layout, count, codec.groups(columns))
    scales = decode_e8m0(scales) if codec.scale_format is ScaleFormat.E8M0 else scales.double()
    codes = unpack_e2m1(result.codes) if codec.payload.bits == 4 else result.codes
    return decode(codes[:rows], codec.payload), scales[: 1 if count == 1 else rows]


def hard_rows(columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of very different magnitudes: random, largest, subnormal, half zero, midpoints of both payloads."""
    generator = torch.Generator().manual_seed(columns)
    exponents = torch.randint(-8, 8, (ROWS, 1), generator=generator)
    rows = torch.randn(ROWS, columns, generator=generator) * torch.exp2(exponents.float())
    rows[0, 0] = torch.finfo(dtype).max / 2
    rows[1] = torch.finfo(dtype).tiny * torch.linspace(-1, 1, columns)
    rows[2, : columns // 2] = 0
    # 6 and 448 times a power of two are the largest; then every midpoint lies exactly between two codes.
    for row, pattern in (
        (3, [6.0, -0.25, 0.75, 1.25, -1.75, 2.5, 3.5, 5.0]),
        (4, [448.0, 240.0, 17.0, -19.0, 8.5, 9.5, -1.0625, 1.1875]),
    ):
        rows[row] = torch.tensor(pattern).repeat(columns // 8 + 1)[:columns]
    return rows.to(dtype)


def wrong_with_quantised(rows: torch.Tensor, result: QuantResult, codec: Codec, scale: float | None) -> list[str]:
    """What a result breaks of the codec, for the rows that exist."""
    values, scales = logical(result, codec, *rows.shape)
    found = []
    if codec.static:
        scales = torch.full((1, 1), cast("float", scale), dtype=torch.float32).double()
    else:
        allowed = accepted_scales(rows, codec)
        inside = (scales >= allowed.lower) & (scales <= allowed.upper)
        found += ["scale"] * bool((~inside & ~undefined_groups(rows, codec)).any())
    accepted = accepted_values(rows, scales, codec)
    inside = (values >= accepted.lower) & (values <= accepted.upper)
    return found + ["value"] * bool((~inside & ~undefined(rows, codec)).any())


def session(arch: str) -> Any:
    context = RankContext(0, 1, torch.device("cpu"), cast("torch.distributed.ProcessGroup", None), arch)
    return backend.aiter_standin(arch).open(context)


def quantiser_breaks(operator: str, arch: str, columns: int, dtype: str = "bfloat16", real: int = ROWS) -> list[str]:
    """What the double breaks of one quantiser's contract, on all rows and with only ``real`` of them real."""
    problem = RowProblem(Family.QUANTISE, 1, columns, ROWS, dtype)
    stand = backend.aiter_standin(arch).support(problem, operator)
    assert stand.standing is not Standing.REFUSED, stand.reason
    operation, rows = session(arch).build(problem, operator), hard_rows(columns, getattr(torch, dtype))
    declared: QuantContract = operation._contract
    scale = 0.37 if declared.codec.static else None
    options = {} if scale is None else {"scale": torch.tensor([scale])}
    found = wrong_with_quantised(rows, operation.quantise(rows, **options), declared.codec, scale)
    if declared.takes_num_rows:
        count = torch.tensor([real], dtype=torch.int32)
        found += wrong_with_quantised(rows[:real], operation.quantise(rows, num_rows=count), declared.codec, None)
    return found


def norm_breaks(operator: str, arch: str, columns: int, dtype: str = "bfloat16", count: int = ROWS) -> list[str]:
    """What the double breaks of one norm's contract."""
    problem = RowProblem(Family.NORM, 1, columns, count, dtype)
    operation, kind = session(arch).build(problem, operator), getattr(torch, dtype)
    declared: NormContract = operation._contract
    numerics = declared.numerics(count)
    generator = torch.Generator().manual_seed(columns)
    # Larger rows lie beyond any square in float16.
    rows = hard_rows(columns, torch.float16)[:count].to(kind).clamp(-100, 100)
    residual = torch.randn(count, columns, generator=generator).to(kind) if declared.residual else None
    weight = torch.randn(columns, generator=generator).to(kind)
    # In-place operators overwrite both.
    copies = rows.clone(), None if residual is None else residual.clone()
    allowed = expected(rows[None], residual, weight, EPSILON, numerics, kind)
    result = operation.normalise(*copies, weight, EPSILON)
    found = []
    if declared.element_output:
        found += ["output"] * bool((allowed.output.error_over_bound(result.output) > 1).any())
    if allowed.residual is not None:
        found += ["residual"] * bool((allowed.residual.error_over_bound(result.residual) > 1).any())
    if declared.codec is not None:
        values, scales = logical(result.quantised, declared.codec, count, columns)
        quantised = quantised_acceptance(allowed, declared.codec, numerics, scales)
        found += ["scale"] * bool((quantised.scales.error_over_bound(scales) > 1).any())
        found += ["value"] * bool((quantised.values.error_over_bound(values) > 1).any())
    return found


#: gfx942 has no fp4x2; test_aiter_contract.py looks at the refusal.
ON_GFX942 = [name for name in QUANTISERS if not name.startswith("hip.per_1x32_fp4")]


@pytest.mark.parametrize(
    ("operator", "arch"),
    [*((name, "gfx950") for name in QUANTISERS), *((name, "gfx942") for name in ON_GFX942)],
)
def test_quantisers_keep_their_contract(operator: str, arch: str) -> None:
    for columns in (128, 384):
        assert quantiser_breaks(operator, arch, columns, real=4) == [], columns
    assert quantiser_breaks(operator, arch, 256, "float16", real=0) == []


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
@pytest.mark.parametrize("operator", NORMS)
def test_norms_keep_their_contract(operator: str, arch: str) -> None:
    for columns in (128, 640):
        assert norm_breaks(operator, arch, columns) == [], columns
    assert norm_breaks(operator, arch, 256, "float16") == []


@pytest.mark.parametrize("operator", ["rmsnorm", "rmsnorm_add", "rmsnorm_add_gemma", "rmsnorm_add_dynamicquant"])
def test_wide_rows_and_float32_take_the_other_kernel(operator: str) -> None:
    assert norm_breaks(operator, "gfx942", 8320, count=2) == []
    assert norm_breaks(operator, "gfx950", 256, "float32") == []


def test_rows_that_no_vector_divides_are_read_back_rounded_sooner() -> None:
    assert norm_breaks("fused_add_rms_norm_cu", "gfx942", 1100, count=2) == []


@contextmanager
def patched(target: object, name: str, value: object) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, name, value)
        yield


def row_major(scales: Any, stored: Any, group: int, shuffle: bool, *rest: Any) -> None:
    kernels_place(scales, stored, group, False, *rest)


def one_short(count: int, num_rows: Any, factor: int, on: Any) -> torch.Tensor:
    return kernels_written(count, None if num_rows is None else num_rows - 1, factor, on)


def away(value: torch.Tensor, table: Any) -> torch.Tensor:
    middles = torch.tensor([(a + b) / 2 for a, b in pairwise(table)])
    return torch.bucketize(value.abs().contiguous(), middles, right=True).to(torch.uint8)


def high_nibble_first(value: torch.Tensor) -> torch.Tensor:
    packed = device_fp4_bytes(value)
    return packed >> 4 | packed << 4


kernels_place, kernels_written, device_fp4_bytes = kernels.place_scales, kernels._written, device.fp4_bytes
device_store, norm_added = device.store, rmsnorm._added

#: Operator, architecture and columns of a case; what is replaced in the double; what must be found.
FAULTS: list[tuple[str, str, int, object, str, object, str]] = [
    ("hip.per_1x128_transposed", "gfx950", 384, kernels, "place_scales", row_major, "scale"),
    ("hip.per_token", "gfx942", 384, device, "largest", lambda dtype: 448.0, "scale"),
    ("hip.per_1x128", "gfx942", 384, device, "largest", lambda dtype: 448.0, "scale"),
    ("hip.per_token_num_rows", "gfx950", 384, kernels, "_written", one_short, "value"),
    ("hip.per_1x32_fp4", "gfx950", 384, kernels, "_written", one_short, "scale"),
    ("hip.per_1x32_fp4", "gfx950", 384, device, "_nearest", away, "value"),
    ("hip.per_1x32_fp4", "gfx950", 384, device, "fp4_bytes", high_nibble_first, "value"),
    ("hip.per_1x32_fp4_shuffled", "gfx950", 384, kernels, "place_scales", row_major, "scale"),
    ("hip.per_1x32_fp8_e8m0", "gfx942", 384, mx, "FP8", {torch.float8_e4m3fnuz: mx.FP8[torch.float8_e4m3fn]}, "scale"),
    ("torch.per_token", "gfx950", 384, mx, "reciprocal", lambda number, on: torch.tensor(1 / 449), "scale"),
    ("hip.per_1x128", "gfx950", 384, kernels, "FLOOR", 1e-3, "scale"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("operator", "arch", "columns", "target", "name", "value", "what"),
    FAULTS,
    ids=[f"{each[0]}-{each[4]}" for each in FAULTS],
)
def test_a_quantiser_with_one_thing_wrong_is_found(
    operator: str, arch: str, columns: int, target: object, name: str, value: object, what: str
) -> None:
    with patched(target, name, value):
        assert what in quantiser_breaks(operator, arch, columns, real=4)


def test_what_undefined_rows_hold_is_nobodys_business() -> None:
    def zeros(shape: Any, dtype: torch.dtype, on: torch.device) -> torch.Tensor:
        return torch.zeros(*shape, device=on).to(dtype) if dtype != torch.float4_e2m1fn_x2 else empty(shape, dtype, on)

    empty = device.empty
    with patched(device, "empty", zeros):
        assert quantiser_breaks("hip.per_token_num_rows", "gfx942", 384, real=4) == []


def even_store(value: torch.Tensor, dtype: torch.dtype, arch: str) -> torch.Tensor:
    return device_store(value, dtype, "gfx950")


def truncating_store(value: torch.Tensor, dtype: torch.dtype, arch: str) -> torch.Tensor:
    return device_store(value, dtype, "gfx942")


def rounded_sum(*tensors: Any) -> tuple[torch.Tensor, torch.Tensor]:
    _, rounded = norm_added(*tensors)
    return rounded, rounded


def unrounded_sum(*tensors: Any) -> tuple[torch.Tensor, torch.Tensor]:
    total, _ = norm_added(*tensors)
    return total, total


def one_fewer(value: torch.Tensor) -> torch.Tensor:
    return (value * value).sum(-1, keepdim=True) / (value.shape[-1] - 1)


NORM_FAULTS: list[tuple[str, str, int, object, str, object, str]] = [
    ("rmsnorm_add", "gfx942", 128, device, "store", even_store, "residual"),
    ("rmsnorm_add", "gfx950", 128, device, "store", truncating_store, "output"),
    ("fused_add_rms_norm_cu", "gfx942", 128, device, "store", even_store, "residual"),
    ("rmsnorm_t5", "gfx942", 128, device, "store", even_store, "output"),
    ("rmsnorm_add", "gfx950", 640, rmsnorm, "_added", rounded_sum, "output"),
    ("rmsnorm_add_t5", "gfx950", 640, rmsnorm, "_added", unrounded_sum, "output"),
    ("rmsnorm", "gfx950", 640, device, "mean_square", one_fewer, "output"),
    ("rmsnorm_dynamicquant", "gfx950", 640, device, "mean_square", one_fewer, "scale"),
    ("rmsnorm_dynamicquant", "gfx942", 128, device, "largest", lambda dtype: 448.0, "scale"),
    ("rmsnorm_add_dynamicquant_1x128_transposed", "gfx950", 640, kernels, "place_scales", row_major, "scale"),
]


@pytest.mark.parametrize(
    ("operator", "arch", "columns", "target", "name", "value", "what"),
    NORM_FAULTS,
    ids=[f"{each[0]}-{each[4]}" for each in NORM_FAULTS],
)
def test_a_norm_with_one_thing_wrong_is_found(
    operator: str, arch: str, columns: int, target: object, name: str, value: object, what: str
) -> None:
    with patched(target, name, value):
        assert what in norm_breaks(operator, arch, columns)


def test_gemma_and_plain_weights_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    norm: Any = rmsnorm._hip_norm
    monkeypatch.setattr(rmsnorm, "_hip_norm", lambda *tensors: norm(*tensors[:-1], False))
    assert norm_breaks("rmsnorm_add_gemma", "gfx950", 128) == ["output"]
    assert norm_breaks("rmsnorm_add", "gfx950", 128) == []


@pytest.mark.parametrize("operator", NORMS)
def test_the_contract_knows_which_kernel_takes_the_call(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rmsnorm, "_hip_norm", None)
    declared = backend.aiter_standin("gfx950").contract(RowProblem(Family.NORM, 1, 256, ROWS), operator)
    assert isinstance(declared, NormContract)
    if declared.takes_empty:  # the opus kernels alone take no rows
        assert norm_breaks(operator, "gfx950", 256) == []
    else:
        with pytest.raises(TypeError):
            norm_breaks(operator, "gfx950", 256)
