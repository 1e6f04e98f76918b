"""Hosts of a launched world that are not what the driver's host is, or was expected, are refused by name.

The hosts and their GPUs are made up. A pass does not prove anything about what a real host reports.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from accelerated.interface import Finding
from conformance import agent
from conformance.engine.world_protocol import Examine
from conformance.selftest.suite.test_expected_arch import H200, MI300X, MI355X
from conformance.selftest.suite.test_harness import options
from conformance.suite import controller, host, preflight
from conformance.suite.options import Launched
from conformance.suite.preflight import Device
from conformance.suite.seats import OVERRIDE, Seat, facts
from conformance.verdicts import ExitCode

REQUEST = Examine("cuda", "gfx950", ("reference",), "p2p", 2, 2)
MINE = (replace(MI355X, uuid="a-0"), replace(MI355X, uuid="a-1"))
THEIRS = (replace(MI355X, uuid="b-0"), replace(MI355X, uuid="b-1"))


def seats(*devices: Device, error: str = "", drop: str = "", **versions: str) -> tuple[Seat, ...]:
    """Four ranks on two hosts; what is given is of the second one."""
    mine = controller.fingerprint()
    other = {name: value for name, value in {**mine, **versions}.items() if name != drop}
    here = [Seat(rank, rank, "a", mine, MINE) for rank in range(2)]
    return (*here, *(Seat(2 + rank, rank, "b", other, devices or THEIRS, error=error) for rank in range(2)))


def fit(place: Path, patch: pytest.MonkeyPatch, there: tuple[Seat, ...], expected: str = "gfx950") -> None:
    patch.setattr(preflight, "visible_devices", lambda: list(MINE))
    patch.setattr(preflight, "check_machine", lambda *_, **__: [])
    launched = Launched(4, 2, ("a", "b"), there)
    chosen = replace(options(place, "reference"), device="cuda", ep_sizes=(4,), launched=launched)
    controller.fit_to_machine(replace(chosen, expect_arch=expected))


def test_hosts_that_are_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(tmp_path, monkeypatch, seats())
    fit(tmp_path, monkeypatch, seats(), expected="")
    fit(tmp_path, monkeypatch, seats(kernel="6.8", pytest="8", ROCR_VISIBLE_DEVICES="4,5"))
    told = facts(seats())
    assert told["rank3"] == "b: AMD Instinct MI355X gfx950 b-1"
    assert told["b.torch"] == told["a.torch"] == controller.fingerprint()["torch"]


@pytest.mark.parametrize(
    ("there", "expected", "said"),
    [
        (seats(MI300X, MI300X), "gfx950", "b has AMD Instinct MI300X (gfx942) and gfx950 is expected; start"),
        (seats(MI300X, MI300X), "", "b has AMD Instinct MI300X (gfx942) and gfx950 is expected; start"),
        (seats(MI355X, H200), "", "b has NVIDIA H200 (no gfx architecture) and gfx950 is expected; start"),
        (seats(THEIRS[0]), "", "rank 3 on b has local rank 1 and sees 1 GPUs; make as many visible"),
        (seats(torch="2.8.0"), "", "b has torch 2.8.0 and pytest has "),
        (seats(sources="0"), "", "b has sources 0 and pytest has "),
        (seats(drop="triton"), "", "b has triton unset and pytest has "),
        (seats(MORI_SHMEM_MODE="isolation"), "", "and pytest has unset; export the same MORI_SHMEM_MODE"),
        (seats(**{OVERRIDE: "9.5.0"}), "gfx950", "b: HSA_OVERRIDE_GFX_VERSION is 9.5.0, so the architecture"),
        (seats(error="exit 1"), "", "rank 2 on b cannot be examined: exit 1; repair"),
    ],
)
def test_hosts_that_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: tuple[Seat, ...], expected: str, said: str
) -> None:
    with pytest.raises(pytest.exit.Exception) as caught:
        fit(tmp_path, monkeypatch, there, expected)
    assert caught.value.returncode == ExitCode.INFRASTRUCTURE
    assert said in str(caught.value.msg)
    assert all(line.startswith("preflight: ") for line in str(caught.value.msg).splitlines())


def test_one_gpu_under_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twice = tuple(replace(seat, host="a") for seat in seats(*MINE))
    with pytest.raises(pytest.exit.Exception) as caught:
        fit(tmp_path, monkeypatch, twice)
    assert "rank 2 on a and rank 0 take the same GPU a-0" in str(caught.value.msg)
    # Where torch tells no UUIDs, equal ones say nothing.
    numbered = [replace(seat, devices=(replace(MI355X, uuid="0"), replace(MI355X, uuid="1"))) for seat in twice]
    fit(tmp_path, monkeypatch, tuple(numbered))


def test_a_host_reports_its_devices_or_why_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "visible_devices", lambda: list(THEIRS))
    told = host.examined(REQUEST)
    assert [Device(**entry) for entry in told.devices] == list(THEIRS)
    assert told.fingerprint == controller.fingerprint()
    assert told.findings == ()

    def broken() -> list[Device]:
        raise RuntimeError("the device probe failed: no such file")

    monkeypatch.setattr(preflight, "visible_devices", broken)
    assert host.examined(REQUEST).findings == (
        ("the device probe failed: no such file", "make sure that torch works there"),
    )
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert agent.examine(REQUEST).error == "exit 1"


def test_what_a_host_lacks_for_the_backends_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "visible_devices", lambda: list(THEIRS))
    monkeypatch.setattr(preflight, "check_machine", lambda ranks, device, *, mori: [Finding(f"{ranks} {mori}", "")])
    whole = Examine("cuda", "gfx950", ("reference", "mori", "no.such:backend"), "rdma", 2, 2, whole=True)
    told = [what for what, _ in host.examined(whole).findings]
    assert "mori is not installed for this Python" in told
    assert any("no.such" in what for what in told)
    assert any("/sys/class/infiniband has no adapter" in what for what in told)
    assert told[-1] == "2 True"
    assert host.examined(REQUEST).findings == (), "the others of a host are asked for its GPUs only"
