"""What the adapter calls, with which arguments and in which order, on a library that only records.

Scope: one rank, no communication. A pass does not prove that MoRI computes anything with these calls.
"""

from __future__ import annotations

import enum
import os
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from accelerated.interface import RankContext
from accelerated.mori_ep import adapter
from accelerated.mori_ep.adapter import MoriOperation, MoriSession
from accelerated.mori_ep.library import MoriLibrary
from accelerated.wires import as_bytes, row_shape, scale_shape
from reference.catalogue import KERNEL_TYPES
from reference.problem import Problem

PROBLEM = Problem(world_size=1, hidden=8, experts=4, top_k=2, capacity=5)
Calls = list[tuple[str, dict[str, Any]]]


class KernelType(enum.Enum):
    IntraNode = 0
    InterNode = 1
    InterNodeV1 = 2
    InterNodeV1LL = 3
    AsyncLL = 4
    IntraNodeLL = 5


class RecordingOp:
    """Returns buffers of full capacity and writes every call down."""

    def __init__(self, config: SimpleNamespace, calls: Calls) -> None:
        self.calls = calls
        self.rows = torch.zeros(PROBLEM.capacity, PROBLEM.hidden, dtype=torch.bfloat16)
        self.weights = torch.zeros(PROBLEM.capacity, PROBLEM.top_k)
        self.total = torch.tensor([3], dtype=torch.int32)
        calls.append(("op", vars(config)))

    def dispatch(self, rows: Any, weights: Any, scales: Any, ids: Any) -> tuple[Any, ...]:
        self.calls.append(("dispatch", {"rows": rows, "weights": weights, "scales": scales, "ids": ids}))
        if scales is None:
            return self.rows, self.weights, None, self.weights.int(), self.total
        codes = torch.full((PROBLEM.capacity, rows.shape[1]), 9, dtype=torch.uint8).view(rows.dtype)
        return codes, self.weights, scales.new_zeros(PROBLEM.capacity, scales.shape[1]), self.weights.int(), self.total

    def dispatch_recv(self) -> None:
        self.calls.append(("dispatch_recv", {}))

    def combine(self, rows: Any, weights: Any, ids: Any) -> tuple[Any, Any]:
        self.calls.append(("combine", {"rows": rows, "weights": weights, "ids": ids}))
        self.total.zero_()
        return self.rows, self.weights

    def combine_recv(self) -> None:
        self.calls.append(("combine_recv", {}))

    def get_dispatch_src_token_pos(self) -> torch.Tensor:
        return torch.tensor([0, 4, 12], dtype=torch.int32)

    def __del__(self) -> None:
        self.calls.append(("del op", {}))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    recorded: Calls = []
    monkeypatch.setattr(adapter, "_register_group", lambda group: recorded.append(("register", {"group": group})))
    monkeypatch.setattr(adapter, "_unregister_group", lambda: None)
    monkeypatch.setenv("MORI_SHMEM_HEAP_SIZE", "1M")
    monkeypatch.delenv("MORI_EP_COMM", raising=False)
    return recorded


def session(calls: Calls, arch: str = "gfx942", seen: str | None = None, status: int = 0) -> MoriSession:
    def init(name: str) -> int:
        calls.append(("init", {"name": name, "heap": os.environ["MORI_SHMEM_HEAP_SIZE"]}))
        return status

    ops = SimpleNamespace(
        EpDispatchCombineConfig=SimpleNamespace,
        EpDispatchCombineKernelType=KernelType,
        EpDispatchCombineOp=lambda config: RecordingOp(config, calls),
    )
    shmem = SimpleNamespace(shmem_torch_process_group_init=init, shmem_finalize=lambda: calls.append(("finalize", {})))
    library = MoriLibrary(ops, shmem, lambda: seen or arch, "0", "nowhere")
    group = cast("torch.distributed.ProcessGroup", "the group")
    return MoriSession(library, RankContext(0, 1, torch.device("cpu"), group, arch))


def names(calls: Calls) -> list[str]:
    return [name for name, _ in calls]


