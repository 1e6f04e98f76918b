"""What the ``aiter-triton`` adapter passes to AITER and hands back, against functions that only record.

Scope: argument order, buffers, layouts and refusals. A pass proves nothing about AITER's arithmetic.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from accelerated.aiter_ops import triton_contract
from accelerated.aiter_ops.triton_library import TritonLibrary
from accelerated.aiter_ops.triton_operations import PAD_TO, TritonNorm, TritonQuantiser, TritonSession
from accelerated.contract import ContractError
from accelerated.operators import Family, QuantResult, RowProblem

FP8, M, N = torch.float8_e4m3fnuz, 3, 128
WEIGHT = torch.arange(N, dtype=torch.bfloat16)


class Recorder:
    """Stands where a module of AITER stands: every attribute is a function that notes its call and answers."""

    def __init__(self, calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]], answer: Any = None) -> None:
        self._calls, self._answer = calls, answer

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **keywords: Any) -> Any:
            self._calls.append((name, args, keywords))
            return self._answer

        return call


def library(calls: list[Any], answer: Any = None) -> TritonLibrary:
    """A library whose functions all give ``answer``."""
    recorder = Recorder(calls, answer)
    return TritonLibrary(
        quant=recorder,
        hip_free_quant=SimpleNamespace(get_triton_quant=lambda kind: getattr(recorder, f"triton_quant_{kind}")),
        fp4=recorder,
        rmsnorm=recorder,
        add_pad=recorder.fused_add_rmsnorm_pad,
        fused_add=recorder.fused_rmsnorm_add,
        quant_type=SimpleNamespace(per_1x128="per_1x128"),
        fp8=FP8,
        arch="gfx942",
        interpreted=True,
        origin="",
    )


def quantiser(name: str, answer: Any = None) -> tuple[TritonQuantiser, list[Any]]:
    calls: list[Any] = []
    made = TritonSession(library(calls, answer)).build(RowProblem(Family.QUANTISE, 1, N, 8), name)
    assert isinstance(made, TritonQuantiser)
    return made, calls


def norm(name: str, answer: Any = None) -> tuple[TritonNorm, list[Any]]:
    calls: list[Any] = []
    made = TritonSession(library(calls, answer)).build(RowProblem(Family.NORM, 1, N, 8), name)
    assert isinstance(made, TritonNorm)
    return made, calls


def rows(count: int = M) -> torch.Tensor:
    return torch.zeros(count, N, dtype=torch.bfloat16)


@pytest.mark.parametrize("given", [False, True])
def test_the_scale_of_per_tensor_starts_at_zero(given: bool) -> None:
    operation, calls = quantiser("triton.per_tensor")
    out = QuantResult(torch.empty(M, N, dtype=torch.uint8), torch.full((1,), 99.0)) if given else None
    x = rows()
    result = operation.quantise(x, out=out)
    ((name, (codes, seen, scales), _),) = calls
    assert name == "dynamic_per_tensor_quant_fp8_i8"
    assert seen is x
    assert scales.tolist() == [0.0]
    assert codes.dtype is FP8
    assert result.codes.data_ptr() == codes.data_ptr()
    if out is not None:
        assert codes.data_ptr() == out.codes.data_ptr()
        assert scales is out.scales is result.scales


def test_per_token_and_static() -> None:
    operation, calls = quantiser("triton.per_token")
    result = operation.quantise(rows())
    assert (result.codes.dtype, result.codes.shape, result.scales.shape) == (torch.uint8, (M, N), (M, 1))
    operation, calls = quantiser("triton.per_tensor_static")
    scale = torch.ones(1)
    result = operation.quantise(rows(), scale=scale)
    assert calls[0][0] == "static_per_tensor_quant_fp8_i8"
    assert calls[0][1][2] is scale is result.scales


@pytest.mark.parametrize(
    ("name", "called", "keywords"),
    [
        ("triton.per_1x128", "triton_quant_per_1x128", {"quant_dtype": FP8}),
        ("triton.mxfp4", "dynamic_mxfp4_quant", {}),
        ("triton.per_1x32_fp4", "dynamic_mxfp4_quant", {"shuffle": False}),
        ("triton.per_1x32_fp4_shuffled", "dynamic_mxfp4_quant", {"shuffle": True}),
        ("triton.mxfp8", "dynamic_mxfp8_quant", {"quant_dtype": torch.float8_e4m3fn}),
        ("triton.mxfp8_fnuz", "dynamic_mxfp8_quant", {"quant_dtype": torch.float8_e4m3fnuz}),
    ],
)
def test_quantisers_that_return_a_pair(name: str, called: str, keywords: dict[str, Any]) -> None:
    # A layout is the library's: strides survive, element types become bytes.
    scales = torch.empty(4, M).T if name == "triton.per_1x128" else torch.empty(4, M, dtype=torch.uint8).T
    operation, calls = quantiser(name, (torch.empty(M, N, dtype=FP8), scales))
    result = operation.quantise(rows())
    assert (calls[0][0], calls[0][2]) == (called, keywords)
    assert (result.codes.dtype, result.scales.dtype, result.scales.stride()) == (torch.uint8, scales.dtype, (1, M))


@pytest.mark.parametrize(
    ("name", "keywords", "message"),
    [
        ("triton.per_token", {"scale": torch.ones(1)}, "takes no scale"),
        ("triton.per_tensor_static", {}, "needs scale"),
        ("triton.per_token", {"num_rows": torch.ones(1, dtype=torch.int32)}, "takes no num_rows"),
        ("triton.mxfp4", {"out": QuantResult(torch.empty(0), torch.empty(0))}, "takes no out"),
    ],
)
def test_arguments_are_never_dropped(name: str, keywords: dict[str, Any], message: str) -> None:
    operation, calls = quantiser(name)
    with pytest.raises(ValueError, match=message):
        operation.quantise(rows(), **keywords)
    assert calls == []


@pytest.mark.parametrize("wrong", [rows(9), rows()[:, :64], torch.zeros(M, 2 * N, dtype=torch.bfloat16)[:, ::2]])
def test_rows_that_do_not_fit(wrong: torch.Tensor) -> None:
    for operation in (
        quantiser("triton.per_token")[0].quantise,
        lambda x: norm("triton.rms_norm")[0].normalise(x, None, WEIGHT, 1e-6),
    ):
        with pytest.raises(ValueError, match="give at most 8 contiguous rows of 128"):
            operation(wrong)


@pytest.mark.parametrize("name", triton_contract.names(Family.NORM))
def test_every_norm_sees_its_arguments(name: str) -> None:
    residual = rows() + 1 if triton_contract.OPERATORS[name].residual else None
    pair = torch.empty(M, N, dtype=FP8), torch.empty(M, 1)
    fused = "fp8_group" in name or "rms_mxfp4" in name
    single = torch.empty(M, PAD_TO, dtype=torch.bfloat16)
    answer: Any = (pair, single, None, residual) if fused else pair if name == "triton.rms_mxfp8" else single
    if not fused and residual is not None and name in ("triton.fused_rmsnorm_add", "triton.add_rmsnorm_pad"):
        answer = single, residual
    operation, calls = norm(name, answer)
    result = operation.normalise(rows(), residual, WEIGHT, 0.25)
    ((_, args, keywords),) = calls
    seen = [*args, *keywords.values()]
    assert any(value is WEIGHT for value in seen)
    assert 0.25 in [value for value in seen if isinstance(value, float)]
    assert residual is None or any(value is residual for value in seen)
    assert (result.residual is not None) == (residual is not None)
    assert (result.quantised is not None) == (triton_contract.OPERATORS[name].codec is not None)
    assert (result.output is not None) == triton_contract.OPERATORS[name].element_output
    if "pad" in name:
        assert args[4] == PAD_TO
        assert result.output is not None
        assert result.output.shape == (M, N)
    if "strided" in name or "transposed" in name:
        assert keywords["transpose_scale"] is True
        assert keywords.get("is_x_scale_strided", False) is ("strided" in name)


def test_residuals_are_never_dropped_nor_made_up() -> None:
    with pytest.raises(ValueError, match="takes no residual"):
        norm("triton.rms_norm")[0].normalise(rows(), rows(), WEIGHT, 1e-6)
    with pytest.raises(ValueError, match="needs residual"):
        norm("triton.rmsnorm_add")[0].normalise(rows(), None, WEIGHT, 1e-6)


def test_what_is_refused_is_not_built() -> None:
    session = TritonSession(library([]))
    with pytest.raises(ContractError, match="multiples of 128"):
        session.build(RowProblem(Family.QUANTISE, 1, 64, 8), "triton.per_1x128")
