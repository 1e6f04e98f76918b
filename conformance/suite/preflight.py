"""Preflight: find out, before anything is started, why a run on this machine would fail; one line each, with a remedy.

Runs in the controller without importing torch; what needs torch or a device is asked of a process of its own
(:mod:`conformance.suite.probe`). A clean preflight does not prove that the kernels work.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from accelerated.interface import Finding

OLDEST_TORCH = (2, 8)
SHM_BYTES_PER_RANK = 64 << 20
PROBE_LIMIT_S = 120


@dataclass(frozen=True)
class Device:
    """One visible GPU."""

    uuid: str
    name: str
    arch: str
    free_bytes: int


def torch_version() -> str | None:
    """Version of the installed torch distribution, without importing it."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None


def torch_is_rocm() -> bool:
    """True if the installed torch is a ROCm build, from its version or its ``torch/version.py``."""
    version = torch_version()
    if version is None:
        return False
    if "rocm" in version:
        return True
    located = importlib.metadata.distribution("torch").locate_file("torch/version.py")
    text = Path(str(located)).read_text() if Path(str(located)).exists() else ""
    found = re.search(r"^hip[^=]*=\s*(.+)$", text, re.MULTILINE)
    return found is not None and found.group(1).strip() != "None"


def kfd_device() -> Path:
    """The kernel driver's device node; ``EP_CONFORMANCE_KFD`` names another one."""
    return Path(os.environ.get("EP_CONFORMANCE_KFD", "/dev/kfd"))


def is_rocm_machine() -> bool:
    """True where nothing may fall back to a stand-in: a ROCm build of torch, or a KFD device."""
    return kfd_device().exists() or torch_is_rocm()


def check_torch() -> list[Finding]:
    """Is torch there, and new enough?"""
    version = torch_version()
    if version is None:
        return [
            Finding("torch is not installed", "install the image's own torch, or the extra: pip install -e '.[cpu]'")
        ]
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if numbers < OLDEST_TORCH:
        return [Finding(f"torch is {version}; the oldest supported is 2.8", "upgrade torch")]
    return []


def check_machine(ranks: int, device: str) -> list[Finding]:
    """Shared memory, and on a ROCm device its node, locked memory, compiler and stale JIT locks."""
    findings = []
    shm = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").exists() else 0
    if shm < ranks * SHM_BYTES_PER_RANK:
        findings.append(
            Finding(
                f"/dev/shm has {shm >> 20} MiB free; {ranks} ranks need {ranks * SHM_BYTES_PER_RANK >> 20} MiB",
                "enlarge it (docker run --shm-size) or lower --ep-sizes",
            )
        )
    if device != "cuda" or not is_rocm_machine():
        return findings
    kfd = kfd_device()
    if not os.access(kfd, os.R_OK | os.W_OK):
        findings.append(Finding(f"{kfd} cannot be opened", "pass the device in and join the render group"))
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if locked != resource.RLIM_INFINITY and locked < 1 << 30:
        findings.append(Finding(f"locked memory is limited to {locked} bytes", "raise it: ulimit -l unlimited"))
    if shutil.which("hipcc") is None:
        findings.append(
            Finding("hipcc is not on PATH; MoRI compiles its kernels at run time", "install the ROCm compiler")
        )
    return findings + _stale_locks()


def check_memory(devices: list[Device], heap_bytes: int) -> list[Finding]:
    """Has every GPU room for the symmetric heap, which MoRI allocates in full up front?"""
    return [
        Finding(
            f"GPU {device.uuid} has {device.free_bytes >> 20} MiB free; MoRI's heap takes {heap_bytes >> 20} MiB",
            "end what occupies it, or make other GPUs visible",
        )
        for device in devices
        if device.free_bytes < heap_bytes
    ]


def _stale_locks() -> list[Finding]:
    """MoRI's JIT lock has no owner and no timeout: one left by a killed compile blocks every later run."""
    cache = Path(os.environ.get("MORI_JIT_CACHE_DIR", Path.home() / ".mori" / "jit"))
    locks = sorted(str(path) for path in cache.rglob("*.lock")) if cache.is_dir() else []
    return [Finding(f"stale JIT lock {path}", "make sure nothing is compiling, then delete it") for path in locks]


def visible_devices() -> list[Device]:
    """GPUs that torch sees, asked of a process of its own so that the driver never opens one.

    Raises:
        RuntimeError: the probe failed; its last lines are in the message.
    """
    command = [sys.executable, "-m", "conformance.suite.probe"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_LIMIT_S, check=False)
    if done.returncode:
        raise RuntimeError("the device probe failed: " + " | ".join(done.stderr.strip().splitlines()[-3:]))
    return [Device(**entry) for entry in json.loads(done.stdout.splitlines()[-1])]
