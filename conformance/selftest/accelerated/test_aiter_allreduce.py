"""What the all-reduce adapter calls, in which order, each call bound to the recorded signature of the real function.

Scope: one rank and a library that only records. A pass does not prove that AITER computes anything with these calls.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from accelerated.aiter_ops import allreduce
from accelerated.aiter_ops.library import AiterLibrary
from accelerated.contract import ContractError
from accelerated.interface import RankContext
from accelerated.operators import Family, NormOperation, RowProblem
from accelerated.standin import manifest

Calls = list[tuple[str, dict[str, Any]]]
HIDDEN = 512


def signature(name: str) -> inspect.Signature:
    functions = manifest.load_manifest("aiter_allreduce")["functions"]
    entry = next(entry for path, entry in functions.items() if path.endswith(f":{name}"))
    return inspect.Signature(
        [
            inspect.Parameter(
                p["name"], getattr(inspect.Parameter, p["kind"]), default=p.get("default", inspect._empty)
            )
            for p in entry["parameters"]
        ]
    )


class Library:
    """The parts of AITER that the adapter uses, every call bound and written down."""

    def __init__(self) -> None:
        self.calls: Calls = []
        self.initialised = False
        self.custom = SimpleNamespace(disabled=False, should_custom_ar=lambda rows: True)
        communicator = SimpleNamespace(ca_comm=self.custom, qr_comm=SimpleNamespace(disabled=True))
        self.group = SimpleNamespace(world_size=2, device_communicator=communicator)
        self.rmsnorm = SimpleNamespace(rmsnorm2d_fwd_with_add=lambda **given: self.calls.append(("norm", given)))
        self.state = {
            "set_custom_all_reduce": self.recording("set_custom_all_reduce", None),
            "init_distributed_environment": self.recording("init_distributed_environment", None),
            "ensure_model_parallel_initialized": self.recording("ensure_model_parallel_initialized", self.initialise),
            "model_parallel_is_initialized": lambda: self.initialised,
            "get_tp_group": lambda: self.group,
            "destroy_model_parallel": self.recording("destroy_model_parallel", None),
        }
        pair = (torch.zeros(3, HIDDEN), torch.ones(3, HIDDEN))
        codes = torch.zeros(3, HIDDEN, dtype=torch.float8_e4m3fnuz)
        self.operations = {
            "tensor_model_parallel_all_reduce": lambda: torch.zeros(3, HIDDEN),
            "tensor_model_parallel_fused_allreduce_rmsnorm": lambda: pair,
            "tensor_model_parallel_fused_allreduce_rmsnorm_quant": lambda: (codes, pair[1], torch.ones(3, 1), pair[0]),
        }

    def initialise(self) -> None:
        self.initialised = True

    def recording(self, name: str, answer: Callable[[], Any] | None) -> Callable[..., Any]:
        wanted = signature(name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, dict(wanted.bind(*args, **kwargs).arguments)))
            return answer() if answer else None

        return call

    def distributed(self, name: str) -> Any:
        if name == "parallel_state":
            return SimpleNamespace(**self.state)
        assert name == "communication_op"
        return SimpleNamespace(**{each: self.recording(each, answer) for each, answer in self.operations.items()})


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    made = Library()

    @contextmanager
    def no_store(context: RankContext) -> Iterator[None]:
        made.calls.append(("store", {}))
        yield
        made.calls.append(("store back", {}))

    monkeypatch.setattr(allreduce, "_tcp_store", no_store)
    for name in (*allreduce.FORBIDDEN_VARIABLES, allreduce.QUICK_REDUCE_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    return made


def build(library: Library, operator: str = "fused", hidden: int = HIDDEN, **changes: Any) -> NormOperation:
    context = RankContext(1, 2, torch.device("cpu"), cast(dist.ProcessGroup, None), "gfx942:sramecc+")
    problem = RowProblem(Family.ALLREDUCE_NORM, hidden=hidden, **{"world_size": 2, "capacity": 8, **changes})
    return allreduce.build(cast(AiterLibrary, library), context, problem, operator)


def tensors(rows: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    row = torch.ones(rows, HIDDEN, dtype=torch.bfloat16)
    return row, row.clone(), torch.ones(HIDDEN, dtype=torch.bfloat16)


def test_set_up_once_with_the_store_in_place(library: Library) -> None:
    build(library)
    build(library, "split")
    assert [name for name, _ in library.calls] == [
        *("set_custom_all_reduce", "store", "init_distributed_environment", "ensure_model_parallel_initialized"),
        "store back",
    ]
    made = dict(library.calls)
    assert made["set_custom_all_reduce"] == {"enable": True}
    assert made["init_distributed_environment"] == {"world_size": 2, "rank": 1, "local_rank": 1, "backend": "gloo"}
    assert list(made["ensure_model_parallel_initialized"].values()) == [2, 1]
    allreduce.release(cast(AiterLibrary, library))
    assert library.calls[-1][0] == "destroy_model_parallel"


def test_fused(library: Library) -> None:
    rows, residual, weight = tensors()
    result = build(library, "fused_gemma").normalise(rows, residual, weight, 1e-6)
    name, given = library.calls[-1]
    assert name == "tensor_model_parallel_fused_allreduce_rmsnorm"
    assert given["input_"] is rows
    assert given["residual_inp_"] is residual
    assert given["weight_"] is weight
    assert (given["eps"], given["gemma_norm"]) == (1e-6, True)
    assert result.output is not None
    assert float(result.output.sum()) == 0
    assert result.residual is not None
    assert float(result.residual.sum()) == 3 * HIDDEN


def test_without_a_residual_zeros_are_given(library: Library) -> None:
    rows, _, weight = tensors()
    result = build(library, "fused_no_residual").normalise(rows, None, weight, 1e-6)
    given = library.calls[-1][1]["residual_inp_"]
    assert given.shape == rows.shape
    assert given.dtype == rows.dtype
    assert not given.any()
    assert result.residual is None


@pytest.mark.parametrize(
    ("operator", "kind", "emit", "transposed"),
    [
        ("fused_per_token", "per_token", False, False),
        ("fused_per_token_emit", "per_token", True, False),
        ("fused_per_group", "per_group", False, False),
        ("fused_per_group_emit", "per_group", True, False),
        ("fused_per_group_transposed", "per_group", False, True),
        ("fused_mxfp4", "mxfp4", False, False),
        ("fused_mxfp4_emit", "mxfp4", True, False),
    ],
)
def test_quantised(library: Library, operator: str, kind: str, emit: bool, transposed: bool) -> None:
    result = build(library, operator).normalise(*tensors(), 1e-5)
    name, given = library.calls[-1]
    assert name == "tensor_model_parallel_fused_allreduce_rmsnorm_quant"
    assert (given["quant_type"], given["group_size"], given["emit_bf16"]) == (kind, 128, emit)
    assert given["transpose_scale"] == transposed
    assert (result.output is not None) == emit
    assert result.quantised is not None
    assert result.quantised.codes.dtype == torch.uint8
    assert result.quantised.scales.shape == (3, 1)


def test_split(library: Library) -> None:
    rows, residual, weight = tensors()
    result = build(library, "split").normalise(rows, residual, weight, 1e-6)
    assert [name for name, _ in library.calls[-2:]] == ["tensor_model_parallel_all_reduce", "norm"]
    given = library.calls[-1][1]
    wanted = manifest.load_manifest("aiter")["functions"]["aiter.ops.rmsnorm:rmsnorm2d_fwd_with_add"]["parameters"]
    assert list(given) == [each["name"] for each in wanted]
    assert given["residual_in"] is residual
    assert (result.output, result.residual) == (given["out"], given["residual_out"])
    assert given["use_model_sensitive_rmsnorm"] == 0


def test_wrong_arguments(library: Library) -> None:
    rows, residual, weight = tensors()
    operation = build(library)
    wrong: list[tuple[str, tuple[Any, ...]]] = [
        ("rows have shape", (*tensors(9), 1e-6)),
        ("rows have shape", (*tensors(0), 1e-6)),
        ("rows have shape", (rows[:, :256], residual, weight, 1e-6)),
        ("residual has shape", (rows, residual[:2], weight, 1e-6)),
        ("give a residual", (rows, None, weight, 1e-6)),
        ("weight has shape", (rows, residual, weight[:1], 1e-6)),
        ("weight are torch.float32", (rows, residual, weight.float(), 1e-6)),
        ("rows are torch.bfloat16, strides", (rows.t().contiguous().t(), residual, weight, 1e-6)),
    ]
    for message, arguments in wrong:
        with pytest.raises(ValueError, match=message):
            operation.normalise(*arguments)
    with pytest.raises(ValueError, match="give a residual"):
        build(library, "fused_no_residual").normalise(rows, residual, weight, 1e-6)
    assert all(not name.startswith("tensor_model") for name, _ in library.calls)


def test_never_falls_back_silently(library: Library) -> None:
    operation = build(library, "fused_per_token")
    library.custom.should_custom_ar = lambda rows: False
    with pytest.raises(RuntimeError, match=r"3072 bytes do not lie in its window .* declared path is one_stage"):
        operation.normalise(*tensors(), 1e-6)
    library.custom.disabled = True
    with pytest.raises(RuntimeError, match="it is disabled"):
        operation.normalise(*tensors(), 1e-6)
    with pytest.raises(RuntimeError, match="no custom all-reduce for 2 ranks"):
        build(library)
    library.group.device_communicator.ca_comm = None
    with pytest.raises(RuntimeError, match="no custom all-reduce for 2 ranks"):
        build(library)
    library.group.device_communicator.qr_comm.disabled = False
    with pytest.raises(RuntimeError, match="quick-reduce, a lossy codec, is on"):
        build(library)
    library.group.world_size = 4
    with pytest.raises(RuntimeError, match="has 4 ranks, not 2"):
        build(library)
    operation.close()
    with pytest.raises(RuntimeError, match="called after close"):
        operation.normalise(*tensors(), 1e-6)


def test_refused_before_anything_is_set_up(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="for 4 ranks, the group has 2"):
        build(library, world_size=4)
    with pytest.raises(ContractError, match="where 64 are the fewest"):
        build(library, hidden=64, capacity=100000)
    with pytest.raises(ContractError, match="unknown"):
        build(library, "other")
    monkeypatch.setenv("AITER_AR_1STAGE", "0")
    monkeypatch.setenv(allreduce.QUICK_REDUCE_VARIABLE, "FP")
    with pytest.raises(RuntimeError, match="AITER_AR_1STAGE, AITER_QUICK_REDUCE_QUANTIZATION would move"):
        build(library)
    monkeypatch.delenv("AITER_AR_1STAGE")
    monkeypatch.setenv(allreduce.QUICK_REDUCE_VARIABLE, "NONE")
    assert library.calls == []
    build(library)
