"""MoRI's declared standing and behaviour, cell by cell. A pass does not prove that the library behaves so."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from accelerated.contract import ContractError, MaskedSlots, RowOrder, Standing
from accelerated.mori_ep import contract as declared
from accelerated.mori_ep.contract import contract, support
from reference.catalogue import KERNEL_TYPES, architecture
from reference.problem import Problem

#: Claimed on every kernel type of gfx9; the refusals below change one thing at a time.
BASE = Problem(world_size=8, hidden=64, experts=64, top_k=4, capacity=64)
TWO_NODES = dataclasses.replace(BASE, nodes=2)


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
@pytest.mark.parametrize("kernel_type", KERNEL_TYPES)
def test_every_kernel_type_is_claimed_on_one_gfx9_node(kernel_type: str, arch: str) -> None:
    assert support(BASE, kernel_type, arch).standing is Standing.CLAIMED


@pytest.mark.parametrize(
    ("kernel_type", "arch", "sizes", "reason"),
    [
        ("IntraNode", "gfx942", {"nodes": 2}, "runs on one node"),
        ("IntraNodeLL", "gfx942", {"nodes": 2}, "runs on one node"),
        ("IntraNodeLL", "gfx942", {"top_k": 9}, "first 8 slots"),
        ("InterNode", "gfx942", {"nodes": 2}, "counts 8 ranks to a node"),
        ("IntraNode", "gfx942", {"world_size": 16}, "at most 8 ranks on a host"),
        ("InterNodeV1", "gfx942", {"world_size": 6, "experts": 66}, "power of two"),
        ("InterNodeV1", "gfx942", {"nodes": 4, "top_k": 3}, "nodes must not exceed top_k"),
        ("InterNodeV1LL", "gfx950", {"nodes": 2, "capacity": 150}, "multiple of 64"),
        ("AsyncLL", "gfx942", {"top_k": 64}, "below its wave size 64"),
        ("IntraNode", "gfx1250", {"top_k": 32}, "below its wave size 32"),
        ("IntraNode", "gfx1250", {"top_k": 17}, "stages 16 slots"),
        ("IntraNode", "gfx1250", {"capacity": 8192}, "stages 32768 rows per peer at 8 ranks and needs 65536"),
        ("IntraNode", "gfx1250", {"hidden": 7168, "dtype": "float32"}, "bytes of LDS"),
        ("InterNodeV1", "gfx1250", {}, "not available on gfx1250"),
        ("AsyncLL", "gfx1250", {}, "not available on gfx1250"),
        ("AsyncHL", "gfx942", {}, "unknown MoRI kernel type 'AsyncHL'; choose one of IntraNode"),
        ("IntraNode", "gfx90a", {}, "unknown architecture 'gfx90a'"),
        ("mori_low_latency", "gfx1250", {}, "vLLM does not run mori_low_latency on gfx1250"),
    ],
)
def test_refused_with_its_reason(kernel_type: str, arch: str, sizes: dict[str, Any], reason: str) -> None:
    stand = support(dataclasses.replace(BASE, **sizes), kernel_type, arch)
    assert stand.standing is Standing.REFUSED
    assert reason in stand.reason


@pytest.mark.parametrize(
    ("kernel_type", "arch", "sizes"),
    [
        ("IntraNode", "gfx942", {"top_k": 63}),
        ("IntraNode", "gfx950", {"world_size": 2}),
        ("IntraNode", "gfx1250", {"world_size": 4, "capacity": 4096, "hidden": 7168}),
        ("InterNodeV1", "gfx942", {"nodes": 4}),
        ("InterNodeV1LL", "gfx942", {"nodes": 2, "capacity": 128}),
        ("InterNodeV1LL", "gfx942", {"capacity": 150}),
        ("AsyncLL", "gfx942", {"nodes": 2, "top_k": 12}),
        ("mori_high_throughput", "gfx950", {"nodes": 2}),
    ],
)
def test_claimed_up_to_the_limit(kernel_type: str, arch: str, sizes: dict[str, Any]) -> None:
    stand = support(dataclasses.replace(BASE, **sizes), kernel_type, arch)
    assert stand.standing is Standing.CLAIMED, stand.reason


@pytest.mark.parametrize(
    ("kernel_type", "arch", "sizes"),
    [
        ("IntraNode", "gfx942", {"world_size": 1}),
        ("InterNodeV1", "gfx942", {"world_size": 4, "nodes": 4}),
        ("IntraNodeLL", "gfx1250", {}),
    ],
)
def test_unclaimed_where_nobody_goes(kernel_type: str, arch: str, sizes: dict[str, Any]) -> None:
    stand = support(dataclasses.replace(BASE, **sizes), kernel_type, arch)
    assert stand.standing is Standing.UNCLAIMED
    assert stand.reason


def test_only_a_real_host_limits_its_ranks() -> None:
    wide = dataclasses.replace(BASE, world_size=16, nodes=2)
    for kernel_type in ("InterNode", "InterNodeV1", "InterNodeV1LL", "AsyncLL"):
        assert support(wide, kernel_type, "gfx942").standing is Standing.REFUSED
        assert support(wide, kernel_type, "gfx942", ranks_per_host_limit=None).standing is Standing.CLAIMED
    one_node = dataclasses.replace(wide, nodes=1)
    stand = support(one_node, "IntraNode", "gfx942", ranks_per_host_limit=None)
    assert "per-rank state for 8 ranks" in stand.reason


def test_wave_32_loses_rows_on_internode_v1_across_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = dataclasses.replace(architecture("gfx942"), name="narrow", wave_size=32)
    monkeypatch.setattr(declared, "architecture", lambda name: narrow)
    uncached = support.__wrapped__
    assert "wave 32" in uncached(TWO_NODES, "InterNodeV1", "narrow").reason
    assert uncached(TWO_NODES, "InterNodeV1LL", "narrow").standing is Standing.CLAIMED
    assert uncached(BASE, "InterNodeV1", "narrow").standing is Standing.CLAIMED


@pytest.mark.parametrize(
    ("kernel_type", "nodes", "experts", "masked"),
    [
        ("IntraNode", 1, 64, MaskedSlots.DROPPED),
        ("IntraNodeLL", 1, 8, MaskedSlots.DROPPED),
        ("InterNodeV1", 2, 64, MaskedSlots.DROPPED),
        ("InterNodeV1LL", 1, 64, MaskedSlots.DROPPED),
        ("InterNodeV1LL", 2, 64, MaskedSlots.UNMODELLED),
        ("InterNode", 1, 64, MaskedSlots.RANK_ZERO),
        ("InterNode", 1, 8, MaskedSlots.DROPPED),
        ("AsyncLL", 1, 64, MaskedSlots.RANK_ZERO),
        ("AsyncLL", 1, 8, MaskedSlots.UNMODELLED),
    ],
)
def test_masked_slots(kernel_type: str, nodes: int, experts: int, masked: MaskedSlots) -> None:
    problem = dataclasses.replace(BASE, nodes=nodes, experts=experts)
    assert contract(problem, kernel_type, "gfx942").masked_slots is masked


def test_order_fold_levels_and_weights() -> None:
    for kernel_type in KERNEL_TYPES:
        one, two = contract(BASE, kernel_type, "gfx942"), contract(TWO_NODES, kernel_type, "gfx942")
        asynchronous = kernel_type == "AsyncLL"
        assert (one.row_order is RowOrder.GROUPED_BY_SOURCE_RANK) == asynchronous
        assert one.combines_weights != asynchronous
        assert one.fold == ("last" if kernel_type == "IntraNodeLL" else "first")
        assert not one.node_levels
        assert two.node_levels == (kernel_type in ("InterNodeV1", "InterNodeV1LL"))
    assert contract(TWO_NODES, "mori_low_latency", "gfx942") == contract(TWO_NODES, "InterNodeV1LL", "gfx942")
    with pytest.raises(ContractError, match="unknown MoRI kernel type"):
        contract(BASE, "naive", "gfx942")
