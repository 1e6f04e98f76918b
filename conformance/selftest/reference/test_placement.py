"""Expert placement against golden tables of vLLM 0.33.0 and against its invariants.

Scope: reference/placement.py. What a pass does not prove: that an installed vLLM still computes these tables.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference import placement as p

Owned = tuple[tuple[int, ...], ...]

# (W, E): owned ids per rank under linear and under round-robin, global_to_physical, physical_to_global.
GOLDEN: dict[tuple[int, int], tuple[Owned, Owned, tuple[int, ...], tuple[int, ...]]] = {
    (2, 8): (
        ((0, 1, 2, 3), (4, 5, 6, 7)),
        ((0, 2, 4, 6), (1, 3, 5, 7)),
        (0, 4, 1, 5, 2, 6, 3, 7),
        (0, 2, 4, 6, 1, 3, 5, 7),
    ),
    (2, 9): (
        ((0, 1, 2, 3, 4), (5, 6, 7, 8)),
        ((0, 2, 4, 6, 8), (1, 3, 5, 7)),
        (0, 5, 1, 6, 2, 7, 3, 8, 4),
        (0, 2, 4, 6, 8, 1, 3, 5, 7),
    ),
    (3, 7): (
        ((0, 1, 2), (3, 4), (5, 6)),
        ((0, 3, 6), (1, 4), (2, 5)),
        (0, 3, 5, 1, 4, 6, 2),
        (0, 3, 6, 1, 4, 2, 5),
    ),
    (4, 3): (((0,), (1,), (2,), ()), ((0,), (1,), (2,), ()), (0, 1, 2), (0, 1, 2)),
    (4, 8): (
        ((0, 1), (2, 3), (4, 5), (6, 7)),
        ((0, 4), (1, 5), (2, 6), (3, 7)),
        (0, 2, 4, 6, 1, 3, 5, 7),
        (0, 4, 1, 5, 2, 6, 3, 7),
    ),
    (4, 10): (
        ((0, 1, 2), (3, 4, 5), (6, 7), (8, 9)),
        ((0, 4, 8), (1, 5, 9), (2, 6), (3, 7)),
        (0, 3, 6, 8, 1, 4, 7, 9, 2, 5),
        (0, 4, 8, 1, 5, 9, 2, 6, 3, 7),
    ),
    (8, 10): (
        ((0, 1), (2, 3), (4,), (5,), (6,), (7,), (8,), (9,)),
        ((0, 8), (1, 9), (2,), (3,), (4,), (5,), (6,), (7,)),
        (0, 2, 4, 5, 6, 7, 8, 9, 1, 3),
        (0, 8, 1, 9, 2, 3, 4, 5, 6, 7),
    ),
}

sizes = st.tuples(st.integers(1, 96), st.integers(1, 24))  # (E, W)
strategies = st.sampled_from(p.STRATEGIES)


@pytest.mark.parametrize(("world_size", "experts"), GOLDEN)
def test_golden_tables(world_size: int, experts: int) -> None:
    linear, round_robin, forward, backward = GOLDEN[world_size, experts]
    ranks = range(world_size)
    assert tuple(p.owned_experts(experts, world_size, r) for r in ranks) == linear
    assert tuple(p.owned_experts(experts, world_size, r, "round_robin") for r in ranks) == round_robin
    assert p.global_to_physical(experts, world_size) == forward
    assert p.physical_to_global(experts, world_size) == backward
    assert tuple(p.local_to_global(experts, world_size, r) for r in ranks) == round_robin


def test_golden_maps() -> None:
    assert p.expert_map(8, 2, 0, "round_robin") == (0, -1, 1, -1, 2, -1, 3, -1)
    assert p.expert_map(8, 2, 1, "round_robin") == (-1, 0, -1, 1, -1, 2, -1, 3)
    assert p.expert_map(8, 2, 0) == (0, 1, 2, 3, -1, -1, -1, -1)
    assert p.expert_map(8, 2, 1) == (-1, -1, -1, -1, 0, 1, 2, 3)


def test_golden_masks() -> None:
    assert p.expert_mask(4, 2, 0) == (1, 1, 0, 0, 0)
    assert p.expert_mask(4, 2, 1) == (0, 0, 1, 1, 0)
    assert p.expert_mask(4, 2, 0, shared_experts=1) == (1, 1, 0, 0, 1, 0)
    assert p.expert_mask(4, 2, 1, shared_experts=1) == (0, 0, 1, 1, 1, 0)
    assert p.extended_expert_map(4, 2, 0, shared_experts=1) == (0, 1, -1, -1, 2)
    assert p.extended_expert_map(4, 2, 1, shared_experts=1) == (-1, -1, 0, 1, 2)


@given(st.integers(1, 64), strategies)
def test_one_rank_has_no_map(experts: int, strategy: str) -> None:
    assert p.local_count(experts, 1, 0) == experts
    assert p.owned_experts(experts, 1, 0, strategy) == tuple(range(experts))
    assert p.expert_map(experts, 1, 0, strategy) is None
    assert p.extended_expert_map(experts, 1, 0, strategy, 2) is None
    assert p.expert_mask(experts, 1, 0, strategy, 2) is None


@given(sizes, strategies)
def test_ranks_partition_the_experts(size: tuple[int, int], strategy: str) -> None:
    experts, world_size = size
    owned = [p.owned_experts(experts, world_size, rank, strategy) for rank in range(world_size)]
    assert sorted(expert for block in owned for expert in block) == list(range(experts))
    counts = [p.local_count(experts, world_size, rank) for rank in range(world_size)]
    assert counts == [len(block) for block in owned]
    assert counts == sorted(counts, reverse=True)  # the remainder goes to the first ranks
    assert counts[0] - counts[-1] <= 1


@given(sizes, strategies)
def test_slots_increase_with_the_id(size: tuple[int, int], strategy: str) -> None:
    experts, world_size = size
    for rank in range(world_size if world_size > 1 else 0):
        mapping = p.expert_map(experts, world_size, rank, strategy)
        assert mapping is not None
        assert len(mapping) == experts
        slots = [slot for slot in mapping if slot != -1]
        assert slots == list(range(p.local_count(experts, world_size, rank)))
        owned = p.owned_experts(experts, world_size, rank, strategy)
        assert [mapping[expert] for expert in owned] == slots


@given(sizes, strategies, st.integers(0, 3))
def test_mask_says_what_the_map_says(size: tuple[int, int], strategy: str, shared: int) -> None:
    experts, world_size = size
    for rank in range(world_size if world_size > 1 else 0):
        mask = p.expert_mask(experts, world_size, rank, strategy, shared)
        extended = p.extended_expert_map(experts, world_size, rank, strategy, shared)
        assert mask is not None
        assert extended is not None
        assert len(mask) == experts + shared + 1
        assert len(extended) == experts + shared
        assert mask[:-1] == tuple(int(slot > -1) for slot in extended)
        assert mask[-1] == 0
        count = p.local_count(experts, world_size, rank)
        assert extended[experts:] == tuple(range(count, count + shared))


@given(sizes)
def test_tables_are_inverse_and_rank_major(size: tuple[int, int]) -> None:
    experts, world_size = size
    forward, backward = p.global_to_physical(experts, world_size), p.physical_to_global(experts, world_size)
    assert [backward[forward[expert]] for expert in range(experts)] == list(range(experts))
    assert [forward[backward[position]] for position in range(experts)] == list(range(experts))
    blocks = [p.local_to_global(experts, world_size, rank) for rank in range(world_size)]
    assert backward == tuple(expert for block in blocks for expert in block)


@given(st.integers(1, 8), st.integers(1, 16))
def test_division_is_the_linear_owner_where_the_ranks_divide(per_rank: int, world_size: int) -> None:
    experts = per_rank * world_size
    forward = p.global_to_physical(experts, world_size)
    for rank in range(world_size):
        for expert in p.owned_experts(experts, world_size, rank):
            assert p.owner_by_division(expert, experts, world_size) == rank
        for expert in p.local_to_global(experts, world_size, rank):
            assert p.owner_by_division(forward[expert], experts, world_size) == rank


@given(sizes)
def test_division_leaves_a_tail_without_owner(size: tuple[int, int]) -> None:
    experts, world_size = size
    owners = [p.owner_by_division(expert, experts, world_size) for expert in range(-3, experts + 3)]
    limit = experts - experts % world_size if experts >= world_size else 0
    assert owners[:3] == [None] * 3
    assert None not in owners[3 : 3 + limit]
    assert owners[3 + limit :] == [None] * (experts + 3 - limit)


def test_division_and_linear_disagree_with_a_remainder() -> None:
    assert [p.owner_by_division(e, 9, 2) for e in range(9)] == [0, 0, 0, 0, 1, 1, 1, 1, None]
    assert 4 in p.owned_experts(9, 2, 0)
    assert p.owner_by_division(0, 3, 4) is None  # fewer experts than ranks


def effective(requested: str = "round_robin", **changes: Any) -> p.EffectiveStrategy:
    arguments: dict[str, Any] = {"world_size": 4, "expert_groups": 8} | changes
    return p.effective_strategy(requested, **arguments)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"expert_groups": None}, "no more than one expert group (expert_groups is None)"),
        ({"expert_groups": 0}, "no more than one expert group (expert_groups is 0)"),
        ({"expert_groups": 1}, "no more than one expert group (expert_groups is 1)"),
        ({"redundant_experts": 2}, "redundant experts (2)"),
        ({"eplb": True}, "load balancing (EPLB) is on"),
        ({"world_size": 1}, "the EP size is 1"),
        ({"world_size": 1, "expert_parallel": False, "expert_groups": None}, "the EP size is 1"),
        ({"expert_groups": 1, "all2all_backend": "mori_low_latency"}, "no more than one expert group"),
        *(
            ({"all2all_backend": name}, f"all-to-all backend {name} has no routing tables")
            for name in p.ALL2ALL_BACKENDS
            if name not in ("deepep_low_latency", "nixl_ep")
        ),
    ],
)
def test_round_robin_falls_back_to_linear(changes: dict[str, Any], reason: str) -> None:
    result = effective(**changes)
    assert result.strategy == "linear"
    assert reason in result.reason
    assert not result.routing_tables


@pytest.mark.parametrize(("backend", "tables"), [(None, False), ("deepep_low_latency", True), ("nixl_ep", True)])
def test_round_robin_is_honoured(backend: str | None, tables: bool) -> None:
    assert effective(all2all_backend=backend) == p.EffectiveStrategy("round_robin", "", tables)


@pytest.mark.parametrize("backend", [None, "mori_high_throughput", "nixl_ep"])
def test_linear_needs_no_reason(backend: str | None) -> None:
    assert effective("linear", all2all_backend=backend, expert_groups=None) == p.EffectiveStrategy("linear")


def test_shared_experts_are_fine_without_tables() -> None:
    assert effective(shared_experts=1).strategy == "round_robin"
    assert effective("linear", shared_experts=1, all2all_backend="nixl_ep").strategy == "linear"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: p.local_count(0, 2, 0), r"experts is 0; it must be an integer of at least 1"),
        (lambda: p.local_count(8, 0, 0), r"world_size is 0; it must be an integer of at least 1"),
        (lambda: p.local_count(8, -1, 0), r"world_size is -1; it must be"),
        (lambda: p.local_count(8, True, 0), r"world_size is True; it must be"),
        (lambda: p.local_count(8.0, 2, 0), r"experts is 8\.0; it must be"),  # type: ignore[arg-type]
        (lambda: p.local_count(8, 2, -1), r"rank is -1; it must be an integer of at least 0"),
        (lambda: p.owned_experts(8, 2, 2), r"rank is 2; with 2 ranks it must be at most 1"),
        (lambda: p.owned_experts(8, 2, 0, "spiral"), r"strategy is 'spiral'; choose one of linear, round_robin"),
        (lambda: p.expert_map(8, 1, 0, "spiral"), r"strategy is 'spiral'"),
        (lambda: p.expert_mask(8, 2, 0, shared_experts=-1), r"shared_experts is -1; it must be .* at least 0"),
        (lambda: p.extended_expert_map(8, 2, 0, shared_experts=-1), r"shared_experts is -1"),
        (lambda: p.global_to_physical(0, 2), r"experts is 0"),
        (lambda: p.physical_to_global(8, 0), r"world_size is 0"),
        (lambda: p.local_to_global(8, 2, 5), r"rank is 5"),
        (lambda: p.owner_by_division(0, 8, 0), r"world_size is 0"),
        (lambda: p.owner_by_division(0.5, 8, 2), r"expert is 0\.5; it must be an integer"),  # type: ignore[arg-type]
        (lambda: effective("custom"), r"strategy is 'custom'; choose one of linear, round_robin"),
        (lambda: effective(world_size=0), r"world_size is 0"),
        (lambda: effective(expert_groups=-1), r"expert_groups is -1; it must be an integer of at least 0"),
        (lambda: effective(redundant_experts=-1), r"redundant_experts is -1"),
        (lambda: effective(shared_experts=-1), r"shared_experts is -1"),
        (lambda: effective(all2all_backend="mori"), r"all2all_backend is 'mori', .* choose one of .*mori_low_latency"),
        (lambda: effective(expert_parallel=False), r"world_size is 4 but expert_parallel is False; .*world_size=1"),
        (
            lambda: effective(all2all_backend="nixl_ep", shared_experts=1),
            r"shared_experts is 1; .*nixl_ep allows only 0: switch shared-expert fusion off",
        ),
    ],
)
def test_errors_name_value_limit_and_fix(call: Callable[[], object], message: str) -> None:
    with pytest.raises(p.PlacementError, match=message):
        call()
