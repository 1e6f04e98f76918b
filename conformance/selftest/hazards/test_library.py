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

#: What mori.ops of MoRI 624002c8 offers (python/mori/ops/__init__.py); the rest is in the module below it.
_OFFERED = ("EpDispatchCombineConfig", "EpDispatchCombineKernelType", "EpDispatchCombineOp")
_DOUBLE = "accelerated.standin.mori_ep"
#: An operator that differs from the double's in this, whatever is switched on: reset() resets, ids and rows in another
#: form are converted, and there is room for twice the tokens.
REPAIRED = """
from dataclasses import replace

class EpDispatchCombineOp(ops.EpDispatchCombineOp):
    def __init__(self, config):
        super().__init__(replace(config, max_num_inp_token_per_rank=2 * config.max_num_inp_token_per_rank))
    def reset(self):
        self._buffers.total.zero_()
    def dispatch(self, input, weights, scales, indices, *more, **options):
        return super().dispatch(input.contiguous(), weights, scales, indices.int(), *more, **options)
"""
#: One that refuses misuse by exceptions of all types, which the double takes without a word or dies of.
REFUSING = """
class EpDispatchCombineOp(ops.EpDispatchCombineOp):
    def __init__(self, config):
        assert 0 < config.rdma_block_num < 80 or config.gpu_per_node == config.world_size, "no blocks are left"
        if config.num_experts_per_token > 8:
            raise NotImplementedError("k > 8")
        super().__init__(config)
    def dispatch(self, input, weights, scales, indices, *more, warp_per_block=-1, **options):
        if weights is None and "V1" in self.config.kernel_type.name:
            raise TypeError("weights must be a tensor")
        if warp_per_block == 2:
            raise RuntimeError("3 warps a block at least")
        if (indices >= 8).any():
            raise IndexError("8 experts")
        if len(input) > self.config.max_num_inp_token_per_rank:
            raise OverflowError("too many tokens")
        return super().dispatch(input, weights, scales, indices, *more, warp_per_block=warp_per_block, **options)
    def combine(self, input, *arguments, **options):
        if not self.config.use_external_inp_buf:
            assert input.data_ptr() == self._buffers.registered.data_ptr(), "not the registered buffer"
        return super().combine(input, *arguments, **options)
"""
FILES = {
    "__init__.py": "__version__ = '0'\n",
    "ops/__init__.py": f"from mori.ops.dispatch_combine import {', '.join(_OFFERED)}\n",
    "ops/dispatch_combine.py": (f"from {_DOUBLE}.ops import *\nfrom {_DOUBLE} import ops\n"),
    "shmem/__init__.py": f"from {_DOUBLE}.shmem import shmem_finalize, shmem_torch_process_group_init\n",
    "jit/__init__.py": "",
    "jit/config.py": f"from {_DOUBLE}.jit_config import detect_gpu_arch\n",
    EXTENSION: "",
}
#: Two that are switched on, and what is on and not in the library that is repaired, and one that is off.
ON = ("quant-members-refused", "handle-without-tokens")
GONE = ("reset-does-nothing", "int64-ids-misread", "strided-rows-misread", "too-many-tokens")
OFF = ("async-weights-unwritten",)
#: What the other library refuses.
REFUSED = (
    *("weights-required", "zero-copy-ignores-input", "low-latency-needs-three-warps", "ids-past-experts"),
    *("rdma-block-split", "low-latency-scans-eight-slots", "too-many-tokens"),
)


def look(path: Path, operator: str, switches: str, *names: str) -> list[list[str]]:
    """Name, state and text that :mod:`.look` prints of a library in ``path`` with this operator."""
    for name, text in FILES.items():
        (path / "mori" / name).parent.mkdir(parents=True, exist_ok=True)
        (path / "mori" / name).write_text(text + operator * name.endswith("combine.py"))
    command = [sys.executable, "-m", "conformance.selftest.hazards.look", "mori", *names]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(path), str(ROOT))), VARIABLE: switches}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment, timeout=100)
    assert done.returncode == 0, done.stderr
    return [line.split(maxsplit=2) for line in done.stdout.splitlines()]


def test_the_loaders_library_is_looked_at(tmp_path: Path) -> None:
    said = look(tmp_path, REPAIRED, ",".join((*ON, *GONE)), *ON, *GONE, *OFF)
    assert [line[:2] for line in said] == [
        *([name, "PRESENT"] for name in ON),
        *([name, "ABSENT"] for name in (*GONE, *OFF)),
    ], said


def test_a_refusal_by_whatever_exception_is_absence(tmp_path: Path) -> None:
    said = look(tmp_path, REFUSING, ",".join(REFUSED), *REFUSED)
    assert [line[:2] for line in said] == [[name, "ABSENT"] for name in REFUSED], said
    assert all("refused: " in line[2] for line in said), said


def test_no_probe_names_the_double() -> None:
    for path in (ROOT / "conformance" / "hazards").rglob("*.py"):
        assert "standin.mori_ep" not in path.read_text(encoding="utf-8"), path
