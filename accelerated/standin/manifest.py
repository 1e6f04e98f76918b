"""Comparing a module with the recorded signatures of the library that it doubles.

Scope: names, parameters, defaults, dataclass fields and enumeration members, read from the library's source at a named
commit. Equal signatures prove nothing about behaviour.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

_FOLDER = Path(__file__).resolve().parents[2] / "fixtures" / "signatures"
_ABSENT = object()


def load_manifest(library: str = "mori") -> dict[str, Any]:
    """Return the recorded manifest of ``library``.

    Raises:
        FileNotFoundError: no manifest of that name.
    """
    loaded: dict[str, Any] = json.loads((_FOLDER / f"{library}.json").read_text(encoding="utf-8"))
    return loaded


def differences(modules: Mapping[str, ModuleType], library: str = "mori") -> list[str]:
    """List what differs from the manifest, one line each; empty when everything agrees.

    Args:
        modules: module per name used in the manifest (e.g. ``"mori.ops"``), genuine or doubled.
        library: name of the manifest.
    """
    manifest = load_manifest(library)
    found: list[str] = []
    for section, compare in (("functions", _function), ("dataclasses", _dataclass), ("enums", _enum)):
        for name, recorded in manifest[section].items():
            target = _resolve(modules, name)
            if target is _ABSENT:
                found.append(f"{name}: missing")
                continue
            try:
                found.extend(f"{name}: {line}" for line in compare(target, recorded))
            except (TypeError, ValueError) as error:
                found.append(f"{name}: is no longer one of the {section} ({error})")
    return found


def _resolve(modules: Mapping[str, ModuleType], name: str) -> Any:
    module, _, path = name.partition(":")
    target: Any = modules.get(module, _ABSENT)
    for part in path.split("."):
        target = getattr(target, part, _ABSENT)
    return target


def _function(target: Any, recorded: dict[str, Any]) -> Iterator[str]:
    actual = [p for p in inspect.signature(target).parameters.values() if p.name != "self"]
    yield from _order([p.name for p in actual], [p["name"] for p in recorded["parameters"]], "parameters")
    by_name = {p.name: p for p in actual}
    for wanted in recorded["parameters"]:
        parameter = by_name.get(wanted["name"])
        if parameter is None:
            continue
        if parameter.kind.name != wanted["kind"]:
            yield f"parameter {wanted['name']} is {parameter.kind.name}, recorded {wanted['kind']}"
        default = _ABSENT if parameter.default is inspect.Parameter.empty else parameter.default
        yield from _default(wanted, default)


def _dataclass(target: Any, recorded: dict[str, Any]) -> Iterator[str]:
    actual = dataclasses.fields(target)
    yield from _order([f.name for f in actual], [f["name"] for f in recorded["fields"]], "fields")
    by_name = {f.name: f for f in actual}
    for wanted in recorded["fields"]:
        field = by_name.get(wanted["name"])
        if field is not None:
            yield from _default(wanted, _ABSENT if field.default is dataclasses.MISSING else field.default)


def _enum(target: Any, recorded: dict[str, Any]) -> Iterator[str]:
    for name, value in recorded["members"].items():
        member = getattr(target, name, None)
        if member is None:
            yield f"member {name} is missing"
            continue
        actual = member.value if isinstance(value, str) else int(member.value)
        if (member.name, actual) != (name, value):
            yield f"member {name} is {member.name} = {actual}, recorded {value}"


def _order(actual: list[str], recorded: list[str], what: str) -> Iterator[str]:
    if actual != recorded:
        yield f"{what} are {actual}, recorded {recorded}"


def _default(wanted: dict[str, Any], actual: Any) -> Iterator[str]:
    recorded = wanted.get("default", _ABSENT)
    if isinstance(recorded, dict) and "dtype" in recorded:
        recorded, actual = recorded["dtype"], actual if actual is _ABSENT else str(actual)
    elif isinstance(recorded, dict):  # a member of an enumeration
        recorded, actual = recorded["member"], getattr(actual, "name", actual)
    elif isinstance(recorded, list):  # a tuple, which JSON has not
        recorded = tuple(recorded)
    if recorded is _ABSENT and actual is _ABSENT:
        return
    if _ABSENT in (recorded, actual) or (type(recorded), recorded) != (type(actual), actual):
        shown = ["none" if value is _ABSENT else repr(value) for value in (actual, recorded)]
        yield f"default of {wanted['name']} is {shown[0]}, recorded {shown[1]}"
