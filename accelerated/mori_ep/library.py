"""Finding, checking and loading the MoRI library, or its double.

Scope: the genuine package is told from a missing, a broken and an unrelated one by its layout, its distribution and
the API it offers. A library that loads is not proven to work: the device is first touched when a session opens.
Nothing here falls back from one library to another, and only :func:`load_mori` imports MoRI.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from accelerated.graphs import Recorder
from accelerated.interface import Finding

#: Distributions that provide the module ``mori`` (MoRI 624002c8, pyproject.toml and README.md).
DISTRIBUTIONS = ("amd_mori", "amd-mori-nightly")
#: The compiled half of the package, beside its ``__init__.py`` (python/mori/cpp/__init__.py).
EXTENSION = "libmori_pybinds.so"
#: Sub-packages by which the genuine package is known without importing it.
SUBPACKAGES = ("ops", "shmem", "jit")

INSTALL = "use a ROCm image that ships MoRI, or install one of amd_mori and amd-mori-nightly"


class LibraryError(ImportError):
    """MoRI is missing, broken, or another package of the same name. The message says which, and the remedy."""


@dataclass(frozen=True)
class MoriLibrary:
    """The parts of MoRI that the adapter uses.

    Attributes:
        ops: ``mori.ops``: ``EpDispatchCombineConfig``, ``EpDispatchCombineKernelType``, ``EpDispatchCombineOp``.
        shmem: ``mori.shmem``: ``shmem_torch_process_group_init``, ``shmem_finalize``.
        detect_gpu_arch: ``mori.jit.config.detect_gpu_arch``.
        version: of the distribution.
        origin: directory of the package.
        recorder: what captures calls where no device can: of the double only.
    """

    ops: Any
    shmem: Any
    detect_gpu_arch: Callable[[], str]
    version: str
    origin: str
    recorder: Recorder | None = None


def probe_mori() -> list[Finding]:
    """Look for reasons why :func:`load_mori` would fail here, importing neither MoRI nor torch."""
    directory, found_at = _locate()
    if found_at is None:
        return [Finding("mori is not installed for this Python", INSTALL)]
    if directory is None:
        return [Finding(f"an unrelated mori is at {found_at}", f"remove it from sys.path, then {INSTALL}")]
    findings = []
    if not (directory / EXTENSION).is_file():
        what = f"mori at {directory} is not built: it has no {EXTENSION}"
        findings.append(Finding(what, f"build it there (pip install .), or {INSTALL}"))
    installed = [name for name in DISTRIBUTIONS if _version(name) is not None]
    if len(installed) > 1:
        what = f"{' and '.join(installed)} are both installed and overwrite each other's files"
        findings.append(Finding(what, f"uninstall both, then install {installed[0]} alone"))
    return findings


def load_mori() -> MoriLibrary:
    """Import the genuine MoRI. To be called in a rank process only.

    Raises:
        LibraryError: missing, broken (the cause is chained) or unrelated package.
    """
    directory, found_at = _locate()
    if found_at is None:
        raise LibraryError(f"mori is missing: no such package for {sys.executable}; {INSTALL}")
    if directory is None:
        _unrelated(found_at)
    try:
        package = importlib.import_module("mori")
        ops = importlib.import_module("mori.ops")
        shmem = importlib.import_module("mori.shmem")
        config = importlib.import_module("mori.jit.config")
    except Exception as error:
        raise LibraryError(
            f"mori is broken: importing it from {directory} failed with {type(error).__name__}: {error}; "
            f"reinstall it for this ROCm and Python ({INSTALL})"
        ) from error
    if not hasattr(ops, "EpDispatchCombineOp") or not hasattr(shmem, "shmem_torch_process_group_init"):
        _unrelated(str(directory))
    version = next((found for name in DISTRIBUTIONS if (found := _version(name))), None)
    return MoriLibrary(
        ops=ops,
        shmem=shmem,
        detect_gpu_arch=config.detect_gpu_arch,
        version=version or str(getattr(package, "__version__", "unknown")),
        origin=str(directory),
    )


def load_standin() -> MoriLibrary:
    """The double in :mod:`accelerated.standin.mori_ep` behind the same parts. It imports torch."""
    double = importlib.import_module("accelerated.standin.mori_ep")
    return MoriLibrary(
        ops=importlib.import_module("accelerated.standin.mori_ep.ops"),
        shmem=importlib.import_module("accelerated.standin.mori_ep.shmem"),
        detect_gpu_arch=importlib.import_module("accelerated.standin.mori_ep.jit_config").detect_gpu_arch,
        version="stand-in",
        origin=str(Path(str(double.__file__)).parent),
        recorder=importlib.import_module("accelerated.standin.mori_ep.graphs"),
    )


def _locate() -> tuple[Path | None, str | None]:
    """Directory of the genuine package or None, and where Python finds any ``mori`` or None."""
    try:
        spec = importlib.util.find_spec("mori")
    except ValueError:
        # A module without a spec was put into sys.modules by hand.
        return None, str(getattr(sys.modules["mori"], "__file__", "sys.modules"))
    if spec is None:
        return None, None
    directories = list(spec.submodule_search_locations or ())
    if spec.origin is None or not directories:
        # A namespace package is any directory called mori on sys.path, e.g. the root of a source checkout.
        return None, spec.origin or (directories[0] if directories else "an unknown place")
    directory = Path(directories[0])
    genuine = all((directory / name / "__init__.py").is_file() for name in SUBPACKAGES)
    return (directory if genuine else None), str(directory)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _unrelated(place: str) -> NoReturn:
    raise LibraryError(
        f"the mori at {place} is an unrelated package: it lacks MoRI's sub-packages {', '.join(SUBPACKAGES)} or their "
        f"API; remove it from sys.path, then {INSTALL}"
    )
