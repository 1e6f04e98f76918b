"""``--installed``: the recorded signatures against an installed MoRI, here its double under MoRI's names.

Scope: that differences are told. A pass does not prove anything about a genuine library.
"""

from __future__ import annotations

import sys

import pytest

from accelerated.mori_ep import symbols
from accelerated.mori_ep.library import LibraryError, load_standin
from accelerated.standin.mori_ep import ops, shmem
from conformance.selftest.standin.test_signatures import DOUBLES


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in DOUBLES.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(symbols, "load_mori", load_standin)


@pytest.mark.usefixtures("installed")
def test_the_recorded_version_does_not_differ(capsys: pytest.CaptureFixture[str]) -> None:
    assert symbols.main(["--installed"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("installed")
def test_what_differs_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def reset(self: object, now: bool = True) -> None: ...

    monkeypatch.setattr(ops.EpDispatchCombineOp, "reset", reset)
    monkeypatch.setattr(ops.EpDispatchCombineOp, "combine", 1)
    monkeypatch.delattr(shmem, "shmem_npes")
    monkeypatch.setitem(sys.modules, "mori.jit.config", None)
    assert symbols.main([]) == 0, "nothing is imported unless asked for"
    assert symbols.main(["--installed"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert {line.split(": ")[1] for line in lines[1:]} == {
        "mori.jit.config:detect_gpu_arch",
        "mori.ops:EpDispatchCombineOp.combine",
        "mori.ops:EpDispatchCombineOp.reset",
        "mori.shmem:shmem_npes",
    }
    assert lines[0].startswith("installed: mori.jit.config does not import: ModuleNotFoundError")
    assert any("combine: is no longer one of the functions" in line for line in lines)


def test_a_missing_library_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def load() -> None:
        raise LibraryError("mori is missing")

    monkeypatch.setattr(symbols, "load_mori", load)
    assert symbols.main(["--installed"]) == 1
    assert capsys.readouterr().err == "mori is missing\n"
