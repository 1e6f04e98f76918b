"""Codecs and ways of calling: what MoRI's contract says of each kernel type, and what the adapter calls.

Scope: the driver's half and a library that only records. A pass proves nothing about hardware.
"""

from __future__ import annotations

import os
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from accelerated.contract import Standing
from accelerated.mori_ep import calls, contract, launch
from accelerated.mori_ep.adapter import MoriOperation, MoriSession
from reference.catalogue import KERNEL_TYPES, architecture
from reference.problem import MODES, Problem, ProblemError, wire_format

DEEPSEEK = Problem(8, 7168, 256, 8, 128)
CODED = {
    "fp8_direct_cast": replace(DEEPSEEK, codec="fp8_direct_cast"),
    "fp8_blockwise": replace(DEEPSEEK, codec="fp8_blockwise", scale_dim=56),
    "fp4_blockwise": replace(DEEPSEEK, codec="fp4_blockwise", scale_dim=56),
}


@pytest.mark.parametrize(
    ("codec", "runs"),
    [
        ("fp8_direct_cast", {"IntraNode", "IntraNodeLL", "InterNodeV1", "InterNodeV1LL", "AsyncLL"}),
        ("fp8_blockwise", {"IntraNode", "IntraNodeLL", "AsyncLL"}),
        ("fp4_blockwise", {"IntraNode", "IntraNodeLL"}),
    ],
)
def test_which_kernel_type_carries_a_codec_out(codec: str, runs: set[str]) -> None:
    problem = CODED[codec]
    for kernel_type in KERNEL_TYPES:
        support = contract.support(problem, kernel_type, "gfx950")
        if kernel_type in runs:
            assert support.standing is Standing.CLAIMED, support
            found = contract.contract(problem, kernel_type, "gfx950").codec
            assert found is not None
            assert (found.name, found.rounds_partials) == (codec, kernel_type.startswith("InterNodeV1"))
        elif codec == "fp8_direct_cast":  # the legacy kernels ignore it
            assert support.standing is Standing.UNCLAIMED
            declared = contract.contract(problem, kernel_type, "gfx950")
            assert declared.codec is None
            assert declared.ignored_codec is not None
        else:
            assert support.standing is Standing.REFUSED
            assert support.reason.startswith(f"{codec}: combine raises ValueError on {kernel_type}")


@pytest.mark.parametrize(
    ("problem", "kernel_type", "arch", "reason"),
    [
        (CODED["fp4_blockwise"], "IntraNode", "gfx942", "the operator raises ValueError on gfx942"),
        (replace(CODED["fp8_blockwise"], modes=("zero-copy",)), "IntraNode", "gfx950", "read the registered buffer"),
        (replace(CODED["fp8_blockwise"], hidden=128, top_k=1), "AsyncLL", "gfx950", "takes 352 bytes and has 268"),
        (replace(CODED["fp8_blockwise"], hidden=7176), "AsyncLL", "gfx950", "quantises blocks of 129 elements"),
        (replace(DEEPSEEK, modes=("zero-copy",)), "InterNodeV1", "gfx950", "ignores use_external_inp_buf"),
        (replace(DEEPSEEK, modes=("weightless",)), "AsyncLL", "gfx950", "faults without them"),
        (replace(DEEPSEEK, modes=("handle",)), "IntraNode", "gfx950", "a replay on IntraNode moves nothing"),
        (replace(DEEPSEEK, modes=("handle",)), "IntraNodeLL", "gfx950", "raise NotImplementedError on IntraNodeLL"),
        (replace(DEEPSEEK, modes=("capped", "capped above")), "IntraNode", "gfx950", "one max_total_recv_tokens"),
    ],
)
def test_what_does_not_run_is_refused_with_its_reason(
    problem: Problem, kernel_type: str, arch: str, reason: str
) -> None:
    found = contract.support(problem, kernel_type, arch)
    assert found.standing is Standing.REFUSED
    assert reason in found.reason


def test_a_codec_is_ignored_without_a_word_for_zero_copy() -> None:
    problem = replace(CODED["fp8_direct_cast"], modes=("zero-copy",))
    for kernel_type in ("IntraNode", "IntraNodeLL"):
        declared = contract.contract(problem, kernel_type, "gfx942")
        assert declared.codec is None
        assert declared.ignored_codec is not None
        assert declared.ignored_codec.payload.name == architecture("gfx942").fp8.dtype
    assert not contract.contract(replace(DEEPSEEK, modes=("handle",)), "InterNodeV1", "gfx942").idle_ranks
    assert not contract.contract(replace(DEEPSEEK, modes=("weightless",)), "IntraNode", "gfx942").combines_weights


