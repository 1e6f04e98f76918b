"""The double of AITER's all-reduce without ranks: signatures, thresholds on tensors without data, orders of addition.

Scope: the thresholds are compared with the rules of the reference, which share no code with the double. Equal
signatures and thresholds prove nothing about AITER's kernels.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist

from accelerated.operators import Family, RowProblem
from accelerated.standin import manifest
from accelerated.standin.aiter_ops import (
    communication_op,
    communicator_cuda,
    custom_all_reduce,
    fused_norm,
    parallel_state,
    reduction,
)
from accelerated.standin.aiter_ops.jit.utils.chip_info import ARCH_VARIABLE
from reference import eligibility
from reference.eligibility_rules import PLAIN, Path

DOUBLES: dict[str, ModuleType] = {
    "aiter.dist.communication_op": communication_op,
    "aiter.dist.parallel_state": parallel_state,
    "aiter.dist.device_communicators.custom_all_reduce": custom_all_reduce,
    "aiter.dist.device_communicators.communicator_cuda": communicator_cuda,
}


def test_double_has_the_recorded_signatures() -> None:
    assert manifest.differences(DOUBLES, "aiter_allreduce") == []


@pytest.mark.skipif(importlib.util.find_spec("aiter") is None, reason="aiter is not installed")
def test_installed_library_has_the_recorded_signatures() -> None:
    real = {name: importlib.import_module(name) for name in DOUBLES}
    assert manifest.differences(real, "aiter_allreduce") == []


def test_manifest_names_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = manifest.load_manifest("aiter_allreduce")
    assert recorded["commit"].startswith("e4048607")
    assert all(entry["source"].startswith("aiter/dist/") for entry in recorded["functions"].values())
    monkeypatch.delattr(parallel_state, "graph_capture")
    assert manifest.differences(DOUBLES, "aiter_allreduce") == ["aiter.dist.parallel_state:graph_capture: missing"]


class Recording(custom_all_reduce.CustomAllreduce):
    """Has no ranks to talk to; its kernels write down that they gathered."""

    def __init__(self, ranks: int) -> None:
        self.world_size, self.rank, self.disabled = ranks, 0, ranks not in self._SUPPORTED_WORLD_SIZES
        self._IS_CAPTURING = False
        self.kernels: list[str] = []


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace what computes by what writes down; the checks before it stay."""

    def gather(rows: torch.Tensor, group: Recording) -> torch.Tensor:
        group.kernels.append("gathered")
        return rows[None]

    monkeypatch.setattr(reduction, "gather", gather)
    monkeypatch.setattr(custom_all_reduce.CustomAllreduce, "_data", property(lambda self: self), raising=False)
    monkeypatch.setattr(custom_all_reduce.CustomAllreduce, "_plain_sum", lambda self, parts, input: parts[0])
    for name in ("reduced", "stored"):
        monkeypatch.setattr(fused_norm, name, lambda value, dtype: value)
    for name in ("add_unrounded", "add_stored", "add_native"):
        monkeypatch.setattr(fused_norm, name, lambda total, residual, name=name: (name, residual))
    monkeypatch.setattr(fused_norm, "norm", lambda value, weight, eps, **options: (value, options))
    monkeypatch.setattr(fused_norm, "quantise_fp8", lambda value, group, payload: (value, torch.zeros(())))
    monkeypatch.setattr(fused_norm, "quantise_fp4", lambda value: (value, torch.zeros(())))
    for name in ("get_hip_quant", "rmsnorm2d_fwd_with_add"):
        monkeypatch.setattr(
            communicator_cuda, name, lambda *given: lambda rows, **more: ("separate", torch.zeros(1, 1))
        )
    monkeypatch.setattr(fused_norm, "triton_mxfp4", lambda rows: ("separate", None))
    monkeypatch.setattr(dist, "all_reduce", lambda out, group: None)


def called(communicator: Any, kind: str, rows: torch.Tensor, weight: torch.Tensor) -> Any:
    """What the double gives for one kind of the reference's tables."""
    if kind == "all_reduce":
        return communicator.all_reduce(rows)
    if kind == "norm":
        return communicator.fused_allreduce_rmsnorm(rows, rows, weight, 1e-6)
    quantiser = kind.removesuffix("_emit")
    return communicator.fused_allreduce_rmsnorm_quant(
        rows, rows, weight, 1e-6, quant_type=quantiser, emit_bf16=kind.endswith("_emit")
    )


#: Which functions of the double a path of the rules goes through.
_ADDS = {
    ("norm", Path.ONE_STAGE): ("add_unrounded", {"gemma": False, "weight_first": False}),
    ("norm", Path.SPLIT): ("add_unrounded", {"gemma": False, "weight_first": True}),
    ("fp8", Path.ONE_STAGE): ("add_unrounded", None),
    ("fp8", Path.TWO_STAGE): ("add_native", None),
    ("fp8", Path.SPLIT): ("add_native", None),
    ("mxfp4", Path.ONE_STAGE): ("add_stored", None),
    ("mxfp4", Path.TWO_STAGE): ("add_native", None),
}


