"""Signatures of the MoRI double, and of the genuine library where it is installed, against the recorded manifest.

Scope: names, parameters, defaults and enumeration members. Equal signatures prove nothing about behaviour.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from types import ModuleType

import pytest
import torch

from accelerated.standin import manifest
from accelerated.standin.mori_ep import jit_config, ops, shmem

DOUBLES: dict[str, ModuleType] = {
    "mori.ops": ops,
    "mori.ops.dispatch_combine": ops,
    "mori.shmem": shmem,
    "mori.jit.config": jit_config,
}


def test_double_has_the_recorded_signatures() -> None:
    assert manifest.differences(DOUBLES) == []


@pytest.mark.skipif(importlib.util.find_spec("mori") is None, reason="mori is not installed")
def test_installed_library_has_the_recorded_signatures() -> None:
    assert manifest.differences({name: importlib.import_module(name) for name in DOUBLES}) == []


def test_manifest_names_its_source() -> None:
    recorded = manifest.load_manifest()
    assert recorded["commit"].startswith("624002c8")
    assert all(entry["source"].startswith(("python/", "src/")) for entry in recorded["functions"].values())


def test_a_changed_default_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def reset(self: object, now: bool = True) -> None: ...

    monkeypatch.setattr(ops.EpDispatchCombineOp, "reset", reset)
    monkeypatch.delattr(shmem, "shmem_npes")
    found = manifest.differences(DOUBLES)
    assert [line.split(": ")[0] for line in found] == ["mori.ops:EpDispatchCombineOp.reset", "mori.shmem:shmem_npes"]


def test_enumeration_members_behave_like_pybind_members() -> None:
    kinds = ops.EpDispatchCombineKernelType
    assert kinds.AsyncLL == kinds.AsyncLL
    assert kinds.AsyncLL != kinds.IntraNode
    assert kinds.AsyncLL != kinds.AsyncLL.value
    assert {kinds.IntraNode: "a"}[kinds.IntraNode] == "a"
    assert str(kinds.IntraNodeLL) == "EpDispatchCombineKernelType.IntraNodeLL"
    assert not isinstance(ops.EpDispatchCombineQuantType.None_, ops.EpDispatchCombineQuantType)


def test_config_is_a_mutable_dataclass() -> None:
    config = ops.EpDispatchCombineConfig(torch.bfloat16, 0, 1, 8, 0, 0, 2, 4, 2, 1)
    config.block_num = 3
    assert dataclasses.asdict(config)["block_num"] == 3


def test_architecture_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MORI_GPU_ARCHS", raising=False)
    assert jit_config.detect_gpu_arch() == "gfx942"
    monkeypatch.setenv("MORI_GPU_ARCHS", "gfx950;gfx1250")
    assert jit_config.detect_gpu_arch() == "gfx950"