@pytest.mark.parametrize(("mode", "cap"), [("capped", 8 * 127 + 1), ("capped above", 2 * 8 * 128), ("weightless", 0)])
def test_caps_leave_room_for_every_routing(mode: str, cap: int) -> None:
    problem = replace(DEEPSEEK, modes=(mode,))
    assert calls.receive_cap(problem) == cap
    assert launch.config_arguments(problem, "IntraNode", "gfx950", 0)["max_total_recv_tokens"] == cap
    if cap:
        assert 8 * min(-(-cap // 8), 128) == 8 * 128, "as the library reads it"


def test_configuration_follows_codec_and_modes() -> None:
    found = launch.config_arguments(CODED["fp8_blockwise"], "IntraNode", "gfx950", 0)
    assert (found["quant_type"], found["use_external_inp_buf"]) == ("fp8_blockwise", True)
    found = launch.config_arguments(replace(DEEPSEEK, modes=("zero-copy",)), "IntraNode", "gfx950", 0)
    assert (found["quant_type"], found["use_external_inp_buf"]) == ("none", False)


def test_the_scale_dimension_is_in_the_environment_while_an_operator_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    name = launch.SCALE_DIM_VARIABLE
    for before in (None, "7"):
        monkeypatch.delenv(name, raising=False) if before is None else monkeypatch.setenv(name, before)
        with launch.scale_dim(CODED["fp8_blockwise"]):
            assert os.environ[name] == "56"
        assert os.environ.get(name) == before
        with launch.scale_dim(DEEPSEEK):
            assert os.environ.get(name) == before


@pytest.mark.parametrize(
    ("name", "row", "scales", "size"), [("fp8_tensor", 64, 0, 4), ("fp8_raw3x4", 64, 3, 4), ("fp8_raw5x1", 64, 5, 1)]
)
def test_raw_scales_are_named(name: str, row: int, scales: int, size: int) -> None:
    wire = wire_format(name)
    assert (wire.row_bytes(64), wire.scales(64), wire.scale_bytes) == (row, scales, size)
    for wrong in ("fp8_raw0x4", "fp8_raw3x2", "fp8_raw3", "raw3x4"):
        with pytest.raises(ProblemError, match="choose one of fp8_token"):
            wire_format(wrong)
    for digits in (9, 30, 5000):  # Python reads no number of more than 4300
        with pytest.raises(ProblemError, match=r"wire is 'fp8_raw9"):
            Problem(2, 64, 4, 2, 4, wire=f"fp8_raw{'9' * digits}x4")
    assert Problem(2, 64, 4, 2, 4, wire="fp8_raw64x1").wire
    with pytest.raises(ProblemError, match=r"65 scales for rows of 64 elements; give at most one"):
        Problem(2, 64, 4, 2, 4, wire="fp8_raw65x1")
    with pytest.raises(ProblemError, match=r"in that order$"):
        replace(DEEPSEEK, modes=tuple(reversed(MODES[:2])))


class _Op:
    """Records the named arguments of every call."""

    local_expert_count = torch.zeros(4, dtype=torch.int32)

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.buffer = torch.zeros(5, 8, dtype=torch.bfloat16)
        self.handle = SimpleNamespace(
            total_recv_token_num=torch.tensor([2]), disp_tok_id_to_src_tok_id_local=torch.tensor([3, 1, 9])
        )

    def dispatch(self, rows: torch.Tensor, weights: Any, scales: Any, ids: torch.Tensor, **named: Any) -> Any:
        self.calls.append(("dispatch", {"weights": weights is not None, **named}))
        found = rows.new_zeros(5, rows.shape[1]), torch.zeros(5, 2), None, ids.new_zeros(5, 2), torch.tensor([2])
        return (*found, self.handle) if named.get("return_routing") else found

    def combine(self, rows: torch.Tensor, weights: Any, ids: torch.Tensor, **named: Any) -> Any:
        self.calls.append(("combine", {"weights": weights is not None, **named}))
        return rows, weights

    def get_registered_combine_input_buffer(self, dtype: torch.dtype, hidden: int) -> torch.Tensor:
        self.calls.append(("buffer", {"dtype": dtype, "hidden": hidden}))
        return self.buffer[:, :hidden]


def operation(*modes: str) -> tuple[MoriOperation, _Op]:
    problem = Problem(1, 8, 4, 2, 5, modes=modes)
    op = _Op()
    return MoriOperation(cast("MoriSession", SimpleNamespace()), op, problem, "IntraNode"), op


def given(hidden: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.ones(3, hidden, dtype=torch.bfloat16), torch.zeros(3, 2, dtype=torch.int32), torch.ones(3, 2)


def test_weights_are_neither_dispatched_nor_combined_without_them() -> None:
    made, op = operation("weightless")
    received = made.prepare(*given())
    assert made.finalize(received.rows, received).weights is None
    assert op.calls == [("dispatch", {"weights": False}), ("combine", {"weights": False})]


def test_zero_copy_takes_rows_from_the_registered_buffer_only() -> None:
    made, op = operation("zero-copy")
    received = made.prepare(*given(hidden=6))
    assert op.calls[1] == ("buffer", {"dtype": torch.bfloat16, "hidden": 6})
    with pytest.raises(ValueError, match="outside of the registered buffer"):
        made.finalize(received.rows, received)
    assert received.buffer is not None
    for wrong in (received.buffer[:, :4], received.buffer.view(torch.int16)):
        with pytest.raises(ValueError, match="of another length or type"):
            made.finalize(wrong, received)
    made.finalize(received.buffer, received)


def test_a_handle_is_replayed_and_has_the_source_map() -> None:
    made, op = operation("handle", "expert count")
    received = made.prepare(*given())
    assert received.source_map is not None
    assert received.source_map().tolist() == [[0, 3], [0, 1]]
    assert received.expert_count is op.local_expert_count
    made.finalize(received.rows, received)
    assert received.replay is not None
    rows, _, weights = given()
    with pytest.raises(ValueError, match="2 rows to replay a routing of 3 tokens"):
        received.replay(rows[:2], weights[:2], None)
    for wrong in (None, weights[:, :1]):
        with pytest.raises(ValueError, match=r"replay takes weights \[3, 2\]"):
            received.replay(rows, wrong, None)
    again = received.replay(rows, weights, None)
    made.finalize(again.rows, again)
    assert [named for _, named in op.calls] == [
        {"weights": True, "call_local_expert_count": True, "return_routing": True},
        {"weights": True, "routing": op.handle},
        {"weights": True, "call_local_expert_count": True, "routing": op.handle},
        {"weights": True, "routing": op.handle},
    ]
