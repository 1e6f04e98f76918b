"""Probes look at what the library's loader gives them: a package called mori is looked at by its public interface.

Scope: a package in the genuine layout that answers as the double does, with as few names as the genuine one has. A
pass does not prove that the genuine one answers so.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from accelerated.mori_ep.library import EXTENSION
from accelerated.standin.mori_ep.hazards import VARIABLE
from conformance.selftest.suite.runs import ROOT

#: What mori.ops of MoRI 624002c8 offers (python/mori/ops/__init__.py); the rest is in the module below it. Its operator
#: differs from the double's in one thing, whatever is switched on: reset() resets.
_OFFERED = ("EpDispatchCombineConfig", "EpDispatchCombineKernelType", "EpDispatchCombineOp")
_DOUBLE = "accelerated.standin.mori_ep"
FILES = {
    "__init__.py": "__version__ = '0'\n",
    "ops/__init__.py": f"from mori.ops.dispatch_combine import {', '.join(_OFFERED)}\n",
    "ops/dispatch_combine.py": (
        f"from {_DOUBLE}.ops import *\n"
        f"from {_DOUBLE} import ops\n"
        "class EpDispatchCombineOp(ops.EpDispatchCombineOp):\n"
        "    def reset(self):\n"
        "        self._buffers.total.zero_()\n"
    ),
    "shmem/__init__.py": f"from {_DOUBLE}.shmem import shmem_finalize, shmem_torch_process_group_init\n",
    "jit/__init__.py": "",
    "jit/config.py": f"from {_DOUBLE}.jit_config import detect_gpu_arch\n",
    EXTENSION: "",
}
#: Two that are switched on, one that is and that this library has not, and one that is off.
ON = ("quant-members-refused", "handle-without-tokens")
OFF = ("reset-does-nothing", "async-weights-unwritten")


def look(backend: str, path: Path, switches: str) -> str:
    """What :mod:`.look` prints, with ``path`` first on the search path."""
    command = [sys.executable, "-m", "conformance.selftest.hazards.look", backend, *ON, *OFF]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(path), str(ROOT))), VARIABLE: switches}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_loaders_library_is_looked_at(tmp_path: Path) -> None:
    for name, text in FILES.items():
        (tmp_path / "mori" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mori" / name).write_text(text)
    said = [line.split()[:2] for line in look("mori", tmp_path, ",".join((*ON, OFF[0]))).splitlines()]
    assert said == [*([name, "PRESENT"] for name in ON), *([name, "ABSENT"] for name in OFF)]


def test_no_probe_names_the_double() -> None:
    for path in (ROOT / "conformance" / "hazards").rglob("*.py"):
        assert "standin.mori_ep" not in path.read_text(encoding="utf-8"), path
