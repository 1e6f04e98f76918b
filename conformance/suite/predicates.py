"""Predicates over fields: what a file of the user may ask of a cell, a case or a run, and whether it holds.

A table ``{field = wanted}`` holds if every field has a wanted value: a string (with ``*`` and ``?``), a whole number,
a truth value, ``{ min = a, max = b }``, or a list of which one is enough. A field of several values has a wanted one if
any of them is. A subject without the field never matches. What parsing does not prove: that anything matches.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

Scalar = str | int | bool
_NAMES = {str: "a string", int: "a whole number", bool: "true or false"}


class PredicateError(ValueError):
    """A table asks for what there is not. The message names the field, the value, the limit and the fix."""


@dataclass(frozen=True)
class Field:
    """What a field holds: ``str``, ``int`` or ``bool``, and the values there are if they are few.

    ``exact``: a wanted value is one of the choices, not a pattern that some of them match.
    """

    kind: type
    choices: tuple[str, ...] = ()
    exact: bool = False


@dataclass(frozen=True)
class Range:
    """Whole numbers from ``low`` to ``high``, both included; None is no limit."""

    low: int | None
    high: int | None

    def __contains__(self, value: int) -> bool:
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)


@dataclass(frozen=True)
class Condition:
    """One field and what is wanted of it."""

    field: str
    wanted: tuple[Scalar | Range, ...]

    def holds(self, value: object) -> bool:
        """Whether a value, or one of several, is wanted."""
        values = value if isinstance(value, tuple | list | frozenset | set) else (value,)
        return any(_is(one, wanted) for one in values for wanted in self.wanted)


def _is(value: object, wanted: Scalar | Range) -> bool:
    if isinstance(wanted, Range):
        return isinstance(value, int) and not isinstance(value, bool) and value in wanted
    if isinstance(wanted, str):
        return isinstance(value, str) and fnmatchcase(str(value), wanted)
    return value == wanted  # of the field's own type, which parsing saw to


@dataclass(frozen=True)
class Predicate:
    """Conditions of which all must hold; without any it holds always."""

    conditions: tuple[Condition, ...] = ()

    def holds(self, look: Callable[[str], object]) -> bool:
        """Whether it holds of a subject; ``look`` gives the value of a field, None where it has none."""
        return all((value := look(c.field)) is not None and c.holds(value) for c in self.conditions)

    def without(self, fields: Sequence[str]) -> Predicate:
        """The same, but for these fields."""
        return Predicate(tuple(c for c in self.conditions if c.field not in fields))

    def only(self, field: str) -> Predicate:
        """What is asked of one field."""
        return Predicate(tuple(c for c in self.conditions if c.field == field))


ANYTHING = Predicate()


def parse(table: object, fields: Mapping[str, Field], where: str) -> Predicate:
    """A predicate from a table of a TOML file.

    Args:
        table: field to what is wanted.
        fields: fields there are.
        where: what the table is called in messages.

    Raises:
        PredicateError: not a table, an unknown field, or a value that the field cannot have.
    """
    if not isinstance(table, dict):
        raise PredicateError(f"{where} is {table!r}; give a table, such as {{ {next(iter(fields))} = ... }}")
    return Predicate(tuple(_condition(name, wanted, fields, where) for name, wanted in table.items()))


def known(name: str, names: Sequence[str], where: str) -> None:
    """Refuse a name that is none of ``names``.

    Raises:
        PredicateError: with the nearest ones first.
    """
    if name in names:
        return
    near = difflib.get_close_matches(name, names, 3)
    rest = f", or another of {', '.join(sorted(names))}" if near else f"choose one of {', '.join(sorted(names))}"
    advice = f"did you mean {' or '.join(repr(n) for n in near)}{rest}" if near else rest
    raise PredicateError(f"{where} {name!r} is unknown; {advice}")


def _condition(name: str, wanted: Any, fields: Mapping[str, Field], where: str) -> Condition:
    known(name, tuple(fields), f"{where} field")
    field, place = fields[name], f"{where}.{name}"
    entries = wanted if isinstance(wanted, list) else [wanted]
    if not entries:
        raise PredicateError(f"{place} is an empty list, which nothing matches; give a value or leave the field out")
    return Condition(name, tuple(_wanted(entry, field, place) for entry in entries))


def _wanted(entry: Any, field: Field, place: str) -> Scalar | Range:
    if isinstance(entry, dict):
        return _range(entry, field, place)
    if not isinstance(entry, str | int) or type(entry) is not field.kind:
        more = ", or { min = ..., max = ... }" if field.kind is int else ""
        raise PredicateError(f"{place} is {entry!r}; give {_NAMES[field.kind]}, a list of them{more}")
    fits = entry in field.choices or (not field.exact and any(fnmatchcase(c, str(entry)) for c in field.choices))
    if field.choices and not fits:
        raise PredicateError(f"{place} is {entry!r}; choose one of {', '.join(sorted(field.choices))}")
    return entry


def _range(entry: dict[str, Any], field: Field, place: str) -> Range:
    if field.kind is not int:
        raise PredicateError(f"{place} is {entry!r}, a range; give {_NAMES[field.kind]}, a list of them")
    unknown = sorted(set(entry) - {"min", "max"})
    if unknown or not entry or any(type(limit) is not int for limit in entry.values()):
        raise PredicateError(f"{place} is {entry!r}; give whole numbers as {{ min = ..., max = ... }}, or one of both")
    made = Range(entry.get("min"), entry.get("max"))
    if made.low is not None and made.high is not None and made.low > made.high:
        raise PredicateError(f"{place} has min {made.low} above max {made.high}, which nothing matches; swap them")
    return made
