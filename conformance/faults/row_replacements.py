"""Faulty backends of row operators: the ordinary AITER adapter over a double of which functions are replaced.

Scope: construction, without torch until a session opens in a rank process. The replacement holds for the whole process,
which serves one backend and ends with its pool; never open such a backend in a process that does anything else. That a
faulty backend opens does not prove that its defect shows; the selftest does.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import replace as changed
from typing import Any

from accelerated.aiter_ops.backend import AiterBackend
from accelerated.aiter_ops.library import AiterLibrary, load_standin
from conformance.faults.backends import backend_name
from conformance.faults.row_catalogue import ROW_FAULTS

_ROOT = "accelerated.standin.aiter_ops"
#: Modules that hold the replacements; they import torch.
_MODULES = ("row_quantisers", "row_norms", "row_reductions", "row_routes")
_installed: list[str] = []


@dataclass(frozen=True)
class Replacement:
    """One function, method or constant of the double, and what it becomes.

    Attributes:
        place: ``module:name`` or ``module:Class.name`` in the double; a full path where the module is elsewhere.
        make: gives the new one from the genuine one.
    """

    place: str
    make: Callable[[Any], Any]

    def install(self) -> None:
        """Put the new one in the place of the genuine one, in this process."""
        module, _, path = self.place.partition(":")
        owner: Any = importlib.import_module(module if module.startswith("accelerated.") else f"{_ROOT}.{module}")
        *outer, name = path.split(".")
        for attribute in outer:
            owner = getattr(owner, attribute)
        setattr(owner, name, self.make(getattr(owner, name)))


def wrapped(place: str, wrapper: Callable[..., Any]) -> Replacement:
    """A function that gets the genuine one as its first argument."""

    def make(genuine: Callable[..., Any]) -> Callable[..., Any]:
        def call(*positional: Any, **named: Any) -> Any:
            return wrapper(genuine, *positional, **named)

        return call

    return Replacement(place, make)


def constant(place: str, value: object) -> Replacement:
    """Another value."""
    return Replacement(place, lambda _: value)


def faulty_rows(fault: str, arch: str) -> AiterBackend:
    """The stand-in backend with one seeded fault, under the name by which the registry finds it again."""
    return AiterBackend(backend_name(fault), standin=True, load=lambda: load(fault), arch=arch)


def everything() -> list[dict[str, tuple[Replacement, ...]]]:
    """What the faults of each module replace, by their names. Imports torch."""
    return [importlib.import_module(f"conformance.faults.{name}").REPLACED for name in _MODULES]


def replacements(fault: str) -> tuple[Replacement, ...]:
    """What a fault replaces. Imports torch."""
    for held in everything():
        if fault in held:
            return held[fault]
    raise KeyError(
        f"no module of {', '.join(_MODULES)} replaces anything for {fault!r}; known: {', '.join(ROW_FAULTS)}"
    )


def load(fault: str) -> AiterLibrary:
    """The double with a fault installed in this process.

    Raises:
        RuntimeError: another fault already is.
    """
    genuine = load_standin()
    if _installed and _installed != [fault]:
        raise RuntimeError(f"this process already has the fault {_installed[0]}; open {fault} in another one")
    if not _installed:
        _installed.append(fault)
        for one in replacements(fault):
            one.install()
    return changed(genuine, version=f"stand-in with the fault {fault}")
