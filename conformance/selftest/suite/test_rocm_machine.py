"""On a ROCm machine nothing falls back to a stand-in: without a working MoRI a run ends with exit 3 and its reason.

The machine is simulated by a KFD device node that exists. A pass does not prove anything about a real one.
"""

from __future__ import annotations

import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from conformance.selftest.suite.runs import Run, run
from conformance.selftest.suite.test_harness import options
from conformance.suite import controller, preflight, probe
from conformance.verdicts import ExitCode

SUBPACKAGES = ("ops", "shmem", "jit")


def on_rocm(tmp_path: Path, *arguments: str) -> Run:
    """A run that takes this machine for a ROCm one, with the packages of ``tmp_path / "packages"``."""
    node = tmp_path / "kfd"
    node.write_text("")
    packages = tmp_path / "packages"
    packages.mkdir(exist_ok=True)
    return run(
        tmp_path / "out",
        "--tier",
        "smoke",
        *arguments,
        environment={"EP_CONFORMANCE_KFD": str(node), "PYTHONPATH": str(packages)},
    )


def refused(done: Run) -> str:
    """The reasons of a run that must have ended in preflight."""
    assert done.code == ExitCode.INFRASTRUCTURE, done.text
    assert "Traceback" not in done.text
    assert not (done.output / "records").exists(), "nothing ran"
    lines = [line.removeprefix("Exit: ") for line in done.errors]
    assert lines, done.text
    assert all(line.startswith("preflight: ") and ";" in line for line in lines), (
        "a finding and its remedy, a line each"
    )
    return "\n".join(lines)


@pytest.mark.parametrize("backend", [(), ("--backend", "auto"), ("--backend", "mori")], ids=["default", "auto", "mori"])
def test_a_missing_mori_is_not_replaced(tmp_path: Path, backend: tuple[str, ...]) -> None:
    reasons = refused(on_rocm(tmp_path, *backend))
    assert "mori is not installed for this Python" in reasons


def test_a_mori_that_is_not_built_is_named(tmp_path: Path) -> None:
    package = tmp_path / "packages" / "mori"
    for directory in (package, *(package / name for name in SUBPACKAGES)):
        directory.mkdir(parents=True)
        (directory / "__init__.py").write_text("")
    reasons = refused(on_rocm(tmp_path))
    assert f"{package} is not built" in reasons
    assert "libmori_pybinds.so" in reasons


def test_an_unrelated_mori_is_named(tmp_path: Path) -> None:
    module = tmp_path / "packages" / "mori.py"
    module.parent.mkdir()
    module.write_text("raise RuntimeError('preflight must not import this')\n")
    assert f"an unrelated mori is at {module}" in refused(on_rocm(tmp_path))


def test_a_standin_that_is_asked_for_by_name_says_so(tmp_path: Path) -> None:
    done = on_rocm(tmp_path, "--backend", "mori-standin", "--ep-sizes", "1", "--kernel-type", "IntraNode")
    assert done.code == ExitCode.OK, done.text
    assert done.opening.standins == ("mori-standin",)
    assert "A STAND-IN WAS USED" in done.text


def fake_mori(tmp_path: Path, ops: str, config: str = "def detect_gpu_arch(): return 'gfx942'\n") -> None:
    """A package with the genuine layout."""
    package = tmp_path / "packages" / "mori"
    files = {
        "__init__.py": "",
        "ops/__init__.py": ops,
        "shmem/__init__.py": "def shmem_torch_process_group_init(name): return 0\n",
        "jit/__init__.py": "",
        "jit/config.py": config,
        "libmori_pybinds.so": "",
    }
    for name, text in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)


def test_a_mori_that_does_not_import_is_told_with_its_traceback(tmp_path: Path) -> None:
    fake_mori(tmp_path, "raise ImportError('undefined symbol: _ZN3c104cuda')\n")
    reasons = refused(on_rocm(tmp_path))
    assert "mori does not import" in reasons
    assert "undefined symbol: _ZN3c104cuda" in reasons
    assert "ops/__init__.py" in reasons, "where it was raised"


def test_a_mori_that_ends_the_process_is_told(tmp_path: Path) -> None:
    fake_mori(tmp_path, "import os\nos.abort()\n")
    assert "mori does not import (exit -6)" in refused(on_rocm(tmp_path))


def test_a_mori_takes_the_gpus_for_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_mori(tmp_path, "class EpDispatchCombineOp: ...\n")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    assert preflight.check_mori("gfx942") == preflight.check_mori("") == []
    (finding,) = preflight.check_mori("gfx950")
    assert "gfx942" in finding.what
    assert "gfx950" in finding.what


def test_only_what_the_ranks_use_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = shutil.disk_usage("/")._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: nothing)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setenv("MORI_JIT_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("EP_CONFORMANCE_KFD", str(tmp_path))
    (tmp_path / "left.lock").touch()

    def found(device: str, mori: bool) -> list[str]:
        return [finding.what.split()[0] for finding in preflight.check_machine(2, device, mori=mori)]

    assert found("cpu", False) == found("cpu", True) == []
    assert found("cuda", False) == ["/dev/shm"]
    assert found("cuda", True) == ["/dev/shm", "hipcc", "stale"]


def test_a_jit_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(preflight, "SHM_BYTES_PER_RANK", 0)
    monkeypatch.setenv("EP_CONFORMANCE_KFD", str(tmp_path))
    monkeypatch.setenv("MORI_JIT_CACHE_DIR", str(tmp_path / "file" / "jit"))
    (finding,) = preflight.check_machine(2, "cuda", mori=True)
    assert "cannot be written" in finding.what
    monkeypatch.setenv("MORI_JIT_CACHE_DIR", str(tmp_path / "yet" / "to" / "be" / "made"))
    assert preflight.check_machine(2, "cuda", mori=True) == []


def test_limited_locked_memory_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (65536, 65536))
    (warning,) = preflight.warnings("cuda", mori=True)
    assert "65536" in warning
    assert preflight.warnings("cuda", mori=False) == preflight.warnings("cpu", mori=True) == []


@pytest.mark.parametrize(
    ("told", "arch"),
    [("gfx942:sramecc+:xnack-", "gfx942"), ("NVIDIA H200", ""), ("", "")],
    ids=["amd", "nvidia", "none"],
)
def test_only_a_gfx_architecture_is_one(told: str, arch: str) -> None:
    assert probe.gfx_arch(SimpleNamespace(gcnArchName=told)) == arch


@pytest.mark.parametrize(("told", "arch"), [("gfx950", "gfx950"), ("NVIDIA H200", "gfx942"), ("", "gfx942")])
def test_the_architecture_of_a_run_is_the_devices(tmp_path: Path, told: str, arch: str) -> None:
    fitted = controller._fit_to_devices(options(tmp_path, "reference"), [preflight.Device("0", "a card", told, 1)] * 2)
    assert fitted.arch == arch
