"""Run as a module by an agent: print what its host is, as one line of JSON (:class:`Examined`).

A process of its own, because it loads what may end a process; the devices are opened by another one. What it prints
does not prove that the kernels work there.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import msgspec

from accelerated.interface import Finding
from accelerated.layer import halves_of
from accelerated.mori_ep.library import probe_mori
from accelerated.registry import BackendError, backend
from conformance.engine.world_protocol import Examine, Examined
from conformance.suite import preflight
from conformance.suite.controller import fingerprint


def examined(request: Examine) -> Examined:
    """The host as the preflight of a run on it would find it."""
    findings = preflight.check_torch()
    devices: list[preflight.Device] = []
    if request.device == "cuda" and not findings:
        try:
            devices = preflight.visible_devices()
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            findings.append(Finding(str(error), "make sure that torch works there"))
    if request.whole:
        findings += _checked(request, devices)
    return Examined(
        fingerprint=fingerprint(),
        devices=tuple(vars(device) for device in devices),
        findings=tuple((finding.what, finding.remedy) for finding in dict.fromkeys(findings)),
    )


def _checked(request: Examine, devices: Sequence[preflight.Device]) -> list[Finding]:
    """What the host lacks for the backends of the run."""
    findings = []
    mori = False
    for name in request.backends:
        try:
            made = backend(name, request.arch)
        except BackendError as error:
            findings.append(Finding(str(error), "install there what pytest has"))
            continue
        findings += made.preflight(request.device)
        mori = mori or any(half.name == "mori" and not half.standin for half in halves_of(made))
    if mori:
        findings += preflight.check_rdma(request.transport, request.hosts)
    if mori and not probe_mori():
        findings += preflight.check_mori(next((d.arch for d in devices), ""))
    return findings + preflight.check_machine(request.ranks, request.device, mori=mori)


def main(arguments: Sequence[str]) -> int:
    """Answer the request that is the only argument."""
    request = msgspec.json.decode(arguments[0], type=Examine)
    print(msgspec.json.encode(examined(request)).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
