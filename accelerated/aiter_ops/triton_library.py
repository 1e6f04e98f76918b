"""Finding, checking and loading a ROCm AITER source tree that the user names, for its Triton operators.

Scope: the environment variables, the layout of the tree, the modules it needs, and the architecture it reports. The
driver asks :func:`probe`, which imports neither torch nor Triton nor AITER; only :func:`load` imports AITER, from the
named tree and nowhere else. A library that loads is not proven to work.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from accelerated.interface import Finding

#: Names the root of a source tree, or of an installation: the directory that holds the package ``aiter``.
SOURCE = "EP_AITER_SOURCE"
#: Names a module to import before AITER, e.g. a shim that lets the tree import and interprets Triton kernels.
PRELOAD = "EP_AITER_PRELOAD"
#: Files below the root by which AITER is told from another package of that name: PyPI's ``aiter`` is one.
PARTS = ("aiter/__init__.py", "aiter/ops/triton/quant/quant.py", "aiter/ops/triton/normalization/rmsnorm.py")
#: Distributions without which the package does not import.
NEEDED = ("triton", "pandas")

#: Said beside every result of interpreted kernels.
CAVEAT = (
    "real AITER Triton kernels, interpreted on the CPU: no AMD hardware was tested; "
    "rounding and saturation are the interpreter's"
)
_NAME_SOURCE = f"set {SOURCE} to the root of a ROCm AITER source tree: the directory that holds the package aiter"
_NAME_PRELOAD = (
    f"set {PRELOAD} to a module that makes AITER importable without ROCm and interprets Triton kernels, "
    "and put its directory on PYTHONPATH"
)


class LibraryError(ImportError):
    """AITER cannot be used from the named tree. The message says why, and the remedy."""


@dataclass(frozen=True)
class TritonLibrary:
    """The parts of AITER that the adapter uses.

    Attributes:
        quant: ``aiter.ops.triton.quant``.
        hip_free_quant: ``aiter.ops.quant``, for ``get_triton_quant``.
        fp4: ``aiter.utility.fp4_utils``.
        rmsnorm: ``aiter.ops.triton.normalization.rmsnorm``.
        add_pad: ``fused_add_rmsnorm_pad``.
        fused_add: ``fused_rmsnorm_add``.
        quant_type: ``aiter.QuantType``.
        fp8: the FP8 type AITER chooses for the architecture.
        arch: architecture that both Triton and AITER report.
        interpreted: Triton interprets the kernels.
        origin: directory of the package.
    """

    quant: Any
    hip_free_quant: Any
    fp4: Any
    rmsnorm: Any
    add_pad: Any
    fused_add: Any
    quant_type: Any
    fp8: Any
    arch: str
    interpreted: bool
    origin: str


def interpreted() -> bool:
    """Whether the environment asks for interpreted kernels: by Triton's own variable, or by a module to preload."""
    return bool(os.environ.get(PRELOAD)) or os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y")


def probe(device: str) -> list[Finding]:
    """Look for reasons why :func:`load` would fail for ``device``, importing nothing heavy."""
    findings = _probe_source()
    for name in NEEDED:
        if importlib.util.find_spec(name) is None:
            findings.append(Finding(f"AITER's Triton operators need {name}, which is not installed", f"install {name}"))
    return findings + _probe_preload(device)


