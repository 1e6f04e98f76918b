"""Codecs and ways of calling: what MoRI's contract says of each kernel type, and what the adapter calls.

Scope: the driver's half and a library that only records. A pass proves nothing about hardware.
"""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from accelerated.contract import Standing
from accelerated.mori_ep import calls, contract, launch
from accelerated.mori_ep.adapter import MoriOperation, MoriSession
from accelerated.standin.mori_ep.codecs import Codec, kernel_name
from accelerated.standin.mori_ep.config import EpDispatchCombineConfig, recv_capacity
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


@pytest.mark.parametrize("tokens", [1, 2, 5, 128])
@pytest.mark.parametrize("mode", ["capped", "capped above", "weightless"])
def test_caps_take_effect_and_leave_room_for_what_may_be_sent(mode: str, tokens: int) -> None:
    problem = replace(DEEPSEEK, capacity=tokens, modes=(mode,))
    cap = launch.config_arguments(problem, "InterNodeV1", "gfx950", 0)["max_total_recv_tokens"]
    assert isinstance(cap, int)
    assert cap == calls.receive_cap(problem)
    assert (cap > 0) == mode.startswith("capped")
    most = -(-tokens // 2) if mode == "capped" else tokens
    # The library's own reading, and the double's, which shares no code with it.
    read = 8 * (min(-(-min(cap, 8 * tokens) // 8), tokens) if cap else tokens)
    config = SimpleNamespace(max_num_inp_token_per_rank=tokens, world_size=8, max_total_recv_tokens=cap)
    assert recv_capacity(cast("EpDispatchCombineConfig", config)) == read == 8 * most == problem.most_rows
    assert problem.most_tokens == most


def test_a_cap_runs_where_combine_stages_nothing_in_what_it_makes_smaller() -> None:
    for kernel_type in KERNEL_TYPES:
        alone = contract.support(replace(DEEPSEEK, modes=("capped",)), kernel_type, "gfx950")
        beside = contract.support(replace(DEEPSEEK, modes=("zero-copy", "capped")), kernel_type, "gfx950")
        pushes = kernel_type in ("IntraNode", "IntraNodeLL")
        assert alone.standing is (Standing.REFUSED if pushes else Standing.UNCLAIMED)
        assert beside.standing is (Standing.UNCLAIMED if pushes else Standing.REFUSED)
        assert ("use zero-copy" in alone.reason) == pushes
        above = contract.support(replace(DEEPSEEK, modes=("capped above",)), kernel_type, "gfx950")
        assert above.standing is Standing.CLAIMED
        mapped = contract.contract(replace(DEEPSEEK, modes=("capped",)), kernel_type, "gfx950").source_map
        assert mapped == (kernel_type != "InterNode"), "its map is decoded with another stride"


@pytest.mark.parametrize("codec", ["fp8_blockwise", "fp4_blockwise"])
def test_kernels_of_combine_are_those_that_the_double_derives_apart(codec: str) -> None:
    seen = set()
    for hidden, blocks, top_k, world_size, modes in product(
        (512, 1024, 1536, 768), (1, 2, 4, 8), (7, 8, 9), (4, 8), ((), ("weightless",))
    ):
        problem = Problem(world_size, hidden, 32, top_k, 8, codec=codec, scale_dim=blocks, modes=modes)
        for kernel_type in ("IntraNode", "IntraNodeLL", "AsyncLL"):
            declared = contract.contract(problem, kernel_type, "gfx950").kernels
            if kernel_type == "AsyncLL":
                assert declared is None
                continue
            assert declared is not None
            for row in (hidden, hidden // 2, hidden - 512, 64):
                name, fast = kernel_name(Codec(codec, torch.float8_e4m3fn, blocks), row, top_k, world_size, not modes)
                if row > 0:
                    assert declared.of(row) == name
                    assert (row in calls.fast_rows(problem, kernel_type)) == fast
                    seen.add(name)
    assert len(seen) == 5, "the generic one, and two widths by two numbers of slots"
    plain = contract.contract(replace(DEEPSEEK, codec="fp8_direct_cast"), "IntraNode", "gfx950")
    assert plain.kernels is None


def test_async_adds_up_fast_with_weights_and_on_any_number_of_ranks() -> None:
    problem = Problem(2, 1024, 32, 8, 8, codec="fp8_blockwise", scale_dim=8)
    assert calls.fast_rows(problem, "AsyncLL") == (1024,), "the width is rounded down, and the row is the whole one"
    assert calls.fast_rows(replace(problem, top_k=7), "AsyncLL") == ()
    assert calls.fast_rows(replace(problem, scale_dim=4), "AsyncLL") == tuple(range(512, 516, 8))


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
        self.total = torch.tensor([2])
        self.handle = SimpleNamespace(
            total_recv_token_num=torch.tensor([2]), disp_tok_id_to_src_tok_id_local=torch.tensor([3, 1, 9])
        )

    def dispatch(self, rows: torch.Tensor, weights: Any, scales: Any, ids: torch.Tensor, **named: Any) -> Any:
        self.calls.append(("dispatch", {"weights": weights is not None, **named}))
        found = rows.new_zeros(5, rows.shape[1]), torch.zeros(5, 2), None, ids.new_zeros(5, 2), self.total
        return (*found, self.handle) if named.get("return_routing") else found

    def combine(self, rows: torch.Tensor, weights: Any, ids: torch.Tensor, **named: Any) -> Any:
        self.calls.append(("combine", {"weights": weights is not None, **named}))
        return rows, weights

    def get_registered_combine_input_buffer(self, dtype: torch.dtype, hidden: int) -> torch.Tensor:
        self.calls.append(("buffer", {"dtype": dtype, "hidden": hidden}))
        return self.buffer[:, :hidden]


def operation(*modes: str, kernel_type: str = "IntraNode", **manner: Any) -> tuple[MoriOperation, _Op]:
    problem = Problem(1, 8, 4, 2, 5, modes=modes, **manner)
    op = _Op()
    return MoriOperation(cast("MoriSession", SimpleNamespace()), op, problem, kernel_type), op


def given(hidden: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.ones(3, hidden, dtype=torch.bfloat16), torch.zeros(3, 2, dtype=torch.int32), torch.ones(3, 2)


def test_weights_are_neither_dispatched_nor_combined_without_them() -> None:
    made, op = operation("weightless")
    received = made.prepare(*given())
    assert made.finalize(received.rows, received).weights is None
    assert op.calls == [("dispatch", {"weights": False}), ("combine", {"weights": False})]


def test_the_count_outlives_the_librarys_counter_which_comes_back_beside_it() -> None:
    made, op = operation()
    received = made.prepare(*given())
    assert received.counter is op.total
    op.total.zero_()  # as combine does
    assert received.count.tolist() == [2]


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


def test_no_more_tokens_are_dispatched_than_a_cap_leaves_room_for() -> None:
    made, _ = operation("capped")
    received = made.prepare(*given())
    made.finalize(received.rows, received)
    rows, ids, weights = (torch.cat([one, one[:1]]) for one in given())
    with pytest.raises(ValueError, match="do not fit capacity 3"):
        made.prepare(rows, ids, weights)
    legacy = operation("capped", kernel_type="InterNode")[0].prepare(*given())
    assert legacy.source_map is None, "its stride is not the one that the library decodes it with"


def test_the_kernel_of_combine_is_named_where_the_library_names_it() -> None:
    for manner, kernel_type, named in (
        ({"codec": "fp8_blockwise", "scale_dim": 2}, "IntraNode", True),
        ({"codec": "fp8_blockwise", "scale_dim": 2}, "AsyncLL", False),
        ({"codec": "fp8_direct_cast"}, "IntraNode", False),
        ({}, "IntraNode", False),
    ):
        made, op = operation(kernel_type=kernel_type, **manner)
        op.dispatch_recv = op.combine_recv = lambda: None  # type: ignore[attr-defined]
        for told in ("", "a kernel"):
            if told:
                op._last_combine_kernel_name = told  # type: ignore[attr-defined]
            received = made.prepare(*given())
            assert made.finalize(received.rows, received).kernel == (told if named else "")


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
