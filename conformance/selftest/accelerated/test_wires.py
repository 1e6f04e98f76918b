"""Wire formats of a dispatch: what backends carry, and what MoRI is configured with.

Scope: the scenarios of :mod:`conformance.selftest.accelerated.scenarios_wires` in one spawn per number of ranks, and
the driver's half of MoRI's contract. A pass proves nothing about hardware.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from accelerated.contract import Standing
from accelerated.interface import Operation, Received
from accelerated.mori_ep import contract, launch
from accelerated.wires import row_shape, scale_shape
from conformance.rank.guard import BackendError
from conformance.rank.guarded_exchange import GuardedExchange
from conformance.selftest.accelerated import scenarios_wires
from conformance.selftest.reference import ranks
from reference.catalogue import KERNEL_TYPES
from reference.problem import WIRES, Problem

MODULES = (scenarios_wires.__name__,)
DEEPSEEK = Problem(8, 7168, 256, 8, 128)


@pytest.mark.parametrize("size", [4, 2, 1])
def test_scenarios(size: int, tmp_path: Path) -> None:
    problems = ranks.failures(ranks.run(size, MODULES, tmp_path), MODULES)
    assert not problems, problems


def test_inventory_is_complete() -> None:
    assert len(ranks.scenarios_of(MODULES[0])) == 5


@pytest.mark.parametrize(
    ("wire", "arch", "row", "scales", "dtype"),
    [
        ("", "gfx942", (7168, 2), (0, 0), "bfloat16"),
        ("fp8_token", "gfx942", (7168, 1), (1, 4), "float8_e4m3fnuz"),
        ("fp8_group", "gfx950", (7168, 1), (56, 4), "float8_e4m3fn"),
        ("mxfp4", "gfx950", (3584, 1), (224, 1), "float4_e2m1fn_x2"),
    ],
)
def test_mori_is_configured_as_vllm_does(
    wire: str, arch: str, row: tuple[int, int], scales: tuple[int, int], dtype: str
) -> None:
    problem = replace(DEEPSEEK, wire=wire)
    assert (row_shape(problem), scale_shape(problem)) == (row, scales)
    for kernel_type in KERNEL_TYPES:
        found = launch.config_arguments(problem, kernel_type, arch, rank=3)
        assert (found["scale_dim"], found["scale_type_size"]) == scales
        assert found["data_type"] == dtype
        assert (found["hidden_dim"], found["max_token_type_size"]) == (7168, 2), "combine carries bfloat16 rows"


@pytest.mark.parametrize(
    ("kernel_type", "staged"), [("IntraNode", 8), ("InterNodeV1", 3 + 1 + 8), ("AsyncLL", 3 * 8), ("InterNode", 3 * 8)]
)
def test_scales_take_symmetric_memory(kernel_type: str, staged: int) -> None:
    bare = launch.heap_bytes(DEEPSEEK, kernel_type)
    for wire, row in (("fp8_token", 4), ("fp8_group", 224), ("mxfp4", 224)):
        # In every staged row, and once on either side for all that may arrive.
        more = (staged + 2 * 8) * DEEPSEEK.capacity * row
        assert launch.heap_bytes(replace(DEEPSEEK, wire=wire), kernel_type) - bare == more
        largest = launch.heap_bytes(replace(DEEPSEEK, capacity=4096, wire=wire), kernel_type)
        assert 2 * largest <= launch.session_heap_bytes(DEEPSEEK.world_size), "sized for the element type of four bytes"


@pytest.mark.parametrize(
    ("given", "back", "message"),
    [
        (True, torch.zeros(4, 2), ""),
        (False, None, ""),
        (False, torch.zeros(4, 2), "scales came back from a dispatch without wire"),
        (True, None, "scales is NoneType"),
        (True, torch.zeros(4, 1), r"scales is \[4, 1\] torch.float32; the interface asks for \[4, 2\]"),
        (True, torch.zeros(4, 2, dtype=torch.uint8), r"scales is \[4, 2\] torch.uint8"),
    ],
)
def test_a_rank_checks_what_comes_back(given: bool, back: torch.Tensor | None, message: str) -> None:
    rows = torch.zeros(3, 128, dtype=torch.uint8) if given else torch.zeros(3, 256)
    slots, count = torch.zeros(4, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    received = Received(rows.new_zeros(4, rows.shape[1]), slots, slots.float(), count, scales=back)
    seen: list[int] = []

    def prepare(*arguments: object) -> Received:
        seen.append(len(arguments))
        return received

    problem = Problem(1, 256, 1, 1, 4, wire="fp8_group" if given else "")
    guarded = GuardedExchange(cast("Operation", SimpleNamespace(prepare=prepare)), problem)
    scales = torch.zeros(3, 2) if given else None
    if message:
        with pytest.raises(BackendError, match=message):
            guarded.prepare(rows, slots[:3], slots[:3].float(), scales)
    else:
        assert guarded.prepare(rows, slots[:3], slots[:3].float(), scales) is received
    assert seen == [4 if given else 3], "a backend without wires is not given any"


def test_standing_of_a_quantised_dispatch() -> None:
    def reason(problem: Problem, kernel_type: str, arch: str, standing: Standing) -> str:
        found = contract.support(problem, kernel_type, arch)
        assert found.standing is standing, found
        return found.reason

    claimed, unclaimed, refused = Standing.CLAIMED, Standing.UNCLAIMED, Standing.REFUSED
    for wire in WIRES:
        for kernel_type in KERNEL_TYPES:
            standing = unclaimed if kernel_type == "InterNode" else claimed
            reason(replace(DEEPSEEK, wire=wire), kernel_type, "gfx950", standing)
    fp4 = replace(DEEPSEEK, wire="mxfp4")
    assert "on gfx942 its tests skip it" in reason(fp4, "IntraNode", "gfx942", unclaimed)
    assert "nobody combines in float32" in reason(replace(fp4, dtype="float32"), "IntraNode", "gfx950", unclaimed)
    assert "are 2 bytes; upstream sends whole words" in reason(replace(fp4, hidden=64), "AsyncLL", "gfx950", unclaimed)
    # gfx125x: vectors of 16 bytes, and 128 bytes for each of the slots that a peer has.
    token = replace(DEEPSEEK, world_size=4, wire="fp8_token")
    assert "are 4 bytes; the gfx125x dispatch moves them by 16" in reason(token, "IntraNode", "gfx1250", refused)
    group = replace(token, wire="fp8_group")
    reason(group, "IntraNode", "gfx1250", claimed)
    large = replace(group, capacity=9363)  # 4 · 9362 rows of 224 bytes are the last that fit 65536 slots of 128
    assert "stages 8388608 bytes per peer and needs 8389248" in reason(large, "IntraNode", "gfx1250", refused)
    assert reason(replace(large, capacity=9362), "IntraNode", "gfx1250", claimed) == ""
    full = replace(token, wire="mxfp4", hidden=4096, capacity=16384)  # 128 bytes in every slot
    assert reason(full, "IntraNode", "gfx1250", claimed) == ""
