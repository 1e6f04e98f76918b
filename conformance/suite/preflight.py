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
from accelerated.mori_ep import backend as mori_backend

OLDEST_TORCH = (2, 8)
SHM_BYTES_PER_RANK = 64 << 20
PROBE_LIMIT_S = 120
IMPORT_LIMIT_S = 300
LOCKED_BYTES = 1 << 30
_TRACEBACK_LINES = 8


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
    return version is not None and ("rocm" in version or mori_backend.torch_is_rocm() is True)


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


def check_machine(ranks: int, device: str, *, mori: bool) -> list[Finding]:
    """On a GPU: shared memory, the ROCm device node, and what the real MoRI compiles its kernels with and into.

    Nothing on the CPU path uses shared memory, of which a container has little unless it is asked for.
    """
    if device != "cuda":
        return []
    findings = []
    shm = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").exists() else 0
    if shm < ranks * SHM_BYTES_PER_RANK:
        findings.append(
            Finding(
                f"/dev/shm has {shm >> 20} MiB free; {ranks} ranks need {ranks * SHM_BYTES_PER_RANK >> 20} MiB",
                "enlarge it (docker run --shm-size) or lower --ep-sizes",
            )
        )
    kfd = kfd_device()
    if is_rocm_machine() and not os.access(kfd, os.R_OK | os.W_OK):
        findings.append(Finding(f"{kfd} cannot be opened", "pass the device in and join the render group"))
    if mori:
        if shutil.which("hipcc") is None:
            findings.append(
                Finding("hipcc is not on PATH; MoRI compiles its kernels at run time", "install the ROCm compiler")
            )
        findings += _jit_cache()
    return findings


def warnings(device: str, *, mori: bool) -> list[str]:
    """What may matter and stops no run."""
    if device != "cuda" or not mori:
        return []
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if locked == resource.RLIM_INFINITY or locked >= LOCKED_BYTES:
        return []
    return [
        f"locked memory is limited to {locked} bytes, too few for RDMA between nodes; raise it: ulimit -l unlimited"
    ]


def check_mori(arch: str) -> list[Finding]:
    """Does the real MoRI import, and does it take the device for what it is? Asked of a process of its own.

    Args:
        arch: gfx architecture of the visible GPUs; empty where unknown.
    """
    command = [sys.executable, "-X", "faulthandler", "-m", "accelerated.mori_ep.check"]
    # Its search path is that of the ranks.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(p or os.getcwd() for p in sys.path))}
    remedy = "reinstall mori for this ROCm, torch and Python"
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=IMPORT_LIMIT_S, check=False, env=environment
        )
    except subprocess.TimeoutExpired:
        return [Finding(f"mori does not import within {IMPORT_LIMIT_S} s", remedy)]
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        told = [line for line in lines if not line.startswith(("Traceback", "The above exception", "^", "~"))]
        what = " | ".join(told[-_TRACEBACK_LINES:])
        return [Finding(f"mori does not import (exit {done.returncode}): {what}", remedy)]
    lines = done.stdout.split()
    detected = lines[-1].partition(":")[0] if lines else "nothing"
    if arch and detected != arch:
        return [
            Finding(f"mori takes the GPUs for {detected} and they are {arch}", "unset MORI_GPU_ARCHS, or " + remedy)
        ]
    return []


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


def check_rdma(transport: str, hosts: int, adapters: Path = Path("/sys/class/infiniband")) -> list[Finding]:
    """Is there an adapter where ranks put through RDMA? Without one MoRI ends the process (context.cpp)."""
    if (transport != "rdma" and hosts == 1) or (adapters.is_dir() and any(adapters.iterdir())):
        return []
    why = f"ranks on {hosts} hosts" if hosts > 1 else f"--transport {transport}"
    return [Finding(f"{why} put through RDMA, and {adapters} has no adapter", "pass it in, or give --transport p2p")]


def _jit_cache() -> list[Finding]:
    """MoRI's JIT cache must be writable, and its lock has no owner and no timeout: a stale one blocks every run."""
    cache = Path(os.environ.get("MORI_JIT_CACHE_DIR", Path.home() / ".mori" / "jit"))
    existing = next(path for path in (cache.absolute(), *cache.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        what = f"MoRI's JIT cache {cache} cannot be written: {existing} is no writable directory"
        return [Finding(what, "make it writable, or set MORI_JIT_CACHE_DIR")]
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