@pytest.mark.usefixtures("record")
@pytest.mark.parametrize("ranks", [2, 4, 6, 8])
@pytest.mark.parametrize("kind", ["all_reduce", "norm", "per_token", "per_group", "mxfp4", "mxfp4_emit"])
def test_thresholds_are_those_of_the_rules(ranks: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ARCH_VARIABLE, "gfx950")
    communicator = object.__new__(communicator_cuda.CudaCommunicator)
    communicator.world_size, communicator.device_group = ranks, None  # type: ignore[assignment]
    family = {"per_token": "fp8", "per_group": "fp8"}.get(kind, kind.removesuffix("_emit"))
    for hidden in (128, 504, 4096, 7168, 8192, 8320, 16384):
        problem = RowProblem(Family.ALLREDUCE_NORM, ranks, hidden, 1 << 20)
        sides = {1, 4, 5, *(m + d for m in eligibility.boundaries(problem, kind, "gfx950") for d in (0, 1))}
        for rows in sorted(sides):
            communicator.ca_comm = double = Recording(ranks)
            values = torch.empty(rows, hidden, dtype=torch.bfloat16, device="meta")
            weight = torch.empty(hidden, dtype=torch.bfloat16, device="meta")
            wanted = eligibility.path(problem, rows, kind, "gfx950")
            if wanted.path is Path.THROWS:
                with pytest.raises(RuntimeError):
                    called(communicator, kind, values, weight)
                continue
            result = called(communicator, kind, values, weight)
            where = (hidden, rows, wanted)
            assert (double.kernels == ["gathered"]) == (wanted.path is not Path.RCCL), where
            if kind != "all_reduce":
                assert (isinstance(result[0], str) and result[0] == "separate") == wanted.separate_quantiser, where
            if kind != "all_reduce" and not wanted.separate_quantiser:
                plain = wanted.path in PLAIN
                assert isinstance(result[0], torch.Tensor) == plain, where
                if not plain:
                    added, options = result[0]
                    adds, product = _ADDS[family, wanted.path]
                    assert added == adds, where
                    assert product in (None, options), where


def terms(ranks: int, size: int) -> torch.Tensor:
    """Float32 terms whose sum says where it began: 2**24 on rank 0, 1 on every other."""
    parts = torch.ones(ranks, 1, size)
    parts[0] = 2.0**24
    return parts


def order(parts: torch.Tensor, ranks: int, arch: str, monkeypatch: pytest.MonkeyPatch, rank: int = 0) -> torch.Tensor:
    monkeypatch.setenv(ARCH_VARIABLE, arch)
    double = Recording(ranks)
    double.rank = rank
    return double._plain_sum(parts, parts[0])


def test_small_sums_go_from_rank_to_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for ranks, size in ((2, 100000), (4, 40956), (8, 20476)):  # float32: below 160 and 80 KiB
        assert order(terms(ranks, size), ranks, "gfx942", monkeypatch).unique().tolist() == [2.0**24]


def test_larger_sums_begin_at_the_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    # From rank 1 on three ones are added before 2**24; the sum of 2**24 and 3 is 2**24 + 4 to even.
    total = order(terms(4, 40960), 4, "gfx942", monkeypatch).view(4, -1)
    assert total[0].unique().tolist() == [2.0**24]
    assert total[1].unique().tolist() == [2.0**24 + 4]
    # From rank 2 on: 2, then 2**24 + 2, then 2**24 + 3 to even. From rank 3 on every one is lost.
    assert total[2].unique().tolist() == [2.0**24 + 4]
    assert total[3].unique().tolist() == [2.0**24]


def test_the_last_rank_owns_what_is_left_over(monkeypatch: pytest.MonkeyPatch) -> None:
    total = order(terms(4, 40960 + 12), 4, "gfx942", monkeypatch)[0]
    share = (40960 + 12) // 4 // 4 * 4
    assert share == 10240
    assert total[share] == 2.0**24 + 4
    assert total[3 * share :].unique().tolist() == [2.0**24]


def test_gfx942_writes_in_rank_order_above_4_mib(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 2**20 + 32
    assert order(terms(8, size), 8, "gfx942", monkeypatch).unique().tolist() == [2.0**24]
    assert len(order(terms(8, size), 8, "gfx950", monkeypatch).unique()) > 1
    assert len(order(terms(8, size + 4), 8, "gfx942", monkeypatch).unique()) > 1


def test_gfx1250_begins_at_each_rank_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [float(order(terms(4, 8), 4, "gfx1250", monkeypatch, rank)[0, 0]) for rank in range(4)]
    assert found == [2.0**24, 2.0**24 + 4, 2.0**24 + 4, 2.0**24]
