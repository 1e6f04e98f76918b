"""Telling the genuine MoRI from a missing, broken or unrelated one. A pass does not prove that a library works."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from accelerated.mori_ep import backend, library
from accelerated.mori_ep.library import LibraryError, load_mori, probe_mori

GENUINE = {
    "__init__.py": "__version__ = '1.2.2'\n",
    "ops/__init__.py": "class EpDispatchCombineOp: ...\n",
    "shmem/__init__.py": "def shmem_torch_process_group_init(name): return 0\n",
    "jit/__init__.py": "",
    "jit/config.py": "def detect_gpu_arch(): return 'gfx942'\n",
    library.EXTENSION: "",
}

GENUINE_KEYS = {"top": "__init__.py", "ops": "ops/__init__.py", "shmem": "shmem/__init__.py", "so": library.EXTENSION}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory that comes first on sys.path, with no mori imported and none installed elsewhere."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "mori"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(library, "_version", lambda distribution: None)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "mori"]:
        del sys.modules[name]


def package(place: Path, **changes: str | None) -> Path:
    """Write the genuine layout with some files (keys of GENUINE_KEYS) changed or, given None, left out."""
    files: dict[str, str | None] = {**GENUINE, **{GENUINE_KEYS[key]: text for key, text in changes.items()}}
    for name, text in files.items():
        if text is not None:
            (place / "mori" / name).parent.mkdir(parents=True, exist_ok=True)
            (place / "mori" / name).write_text(text)
    importlib.invalidate_caches()
    return place / "mori"


def test_a_genuine_package_loads_and_has_no_findings(place: Path) -> None:
    directory = package(place)
    assert probe_mori() == []
    assert "mori" not in sys.modules, "the probe imports nothing"
    loaded = load_mori()
    assert (loaded.version, loaded.origin, loaded.detect_gpu_arch()) == ("1.2.2", str(directory), "gfx942")


@pytest.mark.skipif(importlib.util.find_spec("mori") is not None, reason="a real mori is installed")
def test_missing(place: Path) -> None:
    (finding,) = probe_mori()
    assert "not installed" in finding.what
    assert "amd_mori" in finding.remedy
    with pytest.raises(LibraryError, match="mori is missing"):
        load_mori()


def test_not_built(place: Path) -> None:
    directory = package(place, so=None, ops="raise ImportError('libmori_pybinds.so: cannot open')\n")
    (finding,) = probe_mori()
    assert str(directory) in finding.what
    assert "libmori_pybinds.so" in finding.what
    with pytest.raises(LibraryError, match=r"mori is broken: .*cannot open") as caught:
        load_mori()
    assert isinstance(caught.value.__cause__, ImportError), "the original traceback is chained"


def test_broken_by_anything_but_an_import_error(place: Path) -> None:
    package(place, shmem="raise OSError('libibverbs.so.1')\n")
    assert probe_mori() == []
    with pytest.raises(LibraryError, match=r"OSError: libibverbs.so.1.*reinstall") as caught:
        load_mori()
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize("kind", ["package", "module", "directory"])
def test_unrelated_package_of_that_name(place: Path, kind: str) -> None:
    (place / "mori").mkdir()
    found_at = place / "mori"
    if kind == "package":
        (found_at / "__init__.py").write_text("raise SystemExit('must not be imported')\n")
    elif kind == "module":
        found_at.rmdir()
        found_at = place / "mori.py"
        found_at.write_text("raise SystemExit('must not be imported')\n")
    importlib.invalidate_caches()
    (finding,) = probe_mori()
    assert "unrelated" in finding.what
    assert str(found_at) in finding.what
    with pytest.raises(LibraryError, match="unrelated package") as caught:
        load_mori()
    assert str(found_at) in str(caught.value)


def test_right_layout_with_another_api_is_unrelated(place: Path) -> None:
    package(place, ops="")
    with pytest.raises(LibraryError, match="unrelated package"):
        load_mori()


def test_two_distributions_at_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(place)
    monkeypatch.setattr(library, "_version", lambda distribution: "1.2.2")
    (finding,) = probe_mori()
    assert "amd_mori and amd-mori-nightly are both installed" in finding.what


def test_preflight_wants_a_rocm_device_for_the_real_library_only(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(place)
    real, double = backend.mori("gfx942:sramecc+:xnack-"), backend.mori_standin("gfx942")
    assert double.preflight("cpu") == double.preflight("cuda") == []
    (finding,) = real.preflight("cpu")
    assert "not cpu" in finding.what
    assert "--device cuda" in finding.remedy
    for rocm, findings in ((True, 0), (None, 0), (False, 1)):
        monkeypatch.setattr(backend, "torch_is_rocm", lambda rocm=rocm: rocm)
        assert len(real.preflight("cuda:0")) == findings


def test_the_standin_is_never_a_fallback(place: Path) -> None:
    (place / "mori.py").write_text("")
    importlib.invalidate_caches()
    with pytest.raises(LibraryError):
        load_mori()
    double = library.load_standin()
    assert double.version == "stand-in"
    assert hasattr(double.ops, "EpDispatchCombineOp")
    assert "standin" in double.origin


@pytest.mark.parametrize(
    ("text", "builds", "rocm"),
    [
        (
            "hip: Optional[str] = '6.4.1'\nrocm: Optional[str] = '6.4'\ncuda = None\n",
            {"hip": "6.4.1", "cuda": ""},
            True,
        ),
        ("cuda: Optional[str] = '12.8'\nhip: Optional[str] = None\n", {"hip": "", "cuda": "12.8"}, False),
        ("", {}, None),
    ],
)
def test_what_torch_was_built_with(
    place: Path, monkeypatch: pytest.MonkeyPatch, text: str, builds: dict[str, str], rocm: bool | None
) -> None:
    (place / "version.py").write_text(text)
    spec = importlib.util.spec_from_loader("torch", None, origin=str(place / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert backend.torch_builds().items() >= builds.items()
    assert backend.torch_is_rocm() is rocm