def inputs(tokens: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = torch.ones(tokens, PROBLEM.hidden, dtype=torch.bfloat16)
    ids = torch.arange(2 * tokens, dtype=torch.int32).view(tokens, 2) % 4
    return rows, ids, torch.ones(tokens, 2)


def build(calls: Calls, kernel_type: str = "IntraNode") -> MoriOperation:
    return session(calls).build(PROBLEM, kernel_type)


def test_whole_life_in_order(calls: Calls) -> None:
    opened = session(calls)
    operation = opened.build(PROBLEM, "IntraNode")
    received = operation.prepare(*inputs())
    operation.finalize(received.rows, received)
    operation.close()
    opened.close()
    opened.close()
    assert names(calls) == ["register", "init", "op", "dispatch", "combine", "del op", "finalize"]
    assert calls[0][1] == {"group": "the group"}
    assert calls[1][1]["name"] == "default"
    assert calls[1][1]["heap"] not in ("1M", None), "the heap is sized before shmem reads it"
    assert calls[2][1]["kernel_type"] is KernelType.IntraNode
    assert calls[2][1]["data_type"] is torch.bfloat16
    assert calls[2][1]["gpu_per_node"] == 1


def test_gfx125x_never_touches_shmem(calls: Calls) -> None:
    opened = session(calls, arch="gfx1250")
    opened.build(PROBLEM, "IntraNode").close()
    opened.close()
    assert names(calls) == ["op", "del op"]


def test_the_first_operator_sizes_the_cco_communicator(calls: Calls) -> None:
    opened = session(calls, arch="gfx1250")
    opened.build(PROBLEM, "IntraNode")
    with pytest.raises(RuntimeError, match="build the largest operator first"):
        opened.build(Problem(1, 7168, 4, 2, 65536), "IntraNode")


def test_the_communicator_can_be_forced(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MORI_EP_COMM", " CCO ")
    opened = session(calls)
    with pytest.raises(RuntimeError, match="AsyncLL puts through shmem"):
        opened.build(PROBLEM, "AsyncLL")
    monkeypatch.setenv("MORI_EP_COMM", "shmem")
    session(calls, arch="gfx1250")
    assert names(calls) == ["register", "init"]


def test_a_larger_heap_of_the_user_stays(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MORI_SHMEM_HEAP_SIZE", "64GiB")
    session(calls)
    assert calls[1][1]["heap"] == "64GiB"


def test_arguments_are_what_raw_pointers_need(calls: Calls) -> None:
    operation = build(calls)
    rows, ids, weights = inputs()
    strided = rows.repeat(1, 2)[:, ::2]
    received = operation.prepare(strided, ids.long(), weights.double())
    sent = calls[-1][1]
    assert sent["scales"] is None
    assert (sent["ids"].dtype, sent["weights"].dtype) == (torch.int32, torch.float32)
    assert all(sent[name].is_contiguous() for name in ("rows", "ids", "weights"))
    assert received.rows.shape == (PROBLEM.capacity, PROBLEM.hidden), "nothing is cut to the count"
    operation.finalize(received.rows, received)
    combined = calls[-1][1]
    assert combined["ids"] is sent["ids"], "this rank's own ids as dispatched"
    assert combined["weights"].shape == (PROBLEM.capacity, PROBLEM.top_k), "a slice of no rows would mean no weights"


@pytest.mark.parametrize(
    ("wire", "arch", "given", "sent", "scale"),
    [
        ("fp8_token", "gfx942", torch.float8_e4m3fnuz, torch.float8_e4m3fnuz, torch.float32),
        ("fp8_group", "gfx950", torch.uint8, torch.float8_e4m3fn, torch.float32),
        ("mxfp4", "gfx950", torch.uint8, torch.float4_e2m1fn_x2, torch.uint8),
        ("mxfp4", "gfx950", torch.float4_e2m1fn_x2, torch.float4_e2m1fn_x2, torch.float8_e8m0fnu),
    ],
)
def test_codes_go_in_the_type_that_has_kernels(
    calls: Calls, wire: str, arch: str, given: torch.dtype, sent: torch.dtype, scale: torch.dtype
) -> None:
    problem = replace(PROBLEM, hidden=256, wire=wire)
    operation = session(calls, arch).build(problem, "IntraNode")
    assert calls[-1][1]["data_type"] is sent
    columns, (groups, size) = row_shape(problem)[0], scale_shape(problem)
    # A column-major pair of scales, and every second column of codes: MoRI would read on from the first.
    codes = torch.arange(6 * columns).to(torch.uint8).view(3, 2 * columns)[:, ::2]
    scales = torch.arange(groups * 3 * size).to(torch.uint8).view(groups, 3 * size).view(scale).t()
    _, ids, weights = inputs()
    received = operation.prepare(codes.view(given), ids, weights, scales)
    passed = calls[-1][1]
    assert (passed["rows"].dtype, passed["scales"].dtype) == (sent, scale)
    assert passed["rows"].is_contiguous()
    assert passed["scales"].is_contiguous()
    assert torch.equal(passed["rows"].view(torch.uint8), codes)
    assert torch.equal(as_bytes(passed["scales"]), as_bytes(scales))
    assert received.rows.dtype is given
    assert received.rows.view(torch.uint8).tolist() == [[9] * columns] * PROBLEM.capacity
    assert received.scales is not None
    assert (received.scales.dtype, received.scales.shape) == (scale, (PROBLEM.capacity, groups))


def test_the_count_is_a_copy(calls: Calls) -> None:
    operation = build(calls)
    received = operation.prepare(*inputs())
    combined = operation.finalize(received.rows, received)
    assert received.count.tolist() == [3], "combine clears the library's counter"
    assert combined.output.shape == (3, PROBLEM.hidden)
    assert combined.weights is not None
    assert combined.weights.shape == (3, PROBLEM.top_k)


def test_async_receives_after_each_send_and_passes_no_weights(calls: Calls) -> None:
    operation = build(calls, "AsyncLL")
    received = operation.prepare(*inputs())
    combined = operation.finalize(received.rows, received)
    assert names(calls)[3:] == ["dispatch", "dispatch_recv", "combine", "combine_recv"]
    assert calls[3][1]["weights"] is not None, "dispatch needs them"
    assert calls[5][1]["weights"] is None
    assert combined.weights is None


@pytest.mark.parametrize("kernel_type", KERNEL_TYPES)
def test_source_map_is_decoded_and_only_lives_inside_the_round(calls: Calls, kernel_type: str) -> None:
    operation = build(calls, kernel_type)
    received = operation.prepare(*inputs())
    assert received.source_map is not None
    assert received.source_map().tolist() == [[0, 0], [0, 4], [2, 2]]
    operation.finalize(received.rows, received)
    with pytest.raises(RuntimeError, match="after finalize"):
        received.source_map()


@pytest.mark.parametrize(("kernel_type", "first_row"), [("IntraNode", [1, 2]), ("InterNode", [2, 2])])
def test_source_map_stride(calls: Calls, kernel_type: str, first_row: list[int]) -> None:
    two = Problem(2, PROBLEM.hidden, PROBLEM.experts, PROBLEM.top_k, PROBLEM.capacity)
    opened = session(calls)
    operation = MoriOperation(opened, opened.build(PROBLEM, kernel_type)._op, two, kernel_type)
    source_map = operation.prepare(*inputs()).source_map
    assert source_map is not None
    assert source_map()[2].tolist() == first_row


def test_rounds_alternate(calls: Calls) -> None:
    operation = build(calls)
    first = operation.prepare(*inputs())
    with pytest.raises(RuntimeError, match="prepare called twice"):
        operation.prepare(*inputs())
    operation.finalize(first.rows, first)
    with pytest.raises(RuntimeError, match="finalize called without prepare"):
        operation.finalize(first.rows, first)
    operation.prepare(*inputs())
    with pytest.raises(RuntimeError, match="rows of another round"):
        operation.finalize(first.rows, first)
    assert names(calls)[3:] == ["dispatch", "combine", "dispatch"]


def test_what_would_be_written_out_of_bounds_is_refused(calls: Calls) -> None:
    operation = build(calls)
    rows, ids, weights = inputs()
    too_many, wide_elements, wide_rows = inputs(6), (rows.float(), ids, weights), (rows.repeat(1, 2), ids, weights)
    for bad in (too_many, wide_elements, wide_rows, (rows, ids[:2], weights)):
        with pytest.raises(ValueError, match="do not fit"):
            operation.prepare(*bad)
    received = operation.prepare(rows, ids, weights)
    with pytest.raises(ValueError, match="do not fit"):
        operation.finalize(received.rows.float(), received)
    assert names(calls)[3:] == ["dispatch"]


def test_a_session_outlives_its_operations(calls: Calls) -> None:
    opened = session(calls)
    operation = opened.build(PROBLEM, "IntraNode")
    with pytest.raises(RuntimeError, match="1 operation"):
        opened.close()
    operation.close()
    operation.close()
    with pytest.raises(RuntimeError, match="closed operation"):
        operation.prepare(*inputs())
    opened.close()
    with pytest.raises(RuntimeError, match="cannot be initialised twice"):
        opened.build(PROBLEM, "IntraNode")
    assert names(calls)[2:] == ["op", "del op", "finalize"]


def test_what_cannot_start_says_why(calls: Calls) -> None:
    with pytest.raises(RuntimeError, match="MoRI sees gfx950 but the suite was told gfx942"):
        session(calls, seen="gfx950")
    assert calls == []
    with pytest.raises(RuntimeError, match="returned 3"):
        session(calls, status=3)
    opened = session(calls)
    with pytest.raises(ValueError, match="for 2 ranks, the group has 1"):
        opened.build(Problem(2, 8, 4, 2, 5), "IntraNode")
    with pytest.raises(RuntimeError, match="set MORI_SHMEM_HEAP_SIZE higher"):
        opened.build(Problem(1, 7168, 4, 2, 1 << 20), "IntraNode")
