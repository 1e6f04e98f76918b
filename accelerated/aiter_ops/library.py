"""Finding, checking and loading the AITER library, or its double.

Scope: the genuine package is told from a missing, a broken and an unrelated one (PyPI's ``aiter`` is about asynchronous
iterators) by its layout, its distribution and the API it offers. A library that loads is not proven to work: its
kernels are compiled and the device is first touched when an operator runs. Nothing here falls back from one library to
another, and only :func:`load_aiter` imports AITER.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from accelerated.interface import Finding

#: Distribution that provides the module ``aiter`` (AITER e4048607, setup.py:14).
DISTRIBUTION = "amd-aiter"
#: Files by which the genuine package is known without importing it.
LAYOUT = ("ops/quant.py", "ops/rmsnorm.py", "jit/core.py", "utility/dtypes.py")
#: Set to "1", each makes ``import aiter`` leave the HIP operators out (aiter/__init__.py:57-63).
PARTIAL_IMPORTS = ("AITER_TRITON_ONLY", "AITER_AOT_IMPORT")

INSTALL = "use a ROCm image that ships AITER, or install amd-aiter from ROCm/aiter (it is not on PyPI)"


class LibraryError(ImportError):
    """AITER is missing, broken, or another package of the same name. The message says which, and the remedy."""


@dataclass(frozen=True)
class AiterLibrary:
    """The parts of AITER that the adapters use.

    Attributes:
        quant: ``aiter.ops.quant``.
        rmsnorm: ``aiter.ops.rmsnorm``.
        enum: ``aiter.ops.enum``: ``QuantType``.
        dtypes: ``aiter.utility.dtypes``: ``fp8`` (of the live device), ``fp4x2``, ``fp8_e8m0``.
        get_gfx_runtime: ``aiter.jit.utils.chip_info.get_gfx_runtime``: architecture of the live device.
        distributed: imports a module of ``aiter.dist`` by its name (``communication_op``) and returns it.
        part: imports a module of ``aiter`` by its name (``fused_moe``, ``ops.shuffle``) when an operator needs it and
            returns it; raises :class:`LibraryError` with that name where the import fails.
        version: of the distribution.
        origin: directory of the package.
    """

    quant: Any
    rmsnorm: Any
    enum: Any
    dtypes: Any
    get_gfx_runtime: Callable[[], str]
    distributed: Callable[[str], Any]
    part: Callable[[str], Any]
    version: str
    origin: str


def probe_aiter() -> list[Finding]:
    """Look for reasons why :func:`load_aiter` would fail here, importing neither AITER nor torch."""
    directory, found_at = _locate()
    if found_at is None:
        return [Finding("aiter is not installed for this Python", INSTALL)]
    if directory is None:
        return [Finding(f"an unrelated aiter is at {found_at}", f"uninstall it (pip uninstall aiter), then {INSTALL}")]
    return [
        Finding(f"{name}=1 makes aiter leave out its HIP operators", f"unset {name}")
        for name in PARTIAL_IMPORTS
        if os.environ.get(name) == "1"
    ]


def load_aiter() -> AiterLibrary:
    """Import the genuine AITER. To be called in a rank process only.

    Raises:
        LibraryError: missing, broken (the cause is chained) or unrelated package.
    """
    directory, found_at = _locate()
    if found_at is None:
        raise LibraryError(f"aiter is missing: no such package for {sys.executable}; {INSTALL}")
    if directory is None:
        _unrelated(found_at)
    try:
        # The package first: its sub-modules import names that only its __init__ binds.
        package = importlib.import_module("aiter")
        quant = importlib.import_module("aiter.ops.quant")
        rmsnorm = importlib.import_module("aiter.ops.rmsnorm")
        enum = importlib.import_module("aiter.ops.enum")
        dtypes = importlib.import_module("aiter.utility.dtypes")
        chip_info = importlib.import_module("aiter.jit.utils.chip_info")
    except Exception as error:
        raise LibraryError(
            f"aiter is broken: importing it from {directory} failed with {type(error).__name__}: {error}; "
            f"reinstall it for this ROCm and Python ({INSTALL})"
        ) from error
    if not hasattr(quant, "get_hip_quant") or not hasattr(rmsnorm, "rmsnorm2d_fwd_with_add"):
        _unrelated(str(directory))
    return AiterLibrary(
        quant=quant,
        rmsnorm=rmsnorm,
        enum=enum,
        dtypes=dtypes,
        get_gfx_runtime=chip_info.get_gfx_runtime,
        distributed=lambda name: importlib.import_module(f"aiter.dist.{name}"),
        part=lambda name: _part("aiter", name),
        version=_version() or str(getattr(package, "__version__", "unknown")),
        origin=str(directory),
    )


def load_standin() -> AiterLibrary:
    """The double in :mod:`accelerated.standin.aiter_ops` behind the same parts. It imports torch."""
    root = "accelerated.standin.aiter_ops"
    return AiterLibrary(
        quant=importlib.import_module(f"{root}.ops.quant"),
        rmsnorm=importlib.import_module(f"{root}.ops.rmsnorm"),
        enum=importlib.import_module(f"{root}.ops.enum"),
        dtypes=importlib.import_module(f"{root}.utility.dtypes"),
        get_gfx_runtime=importlib.import_module(f"{root}.jit.utils.chip_info").get_gfx_runtime,
        distributed=lambda name: importlib.import_module(f"{root}.{name}"),
        part=lambda name: _part(root, name),
        version="stand-in",
        origin=str(Path(str(importlib.import_module(root).__file__)).parent),
    )


def _part(root: str, name: str) -> Any:
    """Module ``root.name``; what is broken there must not look like a fault of the whole library."""
    try:
        return importlib.import_module(f"{root}.{name}")
    except Exception as error:
        raise LibraryError(
            f"{root}.{name} is broken: importing it failed with {type(error).__name__}: {error}; the rest of the "
            f"library was imported, so this build lacks that part ({INSTALL})"
        ) from error


def _locate() -> tuple[Path | None, str | None]:
    """Directory of the genuine package or None, and where Python finds any ``aiter`` or None."""
    try:
        spec = importlib.util.find_spec("aiter")
    except ValueError:
        # A module without a spec was put into sys.modules by hand.
        return None, str(getattr(sys.modules["aiter"], "__file__", "sys.modules"))
    if spec is None:
        return None, None
    directories = list(spec.submodule_search_locations or ())
    if spec.origin is None or not directories:
        # A namespace package is any directory called aiter on sys.path, e.g. the one that holds a source checkout.
        return None, spec.origin or (directories[0] if directories else "an unknown place")
    directory = Path(directories[0])
    genuine = all((directory / name).is_file() for name in LAYOUT)
    return (directory if genuine else None), str(directory)


def _version() -> str | None:
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None


def _unrelated(place: str) -> NoReturn:
    raise LibraryError(
        f"the aiter at {place} is an unrelated package: it lacks AITER's {', '.join(LAYOUT)} or their API; "
        f"uninstall it, then {INSTALL}"
    )
