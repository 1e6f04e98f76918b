"""Backends by name. A pass does not prove that a backend runs, only that it is found and constructed without torch."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from accelerated import registry
from accelerated.contract import Standing
from accelerated.operators import operators_of
from accelerated.registry import BackendError, backend, names
from reference.problem import Problem

ROOT = Path(registry.__file__).resolve().parent.parent

FACTORIES = """
from accelerated.allgather import AllGatherBackend


class Mine(AllGatherBackend):
    name = "mine"

    def __init__(self, arch="none"):
        self.arch = arch


def plain():
    return Mine()


def broken():
    raise OSError("no device")


def nothing():
    return object()


number = 3
"""


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "third_party_backend.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "third_party_backend", raising=False)
    return "third_party_backend"


BUILT_IN = ("reference", "allgather", "replicated", "mori", "mori-standin", "aiter", "aiter-standin", "aiter-triton")


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_backends_are_named_after_themselves(name: str) -> None:
    made = backend(name)
    assert name in names()
    assert made.name == name
    assert made.standin == name.endswith("-standin")
    assert made.judged_by == ("oracle" if name == "reference" else "reference")
    assert list(made.kernel_types) or operators_of(made), "it offers something"
    for kernel_type in made.kernel_types:
        assert made.support(Problem(8, 64, 64, 4, 16), kernel_type).standing is not Standing.REFUSED, kernel_type


def test_the_driver_side_needs_neither_torch_nor_a_library() -> None:
    script = (
        "import sys\n"
        "from accelerated.registry import backend, names\n"
        "from reference.problem import Problem\n"
        "for name in names():\n"
        "    made = backend(name)\n"
        "    for kind in made.kernel_types:\n"
        "        made.support(Problem(2, 8, 4, 2, 4), kind), made.contract(Problem(2, 8, 4, 2, 4), kind)\n"
        "    made.preflight('cpu')\n"
        "print(sorted({'torch', 'mori', 'aiter', 'numpy'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_module_factory_gets_the_architecture_if_it_takes_it(third_party: str) -> None:
    made = backend(f"{third_party}:Mine", arch="gfx950")
    assert made.name == "mine"
    assert vars(made) == {"arch": "gfx950"}
    assert vars(backend(f"{third_party}:plain", arch="gfx950")) == {"arch": "none"}


def test_entry_points_add_names_but_never_replace_built_ins(third_party: str, monkeypatch: pytest.MonkeyPatch) -> None:
    offered = [EntryPoint(name, f"{third_party}:Mine", registry.ENTRY_POINT_GROUP) for name in ("mine", "allgather")]

    def entry_points(*, group: str, name: str | None = None) -> list[EntryPoint]:
        return [entry for entry in offered if entry.group == group and name in (None, entry.name)]

    monkeypatch.setattr("importlib.metadata.entry_points", entry_points)
    assert names() == (*BUILT_IN, "mine")
    assert backend("mine").name == "mine"
    assert backend("allgather").name == "allgather"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("deepep", "unknown backend 'deepep'; choose one of reference, allgather, replicated, mori, mori-standin"),
        ("no_such_module:factory", "cannot import 'no_such_module:factory'"),
        ("third_party_backend:absent", "cannot import 'third_party_backend:absent'"),
        ("third_party_backend:number", "is not callable"),
        ("third_party_backend:broken", "cannot be constructed: OSError: no device"),
        ("third_party_backend:nothing", "lacks name, standin"),
    ],
)
def test_errors_name_the_backend_and_the_fix(third_party: str, target: str, message: str) -> None:
    with pytest.raises(BackendError) as caught:
        backend(target)
    assert target in str(caught.value)
    assert message in str(caught.value)
