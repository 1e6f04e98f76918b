"""Table of what this package uses of MoRI: ``python -m accelerated.mori_ep.symbols [--source CHECKOUT] [--installed]``.

Scope: every name of the library that the package's code touches, every argument it gives, every result it takes,
environment variables, and the source lines that its texts cite. They are collected from the syntax trees
(:mod:`accelerated.mori_ep.uses`) and joined with ``fixtures/signatures/mori_symbols.json``, which says where in MoRI's
source each was verified, and with the recorded signatures in ``mori.json``. A use without a place, a place without a
use, and an argument that the signature has not are errors. With a checkout, every recorded line is looked up and has to
name what it is the place of; at another version that lists what moved. With ``--installed`` the installed library is
imported and its signatures are compared with the recorded ones.

What a complete table does not prove: that the library does with an argument what the note beside its place says.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerated.mori_ep.library import LibraryError, load_mori
from accelerated.mori_ep.uses import Use, collect
from accelerated.standin.manifest import differences

PACKAGE = Path(__file__).resolve().parent
FIXTURES = PACKAGE.parents[1] / "fixtures" / "signatures"
#: ``path:line`` in MoRI's repository, and the name to be found there if it is not the symbol's own.
_PLACE = re.compile(r"(\S+?):(\d+)(?: (\S+))?")


def load(name: str) -> dict[str, Any]:
    """Return a recorded file of ``fixtures/signatures``: ``"mori"`` or ``"mori_symbols"``.

    Raises:
        FileNotFoundError: no file of that name.
    """
    loaded: dict[str, Any] = json.loads((FIXTURES / f"{name}.json").read_text(encoding="utf-8"))
    return loaded


def sources(package: Path = PACKAGE) -> dict[str, str]:
    """Text of every module of the adapter by file name; the two that make this table are not part of it."""
    adapter = [path for path in sorted(package.glob("*.py")) if path.name not in ("symbols.py", "uses.py")]
    return {path.name: path.read_text(encoding="utf-8") for path in adapter}


def parameters(signatures: Mapping[str, Any], places: Mapping[str, Any]) -> dict[str, list[str]]:
    """Names of the parameters or fields of every callable, recorded signatures first."""
    known = {name: list(entry["parameters"]) for name, entry in places["symbols"].items() if "parameters" in entry}
    for name, entry in signatures["dataclasses"].items():
        known[name] = [field["name"] for field in entry["fields"]]
    for name, entry in signatures["functions"].items():
        known[name.removesuffix(".__init__")] = [parameter["name"] for parameter in entry["parameters"]]
    return known


def problems(uses: Sequence[Use], places: Mapping[str, Any], signatures: Mapping[str, Any]) -> list[str]:
    """What keeps the table from being complete, one line each; empty if nothing does."""
    found = list(_commits(places, signatures))
    known = parameters(signatures, places)
    used = {(use.symbol, use.detail) for use in uses}
    for use in uses:
        where = f"{use.symbol}{f' {use.detail}' if use.detail else ''}, used in {use.module}:{use.line}"
        if use.argument and use.detail not in known.get(use.symbol, [use.detail]):
            found.append(f"{where}: the signature has no such argument")
        elif use.symbol not in places["symbols"] or use.detail not in ("", *_details(places, use.symbol)):
            found.append(f"{where}: no place recorded")
    for symbol, entry in places["symbols"].items():
        details = _details(places, symbol)
        found.extend(
            f"{symbol}{f' {detail}' if detail else ''}: recorded, but not used"
            for detail in ("", *details)
            if (symbol, detail) not in used
        )
        found.extend(
            f"{symbol} {detail}: recorded, but not in the signature"
            for detail in entry.get("arguments", {})
            if detail not in known.get(symbol, [detail])
        )
        if not entry.get("attribute"):
            found.extend(_unsigned(symbol, signatures))
        found.extend(f"{symbol}: {text!r} is no place" for text in _all_places(entry) if not _PLACE.fullmatch(text))
    return list(dict.fromkeys(found))


def moved(places: Mapping[str, Any], checkout: Path) -> list[str]:
    """Recorded lines that do not name what they are the place of in a checkout of MoRI, one line each."""
    found = []
    for symbol, detail, text in _named_places(places):
        matched = _PLACE.fullmatch(text)
        if matched is None:
            continue
        path, line, token = checkout / matched[1], int(matched[2]), matched[3] or detail or _last(symbol)
        if not path.is_file():
            found.append(f"{symbol} {detail}: no file {matched[1]}")
            continue
        lines = path.read_text(encoding="utf-8").splitlines()
        word = re.compile(rf"(?<!\w){re.escape(token)}(?!\w)")
        if line > len(lines) or not word.search(lines[line - 1]):
            seen = [str(number) for number, content in enumerate(lines, 1) if word.search(content)] or ["nowhere"]
            found.append(f"{symbol} {detail}: {token} is not on {matched[1]}:{line} (it is on {', '.join(seen[:9])})")
    return found


def differing(signatures: Mapping[str, Any]) -> list[str]:
    """What differs between the recorded signatures and the installed MoRI, which is imported; one line each."""
    try:
        load_mori()
    except LibraryError as error:
        return [str(error)]
    names = {name.partition(":")[0] for part in ("functions", "dataclasses", "enums") for name in signatures[part]}
    found, modules = [], {}
    for name in sorted(names):
        try:
            modules[name] = importlib.import_module(name)
        except Exception as error:  # noqa: BLE001  whatever a build raises is what differs
            found.append(f"{name} does not import: {type(error).__name__}: {error}")
    return [f"installed: {line}" for line in found + differences(modules)]


def table(uses: Sequence[Use], places: Mapping[str, Any]) -> str:
    """Markdown: symbol or argument, where the package uses it, where it was verified, and what was found there."""
    rows: dict[tuple[str, str], list[str]] = {}
    for use in uses:
        where = rows.setdefault((use.symbol, use.detail), [])
        if (spot := f"{use.module}:{use.line}") not in where:
            where.append(spot)
    lines = [f"MoRI {places['commit'][:8]}, {places['repository']}", ""]
    lines += ["| symbol | used in | verified at | finding |", "|---|---|---|---|"]
    for (symbol, detail), where in sorted(rows.items()):
        entry = places["symbols"][symbol]
        place = entry if not detail else {**entry.get("arguments", {}), **entry.get("results", {})}[detail]
        name = f"`{symbol}`" if not detail else f"`{_last(symbol)}` `{detail}`"
        lines.append(f"| {name} | {', '.join(where)} | {', '.join(place['at'])} | {place['note']} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 if it is not complete, a line is not where it was recorded, or a signature differs."""
    parser = argparse.ArgumentParser(prog="python -m accelerated.mori_ep.symbols", description=__doc__)
    parser.add_argument("--source", type=Path, help="checkout of MoRI in which to look the recorded lines up")
    parser.add_argument("--installed", action="store_true", help="compare the installed MoRI's signatures")
    given = parser.parse_args(arguments)
    places, signatures = load("mori_symbols"), load("mori")
    uses = collect(sources(), parameters(signatures, places))
    found = problems(uses, places, signatures)
    if not found:
        print(table(uses, places))
        found = moved(places, given.source) if given.source else []
        found += differing(signatures) if given.installed else []
    for line in found:
        print(line, file=sys.stderr)
    return 1 if found else 0


