"""Backends by name: built-in, from an entry point, from ``package.module:factory``, or two of them as ``a+b``.

Scope: finding and constructing a backend in the driver, without torch and without importing the ones not asked for. A
backend that is found is not proven to run here; ask its preflight.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from accelerated.layer import JOIN, LayerBackend
from accelerated.operators import Family, operators_of

if TYPE_CHECKING:
    from accelerated.interface import Backend

#: Entry-point group under which other distributions offer backends. A built-in name cannot be overridden.
ENTRY_POINT_GROUP = "ep_conformance.backends"

_BUILT_IN = {
    "reference": "accelerated.reference_backend:ReferenceBackend",
    "allgather": "accelerated.allgather:AllGatherBackend",
    "replicated": "accelerated.replicated:ReplicatedBackend",
    "mori": "accelerated.mori_ep.backend:mori",
    "mori-standin": "accelerated.mori_ep.backend:mori_standin",
    "aiter": "accelerated.aiter_ops.backend:aiter",
    "aiter-standin": "accelerated.aiter_ops.backend:aiter_standin",
    "aiter-triton": "accelerated.aiter_ops.triton_backend:aiter_triton",
}

#: What a factory has to give: the driver-side half of the interface.
_ATTRIBUTES = ("name", "standin", "judged_by", "kernel_types", "support", "contract", "preflight", "open")


class BackendError(ValueError):
    """No such backend, or its factory fails. The message names the backend, the choices and the fix."""


def names() -> tuple[str, ...]:
    """Every backend name known here: built-in first, then those of entry points in alphabetical order."""
    installed = sorted(entry.name for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP))
    return (*_BUILT_IN, *dict.fromkeys(name for name in installed if name not in _BUILT_IN))


def backend(name: str, arch: str = "gfx942") -> Backend:
    """Construct a backend.

    Args:
        name: one of :func:`names`, ``package.module:factory``, or two of these as ``a+b``: whole layers with a's
            dispatch and combine and b's experts.
        arch: gfx architecture whose contract is to be declared; given to factories that take ``arch``.

    Raises:
        BackendError: unknown name, a factory that cannot be imported or fails, a result that is no backend, or two
            backends of which the first has no kernel types or the second no experts.
    """
    if JOIN in name and not _taken(name):
        return cast("Backend", _layer(name, arch))
    try:
        made = _make(_factory(name), arch)
    except BackendError:
        raise
    except Exception as error:
        raise BackendError(
            f"backend {name!r} cannot be constructed: {type(error).__name__}: {error}; fix its factory"
        ) from error
    missing = [attribute for attribute in _ATTRIBUTES if not hasattr(made, attribute)]
    if missing:
        raise BackendError(
            f"backend {name!r} lacks {', '.join(missing)}; its factory must return an accelerated.interface.Backend"
        )
    return cast("Backend", made)


def _taken(name: str) -> bool:
    """Whether a name with a plus sign is a single backend's: an entry point's."""
    return name in _BUILT_IN or bool(list(importlib.metadata.entry_points(group=ENTRY_POINT_GROUP, name=name)))


def _layer(name: str, arch: str) -> LayerBackend:
    """Both halves of ``a+b``, made one."""
    halves = name.split(JOIN)
    if len(halves) != 2 or not all(halves):
        raise BackendError(
            f"backend {name!r}: a layer has two halves; write <dispatch backend>{JOIN}<experts backend>, e.g. "
            f"mori{JOIN}aiter"
        )
    try:
        dispatch, experts = backend(halves[0], arch), backend(halves[1], arch)
    except BackendError as error:
        raise BackendError(f"{error} (a half of {name!r})") from error
    if not dispatch.kernel_types:
        raise BackendError(
            f"backend {name!r}: {halves[0]} has no dispatch and combine; put a backend that has before +"
        )
    if not operators_of(experts).get(Family.EXPERTS.value):
        raise BackendError(f"backend {name!r}: {halves[1]} has no experts; put a backend that has after +")
    return LayerBackend(dispatch, experts)


def _factory(name: str) -> Callable[..., object]:
    if name in _BUILT_IN:
        return _load(name, _BUILT_IN[name])
    found = list(importlib.metadata.entry_points(group=ENTRY_POINT_GROUP, name=name))
    if len({entry.value for entry in found}) > 1:
        raise BackendError(
            f"backend {name!r} is offered by {' and '.join(entry.value for entry in found)}; name one as module:factory"
        )
    if found:
        return _load(name, found[0].value)
    if ":" in name:
        return _load(name, name)
    raise BackendError(f"unknown backend {name!r}; choose one of {', '.join(names())}, or give package.module:factory")


def _load(name: str, target: str) -> Callable[..., object]:
    module, _, path = target.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for attribute in path.split("."):
            found = getattr(found, attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise BackendError(
            f"backend {name!r}: cannot import {target!r} ({type(error).__name__}: {error}); "
            f"write package.module:factory of something importable, or choose one of {', '.join(names())}"
        ) from error
    if not callable(found):
        raise BackendError(f"backend {name!r}: {target!r} is not callable; name a factory or a class")
    return cast("Callable[..., object]", found)


def _make(factory: Callable[..., object], arch: str) -> object:
    """Call a factory, with the architecture if it takes it by name."""
    try:
        parameters = inspect.signature(factory).parameters
    except ValueError:
        # Some compiled callables have no signature.
        return factory()
    takes_arch = "arch" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return factory(arch=arch) if takes_arch else factory()
