"""Places of a launched world's ranks: the host, its versions and environment, and its GPUs, compared with the driver's.

Scope: what the agents reported (:mod:`conformance.suite.host`), in the process that started pytest. Hosts that agree
here are not proven to behave alike: firmware, drivers and what a version number hides are not seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from accelerated.interface import Finding
from accelerated.mori_ep import transports
from conformance.engine.world import World
from conformance.engine.world_protocol import Examine
from conformance.suite import preflight
from conformance.suite.preflight import Device

#: With it, and with a device's number behind it, ROCr reports an architecture that the GPU need not have.
OVERRIDE = "HSA_OVERRIDE_GFX_VERSION"
#: What hosts may differ in: what only the driver uses, and what is of one host.
_OF_A_HOST = (
    *("kernel", "pytest", "hypothesis"),
    *("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"),
    *("MORI_JIT_CACHE_DIR", "MORI_LOG_FILE", "MORI_RDMA_DEVICES", "MORI_SOCKET_IFNAME", "MORI_IB_GID_INDEX"),
    *(transports.DISABLE_P2P, transports.ENABLE_SDMA),  # given to every rank by the run
)
_ROOT = Path(__file__).parents[2]
_SOURCES = (("reference", "*.py"), ("accelerated", "*.py"), ("conformance", "*.py"), ("fixtures", "*.json"))


@dataclass(frozen=True)
class Seat:
    """Where a rank is to run."""

    rank: int
    local_rank: int
    host: str
    fingerprint: dict[str, str] = field(default_factory=dict)
    devices: tuple[Device, ...] = ()  # that its agent sees
    findings: tuple[Finding, ...] = ()  # that the preflight made there
    error: str = ""  # why nothing is known

    @property
    def name(self) -> str:
        return f"rank {self.rank} on {self.host}"

    @property
    def device(self) -> Device | None:
        """The GPU that the rank takes: the one at its local rank."""
        return self.devices[self.local_rank] if self.local_rank < len(self.devices) else None


def seats_of(world: World, request: Examine) -> tuple[Seat, ...]:
    """Ask every agent; one seat per rank."""
    return tuple(
        Seat(
            member.hello.rank,
            member.hello.local_rank,
            member.hello.host,
            told.fingerprint,
            tuple(Device(**entry) for entry in told.devices),
            tuple(Finding(what, remedy) for what, remedy in told.findings),
            told.error,
        )
        for member, told in zip(world.members, world.examine(request), strict=True)
    )


def overrides(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that make GPUs pass for others."""
    return {name: environment[name] for name in sorted(environment) if name.startswith(OVERRIDE)}


@cache
def sources() -> str:
    """Digest of the modules and tables that ranks of this checkout run: a version number does not tell edits."""
    digest = hashlib.sha256()
    for part, pattern in _SOURCES:
        for path in sorted((_ROOT / part).rglob(pattern)):
            if "selftest" not in path.parts:
                digest.update(f"{path.relative_to(_ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def facts(seats: Sequence[Seat]) -> dict[str, str]:
    """Every rank's GPU, and versions and environment of every host, for the opening record."""
    found = {}
    for seat in seats:
        gpu = seat.device
        found[f"rank{seat.rank}"] = seat.host + (f": {gpu.name} {gpu.arch} {gpu.uuid}" if gpu else "")
        found.update({f"{seat.host}.{name}": value for name, value in seat.fingerprint.items()})
    return found


def mismatches(
    seats: Sequence[Seat],
    devices: Sequence[Device],
    mine: Mapping[str, str],
    *,
    cuda: bool,
    expect_arch: str,
    heap_bytes: int,
) -> list[Finding]:
    """Why cases on these seats would say nothing about the machine that was meant, or nothing at all.

    Args:
        seats: of every rank.
        devices: GPUs of the driver's host.
        mine: its fingerprint.
        cuda: whether the ranks run on GPUs.
        expect_arch: of ``--expect-arch``; empty if any will do.
        heap_bytes: memory that each rank takes up front.
    """
    found: list[Finding] = []
    for seat in seats:
        if seat.error:
            found.append(Finding(f"{seat.name} cannot be examined: {seat.error}", "repair or leave out that host"))
            continue
        found += [Finding(f"{seat.host}: {finding.what}", finding.remedy) for finding in seat.findings]
        found += _of_versions(seat, mine)
        if expect_arch:
            found += [_overridden(seat.host, *item) for item in overrides(seat.fingerprint).items()]
        if cuda and not seat.findings:
            found += _of_devices(seat, {expect_arch} if expect_arch else {device.arch for device in devices})
            short = preflight.check_memory([seat.device] if seat.device else [], heap_bytes)
            found += [Finding(f"{seat.name}: {finding.what}", finding.remedy) for finding in short]
    return list(dict.fromkeys([*found, *_shared(seats)]))


def _overridden(host: str, name: str, value: str) -> Finding:
    what = f"{host}: {name} is {value}, so the architecture of --expect-arch may be the variable's and not the GPUs'"
    return Finding(what, "unset it, or leave --expect-arch out")


def overridden(environment: Mapping[str, str]) -> list[Finding]:
    """Why ``--expect-arch`` cannot be answered on this host."""
    return [_overridden("this host", *item) for item in overrides(environment).items()]


def _of_versions(seat: Seat, mine: Mapping[str, str]) -> Iterator[Finding]:
    for name in sorted({*mine, *seat.fingerprint}):
        there, here = seat.fingerprint.get(name, "unset"), mine.get(name, "unset")
        if there == here or name in _OF_A_HOST:
            continue
        alike = (
            f"export the same {name} for torchrun and pytest" if name.isupper() else "install the same on every host"
        )
        yield Finding(f"{seat.host} has {name} {there} and pytest has {here}", alike)


def _of_devices(seat: Seat, wanted: set[str]) -> Iterator[Finding]:
    if seat.device is None:
        what = f"{seat.name} has local rank {seat.local_rank} and sees {len(seat.devices)} GPUs"
        yield Finding(what, "make as many visible to every agent as --nproc-per-node has ranks")
    wrong = [device for device in seat.devices if wanted and device.arch not in wanted]
    for other in dict.fromkeys((device.name, device.arch) for device in wrong):
        told = ", ".join(sorted(arch or "no gfx architecture" for arch in wanted))
        yield Finding(
            f"{seat.host} has {other[0]} ({other[1] or 'no gfx architecture'}) and {told} is expected",
            "start the world on hosts of that architecture, or make only its GPUs visible",
        )


def _shared(seats: Sequence[Seat]) -> Iterator[Finding]:
    """One GPU under two ranks, where UUIDs tell GPUs apart."""
    taken: dict[tuple[str, str], Seat] = {}
    for seat in seats:
        uuids = [device.uuid for device in seat.devices]
        if seat.device is None or len(set(uuids)) < len(uuids) or seat.device.uuid.isdigit():
            continue
        other = taken.setdefault((seat.host, seat.device.uuid), seat)
        if other is not seat:
            yield Finding(
                f"{seat.name} and rank {other.rank} take the same GPU {seat.device.uuid}",
                "make other GPUs visible to the second torchrun of a host (ROCR_VISIBLE_DEVICES)",
            )