def load(arch: str) -> TritonLibrary:
    """Import AITER from the named tree.

    Args:
        arch: gfx architecture that AITER has to report.

    Raises:
        LibraryError: no such tree, it does not import, another ``aiter`` is loaded already, or it reports another
            architecture.
    """
    findings = _probe_source()
    if findings:
        raise LibraryError("; ".join(f"{finding.what}: {finding.remedy}" for finding in findings))
    root = _root()
    sys.path.insert(0, str(root))
    preload = os.environ.get(PRELOAD)
    if preload:
        import_module(preload, f"correct {PRELOAD}, or put the module's directory on PYTHONPATH")
    remedy = f"install what it asks for, or {_NAME_PRELOAD} where there is no ROCm"
    package = import_module("aiter", remedy)
    origin = Path(str(package.__file__)).resolve().parent
    if origin != (root / "aiter").resolve():
        raise LibraryError(
            f"aiter is loaded from {origin}, not from {SOURCE}={root}; start a fresh process with only that tree"
        )
    _check_arch(arch, remedy)
    kernels = import_module("aiter.ops.triton._triton_kernels.quant.quant", remedy)
    loaded = TritonLibrary(
        quant=import_module("aiter.ops.triton.quant", remedy),
        hip_free_quant=import_module("aiter.ops.quant", remedy),
        fp4=import_module("aiter.utility.fp4_utils", remedy),
        rmsnorm=import_module("aiter.ops.triton.normalization.rmsnorm", remedy),
        add_pad=import_module("aiter.ops.triton.normalization.fused_add_rmsnorm_pad", remedy).fused_add_rmsnorm_pad,
        fused_add=import_module("aiter.ops.triton.normalization.fused_rmsnorm_add", remedy).fused_rmsnorm_add,
        quant_type=package.QuantType,
        fp8=package.dtypes.fp8,
        arch=arch,
        interpreted=type(kernels._dynamic_per_token_quant_fp8_i8_kernel).__name__ == "InterpretedFunction",
        origin=str(origin),
    )
    if loaded.interpreted and not interpreted():
        raise LibraryError(
            f"Triton interprets AITER's kernels, but neither {PRELOAD} nor TRITON_INTERPRET says so; "
            "set TRITON_INTERPRET=1"
        )
    return loaded


def _check_arch(arch: str, remedy: str) -> None:
    """Both places where AITER looks for an architecture have to say ``arch``: element types follow from either."""
    reported = {
        "Triton's target": import_module("aiter.ops.triton.utils._triton.arch_info", remedy).get_arch(),
        "rocminfo": import_module("aiter.jit.utils.chip_info", remedy).get_gfx_runtime(),
    }
    if any(seen != arch for seen in reported.values()):
        seen = " and ".join(f"{value} ({place})" for place, value in reported.items())
        raise LibraryError(
            f"AITER reports {seen}, and the contract is declared for {arch}; give --arch as the device is, or have the "
            f"module of {PRELOAD} and its environment emulate {arch}"
        )


def _root() -> Path:
    return Path(os.environ[SOURCE]).expanduser()


def _probe_source() -> list[Finding]:
    if not os.environ.get(SOURCE):
        return [Finding(f"{SOURCE} is not set, so there is no AITER to test", _NAME_SOURCE)]
    root = _root()
    if not root.is_dir():
        return [Finding(f"{SOURCE}={root} is no directory", _NAME_SOURCE)]
    missing = [part for part in PARTS if not (root / part).is_file()]
    if not missing:
        return []
    if (root / "ops" / "triton").is_dir() and root.name == "aiter":
        return [Finding(f"{SOURCE}={root} is the package itself", f"set {SOURCE}={root.parent}")]
    return [Finding(f"{SOURCE}={root} is not ROCm's AITER: it lacks {missing[0]}", _NAME_SOURCE)]


def _probe_preload(device: str) -> list[Finding]:
    preload = os.environ.get(PRELOAD)
    if preload:
        top = preload.partition(".")[0]
        if all(part.isidentifier() for part in preload.split(".")) and importlib.util.find_spec(top) is not None:
            return []
        return [Finding(f"{PRELOAD}={preload} names no module that Python finds", _NAME_PRELOAD)]
    if device.partition(":")[0] != "cuda":
        return [
            Finding(
                f"AITER does not import without ROCm, and {PRELOAD} is not set for device {device}",
                f"{_NAME_PRELOAD}; or give --device cuda on a ROCm machine",
            )
        ]
    from accelerated.mori_ep.backend import torch_is_rocm

    if torch_is_rocm() is False:
        return [Finding("AITER needs a ROCm device, and this torch is no ROCm build", "use the ROCm image's torch")]
    return []


def import_module(name: str, remedy: str) -> ModuleType:
    """Import a module of AITER, or one that has to come before it.

    Raises:
        LibraryError: it does not import, for whatever reason; the message ends with ``remedy``.
    """
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise LibraryError(f"importing {name} failed with {type(error).__name__}: {error}; {remedy}") from error