def _details(places: Mapping[str, Any], symbol: str) -> list[str]:
    entry = places["symbols"][symbol]
    return [*entry.get("arguments", {}), *entry.get("results", {})]


def _commits(places: Mapping[str, Any], signatures: Mapping[str, Any]) -> Iterator[str]:
    if places["commit"] != signatures["commit"]:
        yield f"places are of {places['commit']}, signatures of {signatures['commit']}"


def _unsigned(symbol: str, signatures: Mapping[str, Any]) -> Iterator[str]:
    """A method of a class whose signatures are recorded has one."""
    names = {*signatures["functions"], *signatures["dataclasses"], *signatures["enums"]}
    owners = {name.rpartition(".")[0] for name in signatures["functions"] if "." in name.partition(":")[2]}
    if symbol.rpartition(".")[0] in owners and symbol not in names:
        yield f"{symbol}: no recorded signature"


def _all_places(entry: Mapping[str, Any]) -> Iterator[str]:
    yield from entry["at"]
    for section in ("arguments", "results"):
        for detail in entry.get(section, {}).values():
            yield from detail["at"]


def _named_places(places: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    for symbol, entry in places["symbols"].items():
        yield from ((symbol, "", text) for text in entry["at"])
        for section in ("arguments", "results"):
            for detail, inner in entry.get(section, {}).items():
                yield from ((symbol, detail, text) for text in inner["at"])


def _last(symbol: str) -> str:
    return re.split(r"[:./ ]", symbol)[-1]


if __name__ == "__main__":
    sys.exit(main())
