"""``--expect-arch``: a run on another machine than the one that was meant says nothing about that one.

The devices are made up. A pass does not prove anything about what a real device reports.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from conformance.selftest.suite.runs import run
from conformance.selftest.suite.test_harness import options
from conformance.suite import controller, preflight
from conformance.suite.preflight import Device
from conformance.verdicts import ExitCode

MI355X = Device("1", "AMD Instinct MI355X", "gfx950", 1 << 38)
MI300X = Device("2", "AMD Instinct MI300X", "gfx942", 1 << 38)
H200 = Device("3", "NVIDIA H200", "", 1 << 38)


def fit(place: Path, monkeypatch: pytest.MonkeyPatch, *devices: Device, expected: str = "gfx950") -> None:
    monkeypatch.setattr(preflight, "visible_devices", lambda: list(devices))
    monkeypatch.setattr(preflight, "check_machine", lambda *_, **__: [])
    chosen = replace(options(place, "reference"), device="cuda", ep_sizes=(1,), ep_sizes_given=True)
    controller.fit_to_machine(replace(chosen, expect_arch=expected))


def test_the_machine_that_was_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(tmp_path, monkeypatch, MI355X, replace(MI355X, uuid="4"))
    fit(tmp_path, monkeypatch, MI300X, expected="")


@pytest.mark.parametrize(
    ("devices", "seen"),
    [
        ((MI300X,), "AMD Instinct MI300X (gfx942)"),
        ((MI355X, MI300X), "AMD Instinct MI300X (gfx942)"),
        ((H200,), "NVIDIA H200 (no gfx architecture)"),
        ((), "no visible GPU"),
    ],
)
def test_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, devices: tuple[Device, ...], seen: str
) -> None:
    with pytest.raises(pytest.exit.Exception) as caught:
        fit(tmp_path, monkeypatch, *devices)
    assert caught.value.returncode == ExitCode.INFRASTRUCTURE
    assert f"--expect-arch is gfx950 and this is {seen};" in str(caught.value.msg)


@pytest.mark.parametrize("name", ["HSA_OVERRIDE_GFX_VERSION", "HSA_OVERRIDE_GFX_VERSION_1"])
def test_an_architecture_that_the_environment_makes_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "9.5.0")
    with pytest.raises(pytest.exit.Exception) as caught:
        fit(tmp_path, monkeypatch, MI355X)
    assert caught.value.returncode == ExitCode.INFRASTRUCTURE
    assert f"{name} is 9.5.0" in str(caught.value.msg)
    assert "unset it" in str(caught.value.msg)
    fit(tmp_path, monkeypatch, MI355X, expected="")
    assert controller.fingerprint()[name] == "9.5.0"


def test_a_stand_in_is_no_machine(tmp_path: Path) -> None:
    done = run(tmp_path / "out", "--backend", "mori-standin", "--arch", "gfx950", "--expect-arch", "gfx950")
    assert done.code == ExitCode.INFRASTRUCTURE, done.text
    assert "this is the CPU, with the contract of gfx950" in done.text
    assert not (tmp_path / "out" / "records").exists(), "nothing ran"
