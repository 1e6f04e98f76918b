"""Telling the genuine AITER from a missing, broken or unrelated one, and a device from another.

A pass does not prove that a library works.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from accelerated.aiter_ops import backend, library
from accelerated.aiter_ops.library import LibraryError, load_aiter, load_standin, probe_aiter
from accelerated.aiter_ops.session import AiterSession
from accelerated.contract import ContractError
from accelerated.interface import RankContext
from accelerated.operators import Family, RowProblem

GENUINE = {
    "__init__.py": "__version__ = '0.1.9'\n",
    "ops/__init__.py": "",
    "ops/quant.py": "def get_hip_quant(kind): ...\n",
    "ops/rmsnorm.py": "def rmsnorm2d_fwd_with_add(): ...\n",
    "ops/enum.py": "class QuantType: ...\n",
    "jit/__init__.py": "",
    "jit/core.py": "",
    "jit/utils/chip_info.py": "def get_gfx_runtime(): return 'gfx942'\n",
    "utility/dtypes.py": "fp8 = 'fp8'\n",
}
PROBLEM = RowProblem(Family.QUANTISE, 1, 256, 4)


def forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "aiter"]:
        del sys.modules[name]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory that comes first on sys.path, with no aiter imported."""
    forget()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(library, "_version", lambda: None)
    for name in library.PARTIAL_IMPORTS:
        monkeypatch.delenv(name, raising=False)
    yield tmp_path
    forget()


def package(place: Path, changes: dict[str, str | None] | None = None) -> Path:
    """Write the genuine layout with some files changed or, given None, left out."""
    for name, text in {**GENUINE, **(changes or {})}.items():
        if text is not None:
            (place / "aiter" / name).parent.mkdir(parents=True, exist_ok=True)
            (place / "aiter" / name).write_text(text)
    importlib.invalidate_caches()
    return place / "aiter"


def test_a_genuine_package_loads_and_has_no_findings(place: Path) -> None:
    directory = package(place)
    assert probe_aiter() == []
    assert "aiter" not in sys.modules, "the probe imports nothing"
    loaded = load_aiter()
    assert (loaded.version, loaded.origin, loaded.get_gfx_runtime()) == ("0.1.9", str(directory), "gfx942")


@pytest.mark.skipif(importlib.util.find_spec("aiter") is not None, reason="an aiter is installed")
def test_missing(place: Path) -> None:
    assert [finding.what for finding in probe_aiter()] == ["aiter is not installed for this Python"]
    with pytest.raises(LibraryError, match=r"aiter is missing.*not on PyPI"):
        load_aiter()


@pytest.mark.parametrize("gone", library.LAYOUT)
def test_a_package_without_the_layout_is_unrelated(place: Path, gone: str) -> None:
    directory = package(place, {gone: None})
    assert [finding.what for finding in probe_aiter()] == [f"an unrelated aiter is at {directory}"]
    with pytest.raises(LibraryError, match="is an unrelated package"):
        load_aiter()
    assert "aiter" not in sys.modules


def test_a_directory_of_the_name_and_a_bare_module_are_unrelated(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "aiter").mkdir()
    assert probe_aiter()[0].what.startswith("an unrelated aiter is at")
    monkeypatch.setitem(sys.modules, "aiter", cast("Any", SimpleNamespace(__spec__=None, __file__="by hand")))
    assert probe_aiter()[0].what == "an unrelated aiter is at by hand"


def test_the_right_layout_with_another_api_is_unrelated(place: Path) -> None:
    package(place, {"ops/quant.py": "def quantise(): ...\n"})
    with pytest.raises(LibraryError, match="is an unrelated package"):
        load_aiter()


def test_broken_keeps_its_cause(place: Path) -> None:
    package(place, {"__init__.py": "raise RuntimeError('ROCm version file not found')\n"})
    assert probe_aiter() == []
    with pytest.raises(LibraryError, match="RuntimeError: ROCm version file not found") as caught:
        load_aiter()
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_an_import_without_hip_operators_is_found_before_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(place)
    monkeypatch.setenv("AITER_TRITON_ONLY", "1")
    assert [finding.remedy for finding in probe_aiter()] == ["unset AITER_TRITON_ONLY"]


def test_preflight_names_the_device_and_spares_the_double(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(place)
    real, double = backend.aiter("gfx942"), backend.aiter_standin("gfx942")
    assert [finding.what for finding in real.preflight("cpu")] == ["aiter needs a ROCm device, not cpu"]
    monkeypatch.setattr(backend, "torch_is_rocm", lambda: False)
    assert [finding.what for finding in real.preflight("cuda:0")] == [
        "aiter needs a ROCm device, and this torch is no ROCm build"
    ]
    monkeypatch.setattr(backend, "torch_is_rocm", lambda: True)
    assert real.preflight("cuda") == []
    assert double.preflight("cpu") == []


def context(arch: str) -> RankContext:
    return RankContext(0, 1, torch.device("cpu"), cast("torch.distributed.ProcessGroup", None), arch)


def test_a_session_refuses_another_device_and_another_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backend.STANDIN_ARCH_VARIABLE, "gfx950")
    double = load_standin()
    with pytest.raises(RuntimeError, match="AITER sees gfx950 but the suite was told gfx942"):
        AiterSession(double, context("gfx942"))
    monkeypatch.setenv("GPU_ARCHS", "gfx942")
    wrong = dataclasses.replace(double, dtypes=SimpleNamespace(fp8=torch.float8_e4m3fnuz))
    with pytest.raises(
        RuntimeError, match=r"fp8 is float8_e4m3fnuz but gfx950 has float8_e4m3fn \(GPU_ARCHS is gfx942"
    ):
        AiterSession(wrong, context("gfx950"))
    unknown = dataclasses.replace(double, dtypes=SimpleNamespace(fp8=torch.uint8))
    with pytest.raises(RuntimeError, match="fp8 is uint8 but gfx950"):
        AiterSession(unknown, context("gfx950"))


def test_a_closed_session_builds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backend.STANDIN_ARCH_VARIABLE, "unset by this test")
    session = backend.aiter_standin("gfx950").open(context("gfx950:sramecc+"))
    with pytest.raises(ContractError, match=r"unknown quantise operator 'hip\.per_row'"):
        session.build(PROBLEM, "hip.per_row")
    session.close()
    session.close()
    with pytest.raises(RuntimeError, match="the session is closed"):
        session.build(PROBLEM, "hip.per_token")
