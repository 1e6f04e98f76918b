"""Backend ``aiter-triton`` without AITER: preflight, loading from a named tree, contracts, and what is refused.

Scope: trees made of a few empty files. A pass proves nothing about AITER; ``test_aiter_triton_real.py`` runs it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from accelerated import registry
from accelerated.aiter_ops import triton_contract, triton_library
from accelerated.aiter_ops.triton_backend import AiterTritonBackend, aiter_triton
from accelerated.aiter_ops.triton_library import PRELOAD, SOURCE, LibraryError
from accelerated.contract import ContractError, Standing
from accelerated.operators import Family, NormContract, QuantContract, RowProblem
from conformance.selftest.suite.runs import ROOT
from reference.codecs import Granularity, ScaleLayout
from reference.formats import E2M1, E4M3FN, E4M3FNUZ
from reference.norm_numerics import NormInput

#: A tree that imports: what load() takes from it, and the architectures it reports.
TREE = {
    "aiter/__init__.py": "class dtypes: fp8 = 'fp8'\nclass QuantType: per_1x128 = 4\n",
    "aiter/ops/__init__.py": "",
    "aiter/ops/quant.py": "",
    "aiter/ops/triton/__init__.py": "",
    "aiter/ops/triton/quant/__init__.py": "",
    "aiter/ops/triton/quant/quant.py": "",
    "aiter/ops/triton/normalization/__init__.py": "",
    "aiter/ops/triton/normalization/rmsnorm.py": "",
    "aiter/ops/triton/normalization/fused_add_rmsnorm_pad.py": "fused_add_rmsnorm_pad = None\n",
    "aiter/ops/triton/normalization/fused_rmsnorm_add.py": "fused_rmsnorm_add = None\n",
    "aiter/ops/triton/utils/_triton/arch_info.py": "def get_arch(): return 'gfx942'\n",
    "aiter/ops/triton/_triton_kernels/quant/quant.py": "_dynamic_per_token_quant_fp8_i8_kernel = None\n",
    "aiter/utility/__init__.py": "",
    "aiter/utility/fp4_utils.py": "",
    "aiter/jit/utils/chip_info.py": "def get_gfx_runtime(): return 'gfx942'\n",
}
INTERPRETED = "class InterpretedFunction: ...\n_dynamic_per_token_quant_fp8_i8_kernel = InterpretedFunction()\n"
BOTH = tuple(triton_contract.FP8)


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No AITER named or loaded, before and after."""
    for variable in (SOURCE, PRELOAD, "TRITON_INTERPRET"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(triton_library, "NEEDED", ())
    kept = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "aiter"}
    for name in kept:
        del sys.modules[name]
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] in ("aiter", "shim_of_a_test")]:
        del sys.modules[name]
    sys.modules.update(kept)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree that loads, named by the environment, with a module to preload; beside that lies another ``aiter``."""
    root, beside = tmp_path / "tree", tmp_path / "beside"
    for name, text in TREE.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (beside / "aiter").mkdir(parents=True)
    (beside / "aiter/__init__.py").write_text("raise SystemExit('the wrong aiter')\n")
    (beside / "shim_of_a_test.py").write_text("import sys\nassert 'aiter' not in sys.modules\n")
    monkeypatch.syspath_prepend(beside)
    monkeypatch.setenv(SOURCE, str(root))
    monkeypatch.setenv(PRELOAD, "shim_of_a_test")
    return root


# ------------------------------------------------------------------------------------------------------ preflight
def test_nothing_named() -> None:
    source, preload = aiter_triton("gfx942").preflight("cpu")
    assert SOURCE in source.what
    assert "root of a ROCm AITER source tree" in source.remedy
    assert PRELOAD in preload.what
    assert "--device cuda" in preload.remedy


def test_a_whole_tree_has_no_findings_and_is_not_imported(tree: Path) -> None:
    assert aiter_triton("gfx942").preflight("cpu") == []
    assert not {"aiter", "shim_of_a_test"} & set(sys.modules)


@pytest.mark.parametrize(
    ("below", "what", "remedy"),
    [
        ("absent", "is no directory", "root of a ROCm AITER"),
        ("aiter", "is the package itself", "{root}"),
        ("aiter/ops", "is not ROCm's AITER: it lacks aiter/__init__.py", "root of a ROCm AITER"),
    ],
)
def test_a_wrong_directory(tree: Path, monkeypatch: pytest.MonkeyPatch, below: str, what: str, remedy: str) -> None:
    monkeypatch.setenv(SOURCE, str(tree / below))
    (finding,) = aiter_triton("gfx942").preflight("cpu")
    assert str(tree / below) in finding.what
    assert what in finding.what
    assert remedy.format(root=tree) in finding.remedy
    with pytest.raises(LibraryError, match=what):
        triton_library.load("gfx942")


def test_the_unrelated_aiter_of_pypi(tree: Path) -> None:
    (tree / "aiter/ops/triton/quant/quant.py").unlink()
    (finding,) = aiter_triton("gfx942").preflight("cpu")
    assert "lacks aiter/ops/triton/quant/quant.py" in finding.what


@pytest.mark.parametrize("preload", ["no_such_module_of_a_test", "no/module", "shim_of_a_test.py:x"])
def test_a_preload_that_is_not_found(tree: Path, monkeypatch: pytest.MonkeyPatch, preload: str) -> None:
    monkeypatch.setenv(PRELOAD, preload)
    (finding,) = aiter_triton("gfx942").preflight("cpu")
    assert preload in finding.what
    assert "PYTHONPATH" in finding.remedy


def test_a_package_that_is_missing(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_library, "NEEDED", ("no_such_module_of_a_test",))
    (finding,) = aiter_triton("gfx942").preflight("cpu")
    assert finding.remedy == "install no_such_module_of_a_test"


def test_a_gpu_needs_no_preload_but_a_rocm_torch(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PRELOAD)
    for rocm, findings in ((True, 0), (None, 0), (False, 1)):
        monkeypatch.setattr("accelerated.mori_ep.backend.torch_is_rocm", lambda rocm=rocm: rocm)
        assert len(aiter_triton("gfx942").preflight("cuda:0")) == findings


# ---------------------------------------------------------------------------------------------------------- loading
def test_loading(tree: Path) -> None:
    loaded = triton_library.load("gfx942")
    assert (loaded.origin, loaded.arch, loaded.fp8) == (str(tree / "aiter"), "gfx942", "fp8")
    assert not loaded.interpreted


@pytest.mark.parametrize(
    ("file", "place"),
    [
        ("aiter/ops/triton/utils/_triton/arch_info.py", "Triton's target"),
        ("aiter/jit/utils/chip_info.py", "rocminfo"),
    ],
)
def test_another_architecture_in_either_place(tree: Path, file: str, place: str) -> None:
    (tree / file).write_text((tree / file).read_text().replace("gfx942", "gfx950"))
    with pytest.raises(LibraryError, match=rf"reports .*gfx950 \({place}\).* declared for gfx942; give --arch"):
        triton_library.load("gfx942")


def test_a_tree_that_does_not_import(tree: Path) -> None:
    (tree / "aiter/__init__.py").write_text("raise RuntimeError('ROCm version file not found')\n")
    with pytest.raises(LibraryError, match=rf"aiter failed with RuntimeError: ROCm version.*{PRELOAD}") as caught:
        triton_library.load("gfx942")
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_another_aiter_is_loaded_already(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tree.parent / "beside"
    (other / "aiter/__init__.py").write_text("")
    __import__("aiter")
    monkeypatch.delenv(PRELOAD)
    with pytest.raises(LibraryError, match=rf"loaded from {other / 'aiter'}, not from {SOURCE}"):
        triton_library.load("gfx942")


def test_interpreted_kernels_are_never_silent(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = aiter_triton("gfx942")
    (tree / "aiter/ops/triton/_triton_kernels/quant/quant.py").write_text(INTERPRETED)
    assert "no AMD hardware was tested" in backend.caveat
    assert triton_library.load("gfx942").interpreted
    monkeypatch.delenv(PRELOAD)
    assert backend.caveat == ""
    with pytest.raises(LibraryError, match="interprets AITER's kernels"):
        triton_library.load("gfx942")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.caveat


# -------------------------------------------------------------------------------------------------------- contracts
def problem(name: str, hidden: int = 128, dtype: str = "bfloat16") -> RowProblem:
    return RowProblem(triton_contract.OPERATORS[name].family, 1, hidden, 64, dtype)


@pytest.mark.parametrize("arch", BOTH)
@pytest.mark.parametrize("name", triton_contract.OPERATORS)
def test_every_contract_is_constructible(name: str, arch: str) -> None:
    backend = aiter_triton(f"{arch}:sramecc+:xnack-")
    operator = triton_contract.OPERATORS[name]
    if operator.only not in ("", arch):
        assert backend.support(problem(name), name).standing is Standing.REFUSED
        return
    declared = backend.contract(problem(name), name)
    wanted = QuantContract if operator.family is Family.QUANTISE else NormContract
    assert isinstance(declared, wanted)
    if declared.codec is not None:
        fixed = {"triton.mxfp8": E4M3FN, "triton.rms_mxfp8": E4M3FN}
        payload = E2M1 if "fp4" in name else fixed.get(name, triton_contract.FP8[arch])
        assert (declared.codec.payload, declared.codec.maximum) == (payload, payload.max)
    assert name in backend.operators[operator.family.value]


def test_what_tells_the_operators_apart() -> None:
    def codec(name: str) -> object:
        declared = aiter_triton("gfx942").contract(problem(name), name)
        assert isinstance(declared, QuantContract | NormContract)
        return declared.codec

    layouts = {
        "triton.mxfp4": ScaleLayout.COLUMN_MAJOR,
        "triton.per_1x32_fp4": ScaleLayout.ROW_MAJOR,
        "triton.per_1x32_fp4_shuffled": ScaleLayout.SWIZZLED,
        "triton.rms_fp8_group_quant_transposed": ScaleLayout.TRANSPOSED_BYTES,
        "triton.rms_fp8_group_quant_strided": ScaleLayout.COLUMN_MAJOR,
    }
    assert {name: getattr(codec(name), "scale_layout", None) for name in layouts} == layouts
    assert getattr(codec("triton.mxfp8_fnuz"), "payload", None) is E4M3FNUZ
    assert getattr(codec("triton.rmsnorm_dynamicquant"), "granularity", None) is Granularity.TOKEN
    inputs = {name: operator.numerics.norm_input for name, operator in triton_contract.OPERATORS.items()}
    rounded = {name for name, found in inputs.items() if found is NormInput.ROUNDED}
    assert rounded == {"triton.rmsnorm_add", "triton.rmsnorm_add_dynamicquant"}


@pytest.mark.parametrize(
    ("name", "hidden", "arch", "reason"),
    [
        ("triton.nothing", 128, "gfx942", "no Triton operator"),
        ("triton.per_token", 128, "gfx90a", "no FP8 type is declared for gfx90a"),
        ("triton.per_1x128", 192, "gfx942", "multiples of 128"),
        ("triton.mxfp8", 48, "gfx942", "multiples of 32"),
        ("triton.mxfp4", 6, "gfx950", "multiples of 4"),
        ("triton.mxfp8_fnuz", 128, "gfx950", "is for gfx942, not gfx950"),
        ("triton.per_token", (1 << 20) + 1, "gfx942", "at most 1048576"),
        ("triton.rms_norm", 128, "gfx942", "of family norm, not quantise"),
    ],
)
def test_what_is_refused(name: str, hidden: int, arch: str, reason: str) -> None:
    asked = RowProblem(Family.QUANTISE, 1, hidden, 8)
    backend = aiter_triton(arch)
    support = backend.support(asked, name)
    assert support.standing is Standing.REFUSED
    assert reason in support.reason
    with pytest.raises(ContractError, match=reason):
        backend.contract(asked, name)


@pytest.mark.parametrize(
    ("name", "dtype", "arch", "reason"),
    [
        ("triton.mxfp4", "float32", "gfx942", "with bfloat16 only"),
        ("triton.rms_mxfp4", "bfloat16", "gfx942", "on gfx950 only"),
        ("triton.mxfp8_fnuz", "bfloat16", "gfx942", "upstream tests FN only"),
        ("triton.rmsnorm_dynamicquant", "bfloat16", "gfx950", "int8"),
        ("triton.rms_norm", "float32", "gfx950", ""),
    ],
)
def test_what_upstream_claims(name: str, dtype: str, arch: str, reason: str) -> None:
    support = aiter_triton(arch).support(problem(name, dtype=dtype), name)
    assert support.standing is (Standing.UNCLAIMED if reason else Standing.CLAIMED)
    assert reason in support.reason


@pytest.mark.parametrize(
    ("hidden", "dtype", "additions"),
    [(1, "bfloat16", 24), (1024, "bfloat16", 24), (7168, "bfloat16", 136), (40000, "bfloat16", 521)],
)
def test_additions_of_a_mean_square(hidden: int, dtype: str, additions: int) -> None:
    assert triton_contract.square_additions(RowProblem(Family.NORM, 1, hidden, 8, dtype)) == additions


def test_the_registry_finds_it_without_torch() -> None:
    made = registry.backend("aiter-triton", "gfx950")
    assert isinstance(made, AiterTritonBackend)
    assert (made.name, made.standin, made.judged_by, tuple(made.kernel_types)) == (
        "aiter-triton",
        False,
        "reference",
        (),
    )
    script = (
        "import sys\nfrom accelerated.registry import backend\n"
        "made = backend('aiter-triton', 'gfx942')\nassert made.preflight('cpu')\n"
        "from accelerated.aiter_ops.triton_contract import OPERATORS\n"
        "from accelerated.operators import RowProblem\n"
        "[made.contract(RowProblem(o.family, 1, 128, 8), n) for n, o in OPERATORS.items()]\n"
        "assert not {'torch', 'triton', 'aiter'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
