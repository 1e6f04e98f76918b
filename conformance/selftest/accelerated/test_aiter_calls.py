"""What the adapters call, with which arguments: every call is bound to the recorded signature of the real function.

Scope: the entry the adapter reaches first, on the double. A pass does not prove that AITER computes anything with it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch

from accelerated.aiter_ops import backend
from accelerated.aiter_ops.contract import NORMS, QUANTISERS
from accelerated.aiter_ops.norms import AiterNorm
from accelerated.aiter_ops.quantisers import AiterQuantiser
from accelerated.interface import RankContext
from accelerated.operators import Family, NormContract, QuantContract, QuantResult, RowProblem
from accelerated.standin import manifest
from accelerated.standin.aiter_ops.ops import quant, rmsnorm

Calls = list[tuple[str, dict[str, Any]]]
HIDDEN, ROWS = 256, 5
FP8, FP4, E8M0 = torch.float8_e4m3fn, torch.float4_e2m1fn_x2, torch.float8_e8m0fnu


def recorded(entry: dict[str, Any]) -> inspect.Signature:
    """A signature from the manifest; defaults that are element types stay as they are written there."""
    return inspect.Signature(
        [
            inspect.Parameter(
                each["name"], getattr(inspect.Parameter, each["kind"]), default=each.get("default", inspect._empty)
            )
            for each in entry["parameters"]
        ]
    )


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Every function of the manifest binds its arguments, writes them down, and runs."""
    made: Calls = []

    def recording(name: str, signature: inspect.Signature, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            made.append((name, dict(signature.bind(*args, **kwargs).arguments)))
            return run(*args, **kwargs)

        return call

    monkeypatch.setenv(backend.STANDIN_ARCH_VARIABLE, "gfx950")
    modules = {"aiter.ops.quant": quant, "aiter.ops.rmsnorm": rmsnorm}
    for path, entry in manifest.load_manifest("aiter")["functions"].items():
        module, _, name = path.partition(":")
        if module in modules:
            wrapped = recording(name, recorded(entry), getattr(modules[module], name))
            monkeypatch.setattr(modules[module], name, wrapped)
    return made


def built(family: Family, operator: str, dtype: str = "bfloat16") -> Any:
    arch = "gfx950"
    context = RankContext(0, 1, torch.device("cpu"), cast("torch.distributed.ProcessGroup", None), arch)
    return backend.aiter_standin(arch).open(context).build(RowProblem(family, 1, HIDDEN, 8, dtype), operator)


def rows(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.linspace(-3, 3, ROWS * HIDDEN).view(ROWS, HIDDEN).to(dtype)


#: Entry reached first behind get_hip_quant or get_torch_quant, the options that matter, shapes of codes and scales.
QUANTISER_CALLS: dict[str, tuple[str, dict[str, Any], tuple[int, ...], tuple[int, ...]]] = {
    "hip.per_tensor": ("per_tensor_quant_hip", {"quant_dtype": FP8}, (5, 256), (1,)),
    "hip.per_tensor_static": ("per_tensor_quant_hip", {"quant_dtype": FP8}, (5, 256), (1,)),
    "hip.per_token": ("per_token_quant_hip", {"quant_dtype": FP8}, (5, 256), (5, 1)),
    "hip.per_token_num_rows": ("per_token_quant_hip", {"quant_dtype": FP8}, (5, 256), (5, 1)),
    "hip.per_1x128": ("per_group_quant_hip", {"group_size": 128, "transpose_scale": False}, (5, 256), (5, 2)),
    "hip.per_1x128_transposed": ("per_group_quant_hip", {"transpose_scale": True}, (5, 256), (5, 2)),
    "hip.per_1x128_e8m0": ("per_group_quant_hip", {"scale_type": E8M0}, (5, 256), (5, 2)),
    "hip.per_1x32_fp4": ("per_1x32_mx_quant_hip", {"quant_dtype": FP4, "shuffle": False}, (5, 128), (5, 8)),
    "hip.per_1x32_fp4_shuffled": ("per_1x32_mx_quant_hip", {"quant_dtype": FP4, "shuffle": True}, (5, 128), (256, 8)),
    "hip.per_1x32_fp8": ("per_1x32_mx_quant_hip", {"quant_dtype": FP8, "scale_type": torch.float32}, (5, 256), (5, 8)),
    "hip.per_1x32_fp8_e8m0": ("per_1x32_mx_quant_hip", {"quant_dtype": FP8, "scale_type": E8M0}, (5, 256), (5, 8)),
    "torch.per_tensor": ("per_tensor_quant", {"quant_dtype": FP8}, (5, 256), (1,)),
    "torch.per_token": ("pertoken_quant", {"quant_dtype": FP8}, (5, 256), (5, 1)),
    "torch.per_1x128": ("pertoken_quant", {"quant_dtype": FP8}, (5, 256), (5, 2)),
    "torch.per_1x32_fp4": ("per_1x32_f4_quant", {"quant_dtype": FP4}, (5, 128), (5, 8)),
}


@pytest.mark.parametrize("operator", QUANTISERS)
def test_quantiser_calls(calls: Calls, operator: str) -> None:
    entry, options, codes, scales = QUANTISER_CALLS[operator]
    operation: AiterQuantiser = built(Family.QUANTISE, operator)
    static = operator.endswith("_static")
    result = operation.quantise(rows(), scale=torch.tensor([0.02]) if static else None)
    assert calls[1][0] == entry
    assert options.items() <= calls[1][1].items()
    assert (result.codes.dtype, tuple(result.codes.shape)) == (torch.uint8, codes)
    assert tuple(result.scales.shape) == scales
    e8m0 = "e8m0" in operator or "fp4" in operator
    assert result.scales.dtype == (torch.uint8 if e8m0 else torch.float32)


@pytest.mark.parametrize("operator", [name for name in QUANTISERS if name.startswith("hip.")])
def test_results_go_where_the_caller_says(calls: Calls, operator: str) -> None:
    operation: AiterQuantiser = built(Family.QUANTISE, operator)
    options: dict[str, Any] = {"scale": torch.tensor([0.02])} if operator.endswith("_static") else {}
    first = operation.quantise(rows(), **options)
    out = QuantResult(torch.full_like(first.codes, 9), torch.full_like(first.scales, 9))
    del calls[:]
    second = operation.quantise(rows(), out=out, **options)
    assert calls[0][0].endswith("_quant"), "the raw entry, which takes buffers"
    assert len(calls) == 1
    assert second.codes.data_ptr() == out.codes.data_ptr()
    assert torch.equal(second.codes, first.codes)
    written = first.scales != 0xFF if operator.endswith("shuffled") else slice(None)
    assert torch.equal(second.scales[written], first.scales[written])


@pytest.mark.parametrize(
    "operator", [name for name in QUANTISERS if name not in ("hip.per_tensor", "torch.per_tensor")]
)
def test_only_what_the_contract_offers_is_taken(calls: Calls, operator: str) -> None:
    operation: AiterQuantiser = built(Family.QUANTISE, operator)
    declared: QuantContract = operation._contract
    count = torch.tensor([3], dtype=torch.int32)
    options: dict[str, Any] = {"scale": torch.tensor([0.02])} if declared.codec.static else {}
    if declared.takes_num_rows:
        operation.quantise(rows(), num_rows=count, **options)
        assert calls[1][1]["num_rows"] is count, "the device's own tensor, no copy to the host"
    else:
        with pytest.raises(ValueError, match="takes no num_rows"):
            operation.quantise(rows(), num_rows=count, **options)
    with pytest.raises(ValueError, match="give it to a static quantiser, and only there"):
        operation.quantise(rows(), scale=None if declared.codec.static else torch.tensor([1.0]))


def test_errors_of_the_library_come_through(calls: Calls) -> None:
    operation: AiterQuantiser = built(Family.QUANTISE, "hip.per_token")
    with pytest.raises(RuntimeError, match=r"^quant_kernel has no rows of torch\.float32$"):
        operation.quantise(rows(torch.float32))
    with pytest.raises(RuntimeError, match=r"is_contiguous\(\)"):
        operation.quantise(rows().T.contiguous().T)
    operation.close()
    with pytest.raises(RuntimeError, match="after close"):
        operation.quantise(rows())


#: Entry behind the adapter and the options that matter.
NORM_CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "rmsnorm": ("rms_norm", {"use_model_sensitive_rmsnorm": 0}),
    "rmsnorm_t5": ("rms_norm", {"use_model_sensitive_rmsnorm": 1}),
    "rmsnorm_add": ("rmsnorm2d_fwd_with_add", {"gemma_norm": False, "use_model_sensitive_rmsnorm": 0}),
    "rmsnorm_add_gemma": ("rmsnorm2d_fwd_with_add", {"gemma_norm": True, "use_model_sensitive_rmsnorm": 0}),
    "rmsnorm_add_t5": ("rmsnorm2d_fwd_with_add", {"gemma_norm": False, "use_model_sensitive_rmsnorm": 1}),
    "rmsnorm_dynamicquant": ("rmsnorm2d_fwd_with_dynamicquant", {"group_size": 0}),
    "rmsnorm_add_dynamicquant": ("rmsnorm2d_fwd_with_add_dynamicquant", {"group_size": 0}),
    "rmsnorm_add_dynamicquant_t5": ("rmsnorm2d_fwd_with_add_dynamicquant", {"use_model_sensitive_rmsnorm": 1}),
    "rmsnorm_dynamicquant_1x128": ("rmsnorm2d_fwd_with_dynamicquant", {"group_size": 128, "shuffle_scale": False}),
    "rmsnorm_add_dynamicquant_1x128": ("rmsnorm2d_fwd_with_add_dynamicquant", {"group_size": 128}),
    "rmsnorm_add_dynamicquant_1x128_transposed": ("rmsnorm2d_fwd_with_add_dynamicquant", {"shuffle_scale": True}),
    "rmsnorm_3d": ("rms_norm", {"use_model_sensitive_rmsnorm": 0}),
    "rmsnorm_add_3d": ("rmsnorm2d_fwd_with_add", {"use_model_sensitive_rmsnorm": 0}),
    "rms_norm_cu": ("rms_norm_cu", {}),
    "fused_add_rms_norm_cu": ("fused_add_rms_norm_cu", {}),
}


@pytest.mark.parametrize("operator", NORMS)
def test_norm_calls(calls: Calls, operator: str) -> None:
    entry, options = NORM_CALLS[operator]
    operation: AiterNorm = built(Family.NORM, operator)
    declared: NormContract = operation._contract
    x, weight = rows(), torch.linspace(0.5, 2, HIDDEN).bfloat16()
    residual = rows().flip(0).contiguous() if declared.residual else None
    result = operation.normalise(x, residual, weight, 1e-6)
    name, given = calls[0]
    assert name == entry
    assert options.items() <= given.items()
    assert given["input"].shape == ((1, ROWS, HIDDEN) if operator.endswith("_3d") else (ROWS, HIDDEN))
    assert (given["input"].data_ptr(), given["epsilon"]) == (x.data_ptr(), 1e-6)
    assert given["weight"] is weight
    assert (result.output is not None) == declared.element_output
    assert (result.residual is not None) == declared.residual
    assert (result.quantised is not None) == (declared.codec is not None)
    for found in (result.output, result.residual):
        assert found is None or found.shape == x.shape
    if declared.in_place:
        assert result.output is x
        assert result.residual is residual
    if result.quantised is not None:
        assert result.quantised.codes.dtype == torch.uint8
        assert result.quantised.scales.shape == (ROWS, 2 if "1x128" in operator else 1)
    with pytest.raises(ValueError, match="give a residual"):
        operation.normalise(x, None if declared.residual else x, weight, 1e-6)
    operation.close()
    with pytest.raises(RuntimeError, match="after close"):
        operation.normalise(x, residual, weight, 1e-6)
