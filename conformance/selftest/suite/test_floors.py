"""Floors: an import goes down, never up; the driver's half needs no torch; nothing of ours shadows a library.

Scope: the source as it is written, plus one process that imports the driver's half. A pass does not prove that a lower
floor knows nothing of a higher one by other means.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conformance.selftest.suite.runs import ROOT

FLOORS = ("reference", "accelerated", "conformance", "ci")
FILES = sorted(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py") if "__pycache__" not in path.parts)
MAX_LINES = 420
#: What a floor may import besides the standard library: a trailing dot allows everything below, too.
ALLOWED = {
    "reference": ("reference", "torch"),
    "accelerated": ("accelerated", "reference", "torch"),
    "accelerated/standin": ("accelerated.standin", "torch"),
    "conformance": (
        *("conformance", "accelerated", "reference", "torch"),
        *("numpy", "pytest", "_pytest", "xdist", "hypothesis", "msgspec", "rich", "safetensors", "ml_dtypes"),
    ),
    "ci": ("ci", "conformance", "fixtures", "msgspec", "rich", "pytest"),
}
#: Exceptions that a floor may not use although its list would let them through.
FORBIDDEN = {
    "accelerated/standin": ("reference",),
    "conformance": ("conformance.selftest", "ci"),
    "ci": ("conformance.rank", "conformance.engine.pool", "conformance.engine.driver", "torch", "accelerated.standin"),
}
#: Modules that run in the driver; the suite, the engine and the generation of cases with everything they load.
DRIVER_HALF = (
    *("conformance.conftest", "conformance.generation", "conformance.rank.main", "conformance.faults"),
    *("accelerated.registry", "accelerated.allgather", "accelerated.reference_backend", "accelerated.mori_ep.backend"),
    *(
        f"conformance.{part}.{path.stem}"
        for part in ("suite", "engine")
        for path in (ROOT / "conformance" / part).glob("*.py")
    ),
)


def imported(path: Path) -> Iterator[str]:
    """Absolute names of everything a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def below(name: str, roots: tuple[str, ...]) -> bool:
    return any(name == root or name.startswith(root + ".") for root in roots)


def floors_of(path: Path) -> list[str]:
    place = path.relative_to(ROOT).as_posix()
    return [floor for floor in ALLOWED if place.startswith(floor + "/")]


@pytest.mark.parametrize("floor", ALLOWED)
def test_imports_go_down(floor: str) -> None:
    wrong = []
    for path in FILES:
        selftest = "selftest" in path.parts
        if floor not in floors_of(path) or (selftest and floor != "conformance"):
            continue
        for name in imported(path):
            standard = name.partition(".")[0] in sys.stdlib_module_names
            forbidden = below(name, FORBIDDEN.get(floor, ())) and not selftest
            if forbidden or not (standard or below(name, ALLOWED[floor])):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert wrong == []


def test_every_floor_is_looked_at() -> None:
    seen = {floor for path in FILES for floor in floors_of(path)}
    assert {"reference", "accelerated", "accelerated/standin", "conformance"} <= seen


@pytest.mark.parametrize("module", ["conformance.conftest", "all"])
def test_the_drivers_half_imports_no_torch(module: str) -> None:
    names = [name.removesuffix(".__init__") for name in (DRIVER_HALF if module == "all" else (module,))]
    script = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, name\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *names], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_nothing_of_ours_is_called_like_a_library() -> None:
    places = {path for file in FILES for path in (file, *file.relative_to(ROOT).parents)}
    assert [p for p in places if p.stem in ("mori", "aiter", "torch", "vllm")] == []


def test_no_file_is_long() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {path: length for path, length in lengths.items() if length > MAX_LINES} == {}
