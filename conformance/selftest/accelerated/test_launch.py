"""Operator arguments, launch geometry and heap sizes. A pass does not prove that a device accepts them."""

from __future__ import annotations

import dataclasses

import pytest

from accelerated.contract import Standing
from accelerated.mori_ep import launch
from accelerated.mori_ep.contract import support
from accelerated.mori_ep.kernel_types import NODE_LEVEL_TYPES
from reference.catalogue import KERNEL_TYPES, CatalogueError, LaunchParameters
from reference.problem import Problem

GIB = 1 << 30
DEEPSEEK = Problem(world_size=8, hidden=7168, experts=256, top_k=8, capacity=4096)


def test_arguments_are_every_field_of_the_configuration() -> None:
    problem = Problem(4, hidden=96, experts=12, top_k=2, capacity=64, dtype="float32", nodes=2)
    assert launch.config_arguments(problem, "InterNodeV1", "gfx942", rank=3) == {
        "data_type": "float32",
        "rank": 3,
        "world_size": 4,
        "hidden_dim": 96,
        "scale_dim": 0,
        "scale_type_size": 0,
        "max_token_type_size": 4,
        "max_num_inp_token_per_rank": 64,
        "num_experts_per_rank": 3,
        "num_experts_per_token": 2,
        "warp_num_per_block": 16,
        "block_num": 32,
        "max_total_recv_tokens": 0,
        "use_external_inp_buf": True,
        "kernel_type": "InterNodeV1",
        "gpu_per_node": 2,
        "rdma_block_num": 16,
        "num_qp_per_pe": 1,
        "quant_type": "none",
    }
    with pytest.raises(ValueError, match="rank is 4"):
        launch.config_arguments(problem, "InterNodeV1", "gfx942", rank=4)


@pytest.mark.parametrize("arch", ["gfx942", "gfx950", "gfx1250"])
@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("kernel_type", KERNEL_TYPES)
def test_geometry_of_every_cell_that_is_not_refused(kernel_type: str, nodes: int, arch: str) -> None:
    problem = Problem(8, hidden=64, experts=64, top_k=4, capacity=64, nodes=nodes)
    if support(problem, kernel_type, arch).standing is Standing.REFUSED:
        return
    chosen = launch.launch(problem, kernel_type, arch)
    blocks, warps, rdma = dataclasses.astuple(chosen.parameters)
    assert warps >= 3, "IntraNodeLL moves no payload with fewer warps"
    if nodes > 1 and kernel_type in NODE_LEVEL_TYPES:
        assert 0 < rdma < blocks


def test_legacy_blocks_are_a_multiple_of_the_ranks() -> None:
    for ranks, nodes in ((8, 1), (16, 2), (24, 3)):
        problem = Problem(ranks, hidden=64, experts=ranks, top_k=4, capacity=64, nodes=nodes)
        blocks = launch.launch(problem, "InterNode", "gfx942").parameters.block_num
        assert blocks >= ranks
        assert blocks % ranks == 0


@pytest.mark.parametrize(
    ("name", "nodes", "arch", "expected"),
    [
        ("mori_high_throughput", 1, "gfx942", ("IntraNode", 80, 16, 0)),
        ("mori_low_latency", 1, "gfx950", ("IntraNode", 80, 16, 0)),
        ("mori_high_throughput", 2, "gfx942", ("InterNodeV1", 32, 16, 16)),
        ("mori_low_latency", 2, "gfx942", ("InterNodeV1LL", 32, 16, 16)),
        ("mori_low_latency", 2, "gfx950", ("InterNodeV1LL", 64, 8, 32)),
    ],
)
def test_vllm_names(name: str, nodes: int, arch: str, expected: tuple[str, int, int, int]) -> None:
    chosen = launch.launch(dataclasses.replace(DEEPSEEK, nodes=nodes), name, arch)
    assert (chosen.kernel_type, *dataclasses.astuple(chosen.parameters)) == expected


def test_geometry_that_loses_rows_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    all_rdma = ("InterNodeV1", LaunchParameters(32, 16, 32))
    monkeypatch.setattr(launch, "vllm_kernel_type", lambda *_: all_rdma)
    with pytest.raises(ValueError, match="strictly between 0 and block_num"):
        launch.launch(dataclasses.replace(DEEPSEEK, nodes=2), "mori_high_throughput", "gfx942")
    with pytest.raises(CatalogueError, match="one node only"):
        launch.launch(dataclasses.replace(DEEPSEEK, nodes=2), "IntraNode", "gfx942")


@pytest.mark.parametrize(
    ("kernel_type", "dtype", "nodes", "gib"),
    [
        ("IntraNode", "bfloat16", 1, 0.94),
        ("IntraNode", "float32", 1, 1.87),
        ("InterNodeV1", "bfloat16", 1, 1.16),
        ("InterNodeV1", "bfloat16", 2, 1.33),
        ("AsyncLL", "bfloat16", 1, 1.82),
        ("AsyncLL", "float32", 1, 3.62),
    ],
)
def test_heap_of_one_operator(kernel_type: str, dtype: str, nodes: int, gib: float) -> None:
    size = launch.heap_bytes(dataclasses.replace(DEEPSEEK, dtype=dtype, nodes=nodes), kernel_type)
    # Given to a hundredth, rounded or cut off.
    assert size / GIB == pytest.approx(gib, abs=0.01)


def test_heap_setting_never_lowers_what_the_user_set() -> None:
    needed = launch.session_heap_bytes(8)
    assert 2 * launch.heap_bytes(dataclasses.replace(DEEPSEEK, dtype="float32"), "AsyncLL") < needed < 12 * GIB
    assert launch.parse_size(launch.heap_setting(needed, None)) >= needed
    assert launch.heap_setting(needed, "32G") == "32G"
    assert launch.parse_size(launch.heap_setting(needed, "2G")) >= needed


@pytest.mark.parametrize(
    ("text", "size"), [("6G", 6 * GIB), ("512MiB", GIB // 2), ("1kb", 1024), ("4096", 4096), ("2g", 2 * GIB)]
)
def test_sizes_as_mori_reads_them(text: str, size: int) -> None:
    assert launch.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "6X", "-1G", "1.5G", "6GG", "6i", "6GIB", "6G "])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="MORI_SHMEM_HEAP_SIZE is"):
        launch.parse_size(text)
