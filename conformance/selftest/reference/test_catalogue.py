"""The catalogue's fixtures are sane, and a malformed one is refused by file and field.

Scope: reference/catalogue.py and the JSON it reads. What a pass does not prove: that a model's numbers are still those
of its published configuration.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from reference import catalogue

MODELS = {
    # hidden, experts, top_k, intermediate, expert_groups, groups_per_token, shared_experts, first_dense_layers
    "deepseek-v2-lite": (2048, 64, 6, 1408, 1, 1, 2, 1),
    "deepseek-v3": (7168, 256, 8, 2048, 8, 4, 1, 3),
    "glm-4.5": (5120, 160, 8, 1536, 1, 1, 1, 3),
    "gpt-oss-120b": (2880, 128, 4, 2880, None, None, 0, 0),
    "kimi-k2": (7168, 384, 8, 2048, 1, 1, 1, 1),
    "llama-4-maverick": (5120, 128, 1, 8192, None, None, 1, None),
    "mixtral-8x7b": (4096, 8, 2, 14336, None, None, 0, 0),
    "qwen3-235b-a22b": (4096, 128, 8, 1536, None, None, 0, 0),
}
ARCHITECTURES = ("gfx1250", "gfx942", "gfx950")
EP_SIZES = (1, 2, 4, 8, 16, 32, 64)
INTRA_NODE = ("IntraNode", "IntraNodeLL")


def test_every_model_is_listed() -> None:
    assert tuple(catalogue.model_shapes()) == tuple(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_model(name: str) -> None:
    shape = catalogue.model_shape(name)
    assert shape.name == name
    assert MODELS[name] == (
        shape.hidden,
        shape.experts,
        shape.top_k,
        shape.intermediate,
        shape.expert_groups,
        shape.groups_per_token,
        shape.shared_experts,
        shape.first_dense_layers,
    )
    assert shape.experts % 8 == 0  # fits an eight-GPU node
    assert shape.hidden % 64 == 0
    assert "config.json" in shape.source
    assert all(repository.count("/") == 1 for repository in shape.covers)


def test_v3_covers_r1() -> None:
    assert catalogue.model_shape("deepseek-v3").covers == ("deepseek-ai/DeepSeek-V3", "deepseek-ai/DeepSeek-R1")


def test_every_architecture_is_listed() -> None:
    assert tuple(catalogue.architectures()) == ARCHITECTURES


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture_agrees_with_torch(name: str) -> None:
    arch = catalogue.architecture(name)
    dtype = getattr(torch, arch.fp8.dtype)
    assert arch.fp8.max == torch.finfo(dtype).max
    # vLLM's maximum must itself be a value of the format, or its quantisers could not reach it.
    assert torch.tensor(arch.fp8.vllm_quant_max).to(dtype).float().item() == arch.fp8.vllm_quant_max


def test_architecture_facts() -> None:
    facts = {
        name: (a.wave_size, a.fp8.dtype, a.fp8.max, a.fp8.vllm_quant_max, a.symmetric_backend)
        for name, a in catalogue.architectures().items()
    }
    assert facts == {
        "gfx942": (64, "float8_e4m3fnuz", 240.0, 224.0, "shmem"),
        "gfx950": (64, "float8_e4m3fn", 448.0, 448.0, "shmem"),
        "gfx1250": (32, "float8_e4m3fn", 448.0, 448.0, "cco"),
    }
    assert set(catalogue.architecture("gfx942").kernel_types) == set(catalogue.KERNEL_TYPES)
    assert set(catalogue.architecture("gfx950").kernel_types) == set(catalogue.KERNEL_TYPES)
    assert catalogue.architecture("gfx1250").kernel_types == INTRA_NODE


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_launch_parameters_meet_the_constraints_of_the_kernels(name: str) -> None:
    arch = catalogue.architecture(name)
    for kernel_type in arch.kernel_types:
        for nodes in (1,) if kernel_type in INTRA_NODE else (1, 2, 4):
            launch = arch.launch_parameters(kernel_type, nodes)
            assert launch.warp_num_per_block * arch.wave_size <= 1024  # threads of a block
            if kernel_type == "IntraNodeLL":
                assert launch.warp_num_per_block >= 3
            if kernel_type in ("InterNode", "AsyncLL"):
                assert all(launch.block_num % world_size == 0 for world_size in EP_SIZES)
            if kernel_type == "InterNode":
                assert launch.warp_num_per_block >= 2
            if kernel_type.startswith("InterNodeV1") and nodes > 1:
                assert 0 < launch.rdma_block_num < launch.block_num
            else:
                assert launch.rdma_block_num < launch.block_num


@pytest.mark.parametrize(
    ("arch", "backend", "nodes", "kernel_type", "geometry"),
    [  # geometry: warps per block, blocks, RDMA blocks
        ("gfx942", "mori_high_throughput", 1, "IntraNode", (16, 80, 0)),
        ("gfx942", "mori_low_latency", 1, "IntraNode", (16, 80, 0)),
        ("gfx942", "mori_high_throughput", 2, "InterNodeV1", (16, 32, 16)),
        ("gfx942", "mori_low_latency", 4, "InterNodeV1LL", (16, 32, 16)),
        ("gfx950", "mori_high_throughput", 1, "IntraNode", (16, 80, 0)),
        ("gfx950", "mori_low_latency", 1, "IntraNode", (16, 80, 0)),
        ("gfx950", "mori_high_throughput", 8, "InterNodeV1", (8, 64, 32)),
        ("gfx950", "mori_low_latency", 2, "InterNodeV1LL", (8, 64, 32)),
    ],
)
def test_vllm_kernel_type(
    arch: str, backend: str, nodes: int, kernel_type: str, geometry: tuple[int, int, int]
) -> None:
    architecture = catalogue.architecture(arch)
    chosen, launch = catalogue.vllm_kernel_type(backend, nodes, architecture)
    assert chosen == kernel_type
    assert (launch.warp_num_per_block, launch.block_num, launch.rdma_block_num) == geometry
    # The adapter launches a kernel type the way vLLM does wherever vLLM uses it.
    assert architecture.launch_parameters(kernel_type, nodes) == launch


def test_vllm_has_no_branch_for_gfx1250() -> None:
    with pytest.raises(catalogue.CatalogueError, match=r"on gfx1250: vLLM 0\.33\.0 asserts gfx942 or gfx950"):
        catalogue.vllm_kernel_type("mori_low_latency", 1, catalogue.architecture("gfx1250"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: catalogue.model_shape("gpt-5"), r"unknown model 'gpt-5'; choose one of deepseek-v2-lite, .*qwen3"),
        (lambda: catalogue.architecture("gfx906"), r"unknown architecture 'gfx906'; choose one of gfx1250, gfx942"),
        (
            lambda: catalogue.vllm_kernel_type("mori", 1, catalogue.architecture("gfx942")),
            r"'mori' is no MoRI backend of vLLM; choose one of mori_high_throughput, mori_low_latency",
        ),
        (
            lambda: catalogue.vllm_kernel_type("mori_low_latency", 0, catalogue.architecture("gfx942")),
            r"nodes is 0; it must be an integer of at least 1",
        ),
        (
            lambda: catalogue.architecture("gfx1250").launch_parameters("InterNodeV1", 2),
            r"'InterNodeV1' is not available on gfx1250; choose IntraNode, IntraNodeLL",
        ),
        (
            lambda: catalogue.architecture("gfx942").launch_parameters("IntraNode", 2),
            r"IntraNode runs on one node only, not on 2; use an InterNode type",
        ),
        (lambda: catalogue.architecture("gfx942").launch_parameters("IntraNode", 0), r"nodes is 0"),
    ],
)
def test_unknown_names_are_refused_with_the_choices(call: Callable[[], object], message: str) -> None:
    with pytest.raises(catalogue.CatalogueError, match=message):
        call()


@pytest.fixture
def fixtures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(catalogue.FIXTURES / "models", tmp_path / "models")
    shutil.copytree(catalogue.FIXTURES / "architectures", tmp_path / "architectures")
    monkeypatch.setattr(catalogue, "FIXTURES", tmp_path)
    return tmp_path


def rewrite(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(file.read_text(encoding="utf-8"))
    change(document)
    file.write_text(json.dumps(document), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("hidden"), r"key 'hidden' is missing"),
        (lambda d: d.update(hiden=1), r"unknown key 'hiden'; the keys are name, covers, hidden"),
        (lambda d: d.update(hidden=0), r"hidden: is 0; it must be an integer of at least 1"),
        (lambda d: d.update(hidden=True), r"hidden: is True; it must be an integer"),
        (lambda d: d.update(hidden="7168"), r"hidden: is '7168'; it must be an integer"),
        (lambda d: d.update(hidden=None), r"hidden: is None; it must be an integer"),
        (lambda d: d.update(shared_experts=-1), r"shared_experts: is -1; it must be an integer of at least 0"),
        (lambda d: d.update(first_dense_layers=-1), r"first_dense_layers: is -1; it must be an integer of at least 0"),
        (lambda d: d.update(source=" "), r"source: is ' '; it must be a string that says something"),
        (lambda d: d.update(covers=[]), r"covers: is \[\]; it must be a list of at least one string"),
        (lambda d: d.update(covers=["a", "a"]), r"covers: .*none of them twice"),
        (lambda d: d.update(covers=[1]), r"covers: is 1; it must be a string"),
        (lambda d: d.update(name="deepseek-v4"), r"name is 'deepseek-v4'; it must be the file's stem 'deepseek-v3'"),
        (lambda d: d.update(top_k=257), r"top_k is 257; it cannot exceed experts = 256"),
        (lambda d: d.update(top_k=129), r"top_k is 129; 4 groups of 32 experts have fewer"),
        (lambda d: d.update(expert_groups=None), r"groups_per_token is 4 but expert_groups is None; give both or null"),
        (lambda d: d.update(groups_per_token=None), r"groups_per_token is None but expert_groups is 8"),
        (lambda d: d.update(expert_groups=7), r"expert_groups is 7; it must divide experts = 256"),
        (lambda d: d.update(groups_per_token=9), r"groups_per_token is 9; it cannot exceed expert_groups = 8"),
    ],
)
def test_malformed_model_is_refused(fixtures: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    rewrite(fixtures / "models" / "deepseek-v3.json", change)
    with pytest.raises(catalogue.CatalogueError, match=r"deepseek-v3\.json: " + message):
        catalogue.model_shapes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(wave_size=64.0), r"wave_size: is 64\.0; it must be an integer"),
        (lambda d: d.update(fp8=None), r"fp8: is None; it must be an object"),
        (lambda d: d["fp8"].update(dtype="float8_e5m2"), r"fp8\.dtype: is 'float8_e5m2'; choose one of float8_e4m3fn"),
        (lambda d: d["fp8"].update(max=-1), r"fp8\.max: is -1; it must be a positive finite number"),
        (lambda d: d["fp8"].update(max=float("inf")), r"fp8\.max: is inf; it must be a positive finite number"),
        (lambda d: d["fp8"].update(max=float("nan")), r"fp8\.max: is nan; it must be a positive finite number"),
        (
            lambda d: d["fp8"].update(vllm_quant_max=256),
            r"fp8: vllm_quant_max is 256\.0; it cannot exceed max = 240\.0",
        ),
        (lambda d: d.update(symmetric_backend="mpi"), r"symmetric_backend: is 'mpi'; choose one of shmem, cco"),
        (lambda d: d.update(kernel_types=["Warp"]), r"kernel_types: is 'Warp'; choose one of IntraNode, InterNode"),
        (lambda d: d["launch"].pop("AsyncLL"), r"launch has IntraNode, .*; it needs exactly IntraNode, .*AsyncLL"),
        (lambda d: d["launch"].update(Warp={}), r"launch: is 'Warp'; choose one of IntraNode"),
        (
            lambda d: d["launch"]["AsyncLL"]["single_node"].pop("block_num"),
            r"launch\.AsyncLL\.single_node: key 'block_num' is missing",
        ),
        (
            lambda d: d["launch"]["AsyncLL"]["multi_node"].update(rdma_block_num=-1),
            r"launch\.AsyncLL\.multi_node\.rdma_block_num: is -1; it must be an integer of at least 0",
        ),
        (lambda d: d["launch"]["AsyncLL"].pop("source"), r"launch\.AsyncLL: key 'source' is missing"),
        (lambda d: d.update(vllm=None), r"vllm is null; say why in vllm_note"),
        (lambda d: d["vllm"].pop("mori_low_latency"), r"vllm has mori_high_throughput; it needs exactly"),
        (
            lambda d: d["vllm"]["mori_low_latency"]["multi_node"].update(kernel_type="Warp"),
            r"vllm\.mori_low_latency\.multi_node\.kernel_type: is 'Warp'; choose one of",
        ),
        (
            lambda d: (d["kernel_types"].remove("InterNodeV1LL"), d["launch"].pop("InterNodeV1LL")),
            r"vllm names kernel type InterNodeV1LL, which kernel_types lacks",
        ),
    ],
)
def test_malformed_architecture_is_refused(
    fixtures: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    rewrite(fixtures / "architectures" / "gfx942.json", change)
    with pytest.raises(catalogue.CatalogueError, match=r"gfx942\.json: " + message):
        catalogue.architectures()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"deepseek-v3\.json: not readable as JSON: "),
        ("[]", r"deepseek-v3\.json: is \[\]; it must be an object"),
        ('{"name": "a", "name": "b"}', r"deepseek-v3\.json: not readable as JSON: key 'name' appears twice"),
    ],
)
def test_broken_file_is_refused(fixtures: Path, text: str, message: str) -> None:
    (fixtures / "models" / "deepseek-v3.json").write_text(text, encoding="utf-8")
    with pytest.raises(catalogue.CatalogueError, match=message):
        catalogue.model_shapes()


def test_missing_fixtures_say_how_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "FIXTURES", tmp_path / "nowhere")
    with pytest.raises(catalogue.CatalogueError, match=r"no fixtures in .*nowhere.*; run from a checkout"):
        catalogue.model_shapes()


def test_the_answer_is_the_callers_own() -> None:
    catalogue.model_shapes().clear()
    assert tuple(catalogue.model_shapes()) == tuple(MODELS)
