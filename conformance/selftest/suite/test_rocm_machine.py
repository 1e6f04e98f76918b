"""On a ROCm machine nothing falls back to a stand-in: without a working MoRI a run ends with exit 3 and its reason.

The machine is simulated by a KFD device node that exists. A pass does not prove anything about a real one.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from conformance.selftest.suite.runs import Run, run
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
