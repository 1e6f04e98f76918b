"""Signatures of AITER's double, and of a genuine library where one is installed, against the recorded manifest.

Scope: names, parameters, defaults and enumeration members; the installed library is read, not imported, for its import
needs ROCm. Equal signatures prove nothing about behaviour.
"""

from __future__ import annotations

import ast
from types import ModuleType
from typing import Any

import pytest
import torch

from accelerated.aiter_ops import library
from accelerated.standin import manifest
from accelerated.standin.aiter_ops.jit.utils import chip_info
from accelerated.standin.aiter_ops.ops import enum, quant, rmsnorm
from accelerated.standin.aiter_ops.utility import dtypes

DOUBLES: dict[str, ModuleType] = {
    "aiter.ops.quant": quant,
    "aiter.ops.rmsnorm": rmsnorm,
    "aiter.ops.enum": enum,
    "aiter.jit.utils.chip_info": chip_info,
    "aiter.utility.dtypes": dtypes,
}


def test_double_has_the_recorded_signatures() -> None:
    assert manifest.differences(DOUBLES, "aiter") == []


def test_manifest_names_its_source() -> None:
    recorded = manifest.load_manifest("aiter")
    assert recorded["commit"] == "e4048607a535ace3a2b51ded31b1c8c2d45c0879"
    for name, entry in recorded["functions"].items():
        assert entry["source"] == name.partition(":")[0].replace(".", "/") + ".py"
    assert recorded["enums"]["aiter.ops.enum:QuantType"]["source"] == "csrc/include/aiter_enum.h"


def parameters(function: ast.FunctionDef) -> list[tuple[str, str | None]]:
    """Names and the source of defaults, as they are written."""
    names = [argument.arg for argument in function.args.args]
    defaults: list[str | None] = [None] * (len(names) - len(function.args.defaults))
    defaults += [ast.unparse(default) for default in function.args.defaults]
    return list(zip(names, defaults, strict=True))


def written(entry: dict[str, Any]) -> str | None:
    """A recorded default as AITER's source has it."""
    if "default" not in entry:
        return None
    if isinstance(entry["default"], dict):
        kind = entry["default"]["dtype"].removeprefix("torch.")
        return {"float32": "dtypes.fp32", "int8": "dtypes.i8", "float4_e2m1fn_x2": "dtypes.fp4x2"}[kind]
    return "MX_DEFAULT_ROUND_MODE" if entry["name"] == "round_mode" else repr(entry["default"])


@pytest.mark.skipif(library._locate()[0] is None, reason="no AITER is installed or on sys.path")
def test_installed_library_has_the_recorded_signatures() -> None:
    root = library._locate()[0]
    assert root is not None
    for name, entry in manifest.load_manifest("aiter")["functions"].items():
        tree = ast.parse((root.parent / entry["source"]).read_text(encoding="utf-8"))
        functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        recorded = [(each["name"], written(each)) for each in entry["parameters"]]
        assert parameters(functions[name.partition(":")[2]]) == recorded, name


def test_a_changed_default_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(out: object, input: object, scale: object = None) -> None: ...

    monkeypatch.setattr(quant, "static_per_tensor_quant", changed)
    monkeypatch.delattr(rmsnorm, "rms_norm_cu")
    defaults = list(quant.pertoken_quant.__defaults__ or ())
    defaults[2] = torch.bfloat16
    monkeypatch.setattr(quant.pertoken_quant, "__defaults__", tuple(defaults))
    found = manifest.differences(DOUBLES, "aiter")
    assert found == [
        "aiter.ops.quant:pertoken_quant: default of scale_dtype is 'torch.bfloat16', recorded 'torch.float32'",
        "aiter.ops.quant:static_per_tensor_quant: default of scale is None, recorded none",
        "aiter.ops.rmsnorm:rms_norm_cu: missing",
    ]


def test_types_behave_like_pybind_members() -> None:
    kind = enum.QuantType.per_Token
    assert kind == enum.QuantType.per_Token
    assert kind != kind.value
    assert {kind: "a"}[enum.QuantType.per_Token] == "a"


def test_the_fp8_type_is_that_of_the_live_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(chip_info.ARCH_VARIABLE, "gfx942:sramecc+")
    monkeypatch.setenv("GPU_ARCHS", "gfx942;gfx950")
    assert chip_info.get_gfx() == "gfx950"
    assert dtypes.fp8 == torch.float8_e4m3fnuz, "GPU_ARCHS says what to build for, not what is there"
    monkeypatch.setenv(chip_info.ARCH_VARIABLE, "gfx950")
    assert dtypes.fp8 == torch.float8_e4m3fn
    monkeypatch.setenv(chip_info.ARCH_VARIABLE, "gfx90a")
    assert dtypes.fp8 == torch.uint8, "as upstream: a device that it does not know"
    with pytest.raises(AttributeError, match="has no attribute 'fp16x2'"):
        _ = dtypes.fp16x2
