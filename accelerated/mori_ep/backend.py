"""MoRI, and its double, as backends of the suite.

Scope: the driver-side half (standing, contract, preflight) and the way into a session. A clean preflight does not prove
that the library works on the device; it proves that the known reasons for failure are absent.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from accelerated.contract import Contract, Support
from accelerated.interface import Finding
from accelerated.mori_ep import contract as declared
from accelerated.mori_ep.library import MoriLibrary, load_mori, load_standin, probe_mori
from reference.catalogue import KERNEL_TYPES, VLLM_BACKENDS

if TYPE_CHECKING:
    from accelerated.interface import RankContext
    from accelerated.mori_ep.adapter import MoriSession
    from reference.problem import Problem

#: Environment variable with the number of hosts that the ranks are spread over; without it they share one.
HOSTS_VARIABLE = "EP_CONFORMANCE_HOSTS"


class MoriBackend:
    """MoRI's EPv1 operator, or its double.

    Args:
        name: name of the backend in reports.
        standin: True for the double.
        load: gives the library in a rank process.
        arch: gfx architecture the driver declares contracts for; target features (``gfx942:sramecc+``) are cut off.
    """

    judged_by = "reference"
    #: The library's own names; support, contract and build also take :data:`reference.catalogue.VLLM_BACKENDS`.
    kernel_types: Sequence[str] = KERNEL_TYPES
    aliases: Sequence[str] = VLLM_BACKENDS

    def __init__(self, name: str, standin: bool, load: Callable[[], MoriLibrary], arch: str) -> None:
        self.name = name
        self.standin = standin
        #: Devices on which calls can be captured; the double's recorder knows the CPU's memory alone.
        self.graph_devices: Sequence[str] = ("cpu",) if standin else ("cuda",)
        self._load = load
        self._arch = arch.partition(":")[0]

    def support(self, problem: Problem, kernel_type: str) -> Support:
        """Standing on the declared architecture; the double may hold more ranks than a real host."""
        limit = None if self.standin else declared.RANKS_PER_HOST
        hosts = int(os.environ.get(HOSTS_VARIABLE, "1"))
        return declared.support(problem, kernel_type, self._arch, ranks_per_host_limit=limit, hosts=hosts)

    def contract(self, problem: Problem, kernel_type: str) -> Contract:
        """Declared behaviour on the declared architecture.

        Raises:
            ContractError: unknown kernel type or architecture.
        """
        return declared.contract(problem, kernel_type, self._arch)

    def preflight(self, device: str) -> list[Finding]:
        """Findings for ``device`` (``"cuda"`` or ``"cpu"``); none for the double, which runs anywhere."""
        if self.standin:
            return []
        findings = []
        if device.partition(":")[0] != "cuda":
            findings.append(Finding(f"mori needs a ROCm device, not {device}", "give --device cuda on a ROCm machine"))
        elif torch_is_rocm() is False:
            findings.append(
                Finding("mori needs a ROCm device, and this torch is no ROCm build", "use the ROCm image's torch")
            )
        return findings + probe_mori()

    def open(self, context: RankContext) -> MoriSession:
        """Load and initialise the library in a rank process.

        Raises:
            LibraryError: the library is missing, broken or unrelated.
            RuntimeError: it does not initialise, or sees another architecture than ``context.arch``.
        """
        from accelerated.mori_ep.adapter import MoriSession

        if self.standin:
            # No device tells the double what to act as; the real library is left to look for itself.
            os.environ["MORI_GPU_ARCHS"] = context.arch
        return MoriSession(self._load(), context)


def mori(arch: str) -> MoriBackend:
    """The real library."""
    return MoriBackend("mori", standin=False, load=load_mori, arch=arch)


def mori_standin(arch: str) -> MoriBackend:
    """The double in :mod:`accelerated.standin.mori_ep`."""
    return MoriBackend("mori-standin", standin=True, load=load_standin, arch=arch)


def torch_builds() -> dict[str, str]:
    """Versions of HIP, ROCm and CUDA that torch was built with, from its version file so that torch is not imported.

    A version is empty where torch was built without; a key is absent where the file does not say.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return {}
    try:
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return {}
    found = re.findall(r"^(hip|rocm|cuda)\b[^=\n]*=\s*(.+)$", text, re.MULTILINE)
    return {name: "" if value.strip() == "None" else value.strip().strip("'\"") for name, value in found}


def torch_is_rocm() -> bool | None:
    """Whether torch was built for ROCm; None: unknown."""
    hip = torch_builds().get("hip")
    return None if hip is None else bool(hip)
