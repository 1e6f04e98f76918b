"""What MoRI's adapter derives from the library's source: symmetric memory, LDS of the gfx125x bodies, what is compiled.

Scope: arithmetic, and the process that compiles. A pass does not prove that a device grants the memory.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from types import SimpleNamespace

import pytest

from accelerated.contract import Standing
from accelerated.mori_ep import contract as declared
from accelerated.mori_ep import launch, warmup
from reference.catalogue import KERNEL_TYPES
from reference.problem import Problem

BASE = Problem(world_size=8, hidden=1024, experts=256, top_k=8, capacity=4096)
VARIANTS: dict[str, dict[str, object]] = {
    "plain": {},
    "scales of the wire": {"wire": "fp8_group"},
    "fp8 blocks": {"codec": "fp8_blockwise", "scale_dim": 56},
    "fp4 blocks": {"codec": "fp4_blockwise", "scale_dim": 64},
    "more blocks than scales": {"codec": "fp8_blockwise", "scale_dim": 8, "wire": "fp8_group"},
    "more scales than blocks": {"codec": "fp8_blockwise", "scale_dim": 2, "wire": "fp8_group"},
    "many tokens on two nodes": {"nodes": 2, "hidden": 64, "capacity": 131072, "top_k": 2, "experts": 8},
}


def allocated(problem: Problem, kernel_type: str) -> int:
    """Sum of the symmetric buffers, one by one in the order of dispatch_combine.cpp:302-557, each aligned to 256."""
    ranks, tokens, nodes, top_k = problem.world_size, problem.capacity, problem.nodes, problem.top_k
    rows, row = ranks * tokens, problem.hidden * problem.element_bytes
    scales = {"": 0, "fp8_group": problem.hidden // 128 * 4}[problem.wire]
    whole, blocks = row + 8 * top_k + 4 + scales, 4 * problem.scale_dim
    region = problem.hidden // 2 if problem.codec == "fp4_blockwise" else row
    if kernel_type.startswith("IntraNode"):
        coded = kernel_type == "IntraNode" and blocks
        tokens_in = [rows * (region + 8 * top_k + 4 + blocks) if coded else rows * whole]
    elif kernel_type.startswith("InterNodeV1"):
        tokens_in = [nodes * tokens * whole, rows * whole, 2 * nodes * tokens * whole, tokens * whole]
    else:
        tokens_in = 3 * [rows * whole]
    sizes = [*tokens_in, rows * row, tokens * row, *(3 * [rows * top_k * 4]), rows * max(scales, blocks), rows * scales]
    sizes += [*(2 * [rows * top_k * 4]), *(2 * [ranks * 8]), ranks * 32, nodes * 8, 4]
    sizes += [rows * problem.experts_per_rank * 4, ranks * 64, nodes * tokens * 8]
    return sum(-(-size // 256) * 256 for size in sizes)


@pytest.mark.parametrize("kernel_type", KERNEL_TYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_memory_of_an_operator_is_what_the_library_allocates(variant: str, kernel_type: str) -> None:
    problem = replace(BASE, **VARIANTS[variant])  # type: ignore[arg-type]
    exact = allocated(problem, kernel_type)
    assert exact <= launch.heap_bytes(problem, kernel_type) <= exact + (1 << 20)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "combine needs 525312 bytes of LDS"),
        ({"codec": "fp8_direct_cast"}, ""),
        ({"codec": "fp8_blockwise", "scale_dim": 64}, ""),
        ({"modes": ("zero-copy",)}, ""),
        ({"modes": ("zero-copy",), "hidden": 20608}, "dispatch needs 329728 bytes of LDS"),
        ({"codec": "fp8_direct_cast", "hidden": 20480}, "combine needs 328192 bytes of LDS"),
    ],
)
def test_lds_of_the_gfx125x_bodies(changes: dict[str, object], reason: str) -> None:
    tall = Problem(world_size=4, hidden=16384, experts=64, top_k=4, capacity=64)
    standing = declared.support(replace(tall, **changes), "IntraNode", "gfx1250")  # type: ignore[arg-type]
    assert (standing.standing is Standing.REFUSED) == bool(reason)
    assert reason in (standing.reason or "")


@pytest.mark.parametrize(("path", "code"), [("/cache/ep_intranode.hsaco", 0), (None, 1)])
def test_kernels_that_do_not_compile_fail_the_process(
    path: str | None, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compiled: list[str] = []
    kinds = SimpleNamespace(IntraNode="IntraNode")
    modules = {
        "mori.ops.dispatch_combine": SimpleNamespace(warmup_jit_kernels=lambda kind: path),
        "mori.jit.core": SimpleNamespace(compile_genco=compiled.append),
    }
    monkeypatch.setattr(importlib, "import_module", modules.__getitem__)
    ops = SimpleNamespace(EpDispatchCombineKernelType=kinds)
    monkeypatch.setattr(warmup, "load_mori", lambda: SimpleNamespace(ops=ops))
    assert warmup.main(["IntraNode"]) == code
    assert compiled == ([] if code else ["shmem_kernels", "ep_local_expert_count"])
    assert ("do not compile" in capsys.readouterr().err) == bool(code)
