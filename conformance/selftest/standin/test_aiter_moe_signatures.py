"""Signatures of AITER's MoE entries in the double, and in a genuine library where one is installed.

Scope: names, order, defaults and enumeration members against the recorded manifest; the installed library is read, not
imported. Equal signatures prove nothing about behaviour.
"""

from __future__ import annotations

import ast
from types import ModuleType
from typing import Any

import pytest

from accelerated.aiter_ops import library
from accelerated.standin import manifest
from accelerated.standin.aiter_ops import fused_moe
from accelerated.standin.aiter_ops.ops import enum, shuffle
from accelerated.standin.aiter_ops.ops.flydsl import moe_common
from accelerated.standin.aiter_ops.utility import fp4_utils
from conformance.selftest.standin.test_aiter_signatures import parameters

DOUBLES: dict[str, ModuleType] = {
    "aiter.fused_moe": fused_moe,
    "aiter.ops.shuffle": shuffle,
    "aiter.ops.enum": enum,
    "aiter.ops.flydsl.moe_common": moe_common,
    "aiter.utility.fp4_utils": fp4_utils,
}
#: Defaults that AITER's source writes with a name, by parameter.
NAMED = {
    "activation": "ActivationType.Silu",
    "quant_type": "QuantType.No",
    "block_size": "BLOCK_SIZE_M",
    "gate_mode": "GateMode.SEPARATED.value",
}


def test_double_has_the_recorded_signatures() -> None:
    assert manifest.differences(DOUBLES, "aiter_moe") == []


def test_manifest_names_its_source() -> None:
    recorded = manifest.load_manifest("aiter_moe")
    assert recorded["commit"] == "e4048607a535ace3a2b51ded31b1c8c2d45c0879"
    for name, entry in recorded["functions"].items():
        assert entry["source"] == name.partition(":")[0].replace(".", "/") + ".py"
    assert recorded["enums"]["aiter.ops.enum:ActivationType"]["source"] == "csrc/include/aiter_enum.h"


def test_what_differs_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = list(fused_moe.fused_moe.__defaults__ or ())
    assert defaults[1:3] == [enum.ActivationType.Silu, enum.QuantType.No]
    defaults[1] = enum.ActivationType.Gelu
    monkeypatch.setattr(fused_moe.fused_moe, "__defaults__", tuple(defaults))
    monkeypatch.setattr(shuffle.shuffle_weight, "__defaults__", ((32, 16), False, False, False, 0))
    monkeypatch.setattr(moe_common.GateMode.INTERLEAVE, "_value_", "interleaved")
    monkeypatch.setattr(enum.ActivationType.Gelu, "value", 2)
    assert manifest.differences(DOUBLES, "aiter_moe") == [
        "aiter.fused_moe:fused_moe: default of activation is 'Gelu', recorded 'Silu'",
        "aiter.ops.shuffle:shuffle_weight: default of layout is (32, 16), recorded (16, 16)",
        "aiter.ops.enum:ActivationType: member Gelu is Gelu = 2, recorded 1",
        "aiter.ops.flydsl.moe_common:GateMode: member INTERLEAVE is INTERLEAVE = interleaved, recorded interleave",
    ]


def test_types_of_two_enumerations_are_never_equal() -> None:
    assert enum.ActivationType.Gelu != enum.QuantType.per_Tensor
    assert repr(enum.ActivationType.Gelu) == "<ActivationType.Gelu: 1>"
    assert moe_common.GateMode("separated") == "separated"


def written(entry: dict[str, Any]) -> str | None:
    """A recorded default as AITER's source has it."""
    if "default" not in entry:
        return None
    if entry["name"] in NAMED:
        return NAMED[entry["name"]]
    value = entry["default"]
    return repr(tuple(value) if isinstance(value, list) else value)


@pytest.mark.skipif(library._locate()[0] is None, reason="no AITER is installed or on sys.path")
def test_installed_library_has_the_recorded_signatures() -> None:
    root = library._locate()[0]
    assert root is not None
    for name, entry in manifest.load_manifest("aiter_moe")["functions"].items():
        tree = ast.parse((root.parent / entry["source"]).read_text(encoding="utf-8"))
        functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        recorded = [(each["name"], written(each)) for each in entry["parameters"]]
        assert parameters(functions[name.partition(":")[2]]) == recorded, name
