"""Load balancing against golden examples of vLLM 0.33.0 and DeepSeek's EPLB, and against its invariants.

Scope: reference/eplb.py. What a pass does not prove: that an installed vLLM still computes these maps.
"""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import eplb as e

LOADS = (
    (90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86),
    (20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27),
)
REBALANCED = (
    (5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1),
    (7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1),
)
COUNTS = ((1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1), (1, 2, 1, 1, 1, 2, 2, 1, 2, 1, 1, 1))


@st.composite
def layers(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int, int, int]:
    """Loads, P, groups, nodes and W that divide one another."""
    nodes, ranks_per_node = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    groups = draw(st.sampled_from((nodes, 2 * nodes, nodes + 1)))
    experts = groups * draw(st.integers(1, 3)) * (1 if groups % nodes == 0 else nodes)
    world_size = nodes * ranks_per_node
    physical = -(-experts // world_size) * world_size + world_size * draw(st.integers(0, 2))
    loads = draw(st.lists(st.integers(0, 1000), min_size=experts, max_size=experts))
    return tuple(loads), physical, groups, nodes, world_size


def test_golden_rebalance() -> None:
    for loads, wanted, counts in zip(LOADS, REBALANCED, COUNTS, strict=True):
        found = e.rebalance(loads, 16, 4, 2, 8)
        assert found == wanted
        assert e.logical_maps(found, 12).counts == counts


def test_golden_maps() -> None:
    assert e.initial_map(4, 2) == (0, 1, 2, 3, 0, 1)
    assert e.initial_map(3, 7) == (0, 1, 2, 0, 1, 2, 0, 1, 2, 0)
    assert e.logical_maps((0, 1, 2, 3, 0, 1), 4) == e.LogicalMaps(((0, 4), (1, 5), (2, -1), (3, -1)), (2, 2, 1, 1))
    second = e.logical_maps((0, 2, 0, 1, 0, 3), 4)
    assert second == e.LogicalMaps(((0, 2, 4), (3, -1, -1), (1, -1, -1), (5, -1, -1)), (3, 1, 1, 1))
    assert e.logical_maps((1, -1, 0, -1), 2) == e.LogicalMaps(((2,), (0,)), (1, 1)), "empty slots are nobody's"


@pytest.mark.parametrize(
    ("count", "wanted"),
    [
        (1, (0, 0, 0, 0)),
        (3, (0, 0, 2, 2, 1, 0, 0, 2, 2, 1, 0, 0, 2, 1, 1, 0)),
        (5, (0, 4, 2, 1, 4, 2, 1, 4, 3, 1, 4, 3)),
        (7, (0, 6, 1, 0, 2, 4, 3, 5, 4, 6, 1, 0)),
        (16, (0, 9, 2, 11, 4, 13)),
    ],
)
def test_golden_replicas(count: int, wanted: tuple[int, ...]) -> None:
    assert tuple(e.replica(token, count) for token in range(len(wanted))) == wanted


@given(st.integers(0, 1 << 24), st.sampled_from((2, 4, 8)))
def test_small_powers_of_two_take_turns(token: int, count: int) -> None:
    assert e.replica(token, count) == token % count


@given(layers(), st.integers(0, 5000), st.integers(-3, 40))
def test_the_chosen_slot_holds_the_expert(
    layer: tuple[tuple[int, ...], int, int, int, int], token: int, ask: int
) -> None:
    loads, physical, groups, nodes, world_size = layer
    p2l = e.rebalance(loads, physical, groups, nodes, world_size)
    slot = e.physical_id(token, ask, e.logical_maps(p2l, len(loads)))
    if 0 <= ask < len(loads):
        assert p2l[slot] == ask
    else:
        assert slot == -1


@given(layers())
def test_maps_are_inverse_and_every_expert_has_a_slot(layer: tuple[tuple[int, ...], int, int, int, int]) -> None:
    loads, physical, groups, nodes, world_size = layer
    p2l = e.rebalance(loads, physical, groups, nodes, world_size)
    maps = e.logical_maps(p2l, len(loads))
    assert len(p2l) == sum(maps.counts) == physical
    assert min(maps.counts) >= 1
    for expert, (slots, count) in enumerate(zip(maps.physical, maps.counts, strict=True)):
        assert list(slots[:count]) == [slot for slot, held in enumerate(p2l) if held == expert]
        assert set(slots[count:]) <= {-1}


@given(layers())
def test_groups_stay_on_a_node(layer: tuple[tuple[int, ...], int, int, int, int]) -> None:
    loads, physical, groups, nodes, world_size = layer
    p2l = e.rebalance(loads, physical, groups, nodes, world_size)
    if groups % nodes:
        assert p2l == e.rebalance(loads, physical, 1, 1, world_size)
        return
    per_node, size = physical // nodes, len(loads) // groups
    homes = {(expert // size, slot // per_node) for slot, expert in enumerate(p2l)}
    assert len(homes) == groups, "no group is on two nodes"
    assert set(Counter(node for _, node in homes).values()) == {groups // nodes}


@settings(max_examples=60)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=4), st.integers(0, 4))
def test_no_other_counts_are_better(loads: list[int], extra: int) -> None:
    slots = len(loads) + extra
    held, counts = e.replicate(loads, slots)
    assert sorted(Counter(held).items()) == list(enumerate(counts))
    every = (each for each in itertools.product(range(1, extra + 2), repeat=len(loads)) if sum(each) == slots)
    least = min(max(load / count for load, count in zip(loads, each, strict=True)) for each in every)
    assert max(load / count for load, count in zip(loads, counts, strict=True)) == least


def test_packs_are_full_and_no_further_apart_than_the_heaviest_item() -> None:
    for packs, room, top in ((2, 2, 6), (2, 3, 4), (3, 2, 4), (4, 1, 3)):
        for loads in itertools.product(range(top + 1), repeat=packs * room) if packs * room < 6 else ():
            check_packs(loads, packs, room)
        for loads in itertools.combinations_with_replacement(range(top + 1), packs * room):
            check_packs(loads, packs, room)


def check_packs(loads: tuple[int, ...], packs: int, room: int) -> None:
    found = e.pack(loads, packs)
    assert {len(items) for items in found} == {room}
    assert sorted(item for items in found for item in items) == list(range(len(loads)))
    totals = [sum(loads[item] for item in items) for items in found]
    assert max(totals) - min(totals) <= max(loads)


def test_equal_loads_go_by_index() -> None:
    assert e.pack((1, 1, 1, 1, 1, 1), 3) == ((0, 3), (1, 4), (2, 5))
    assert e.pack((5, 1), 2) == ((0,), (1,)), "one item per pack is the identity"
    assert e.pack((1, 5), 2) == ((0,), (1,))
    assert e.rebalance((1, 1, 1, 1), 4, 2, 2, 2) == (0, 1, 2, 3)
    assert e.replicate((0, 0, 0), 5) == ((0, 1, 2, 0, 0), (3, 1, 1))
    assert e.replicate((6, 6, 3), 5) == ((0, 1, 2, 0, 1), (2, 2, 1))


def test_skewed_loads_are_spread() -> None:
    loads = [2048 // (1 + expert) for expert in range(64)]
    trivial = max(e.rank_loads(e.initial_map(64, 16), loads, 8))
    # The mean is 1210.75.
    assert max(e.rank_loads(e.rebalance(loads, 80, 1, 1, 8), loads, 8)) == 1211.5 < trivial / 2
    for row in LOADS:
        assert max(e.rank_loads(e.rebalance(row, 16, 4, 2, 8), row, 8)) < max(
            e.rank_loads(e.initial_map(12, 4), row, 8)
        )


@given(layers(), st.data())
def test_experts_that_stay_keep_their_slot(
    layer: tuple[tuple[int, ...], int, int, int, int], data: st.DataObject
) -> None:
    loads, physical, groups, nodes, world_size = layer
    plain = e.rebalance(loads, physical, groups, nodes, world_size)
    old = tuple(data.draw(st.permutations(plain)))
    kept = e.rebalance(loads, physical, groups, nodes, world_size, old)
    for start in range(0, physical, physical // world_size):
        part = slice(start, start + physical // world_size)
        assert Counter(kept[part]) == Counter(plain[part]), "the same experts on the same rank"
        staying = Counter(old[part]) & Counter(kept[part])
        same = Counter(now for now, before in zip(kept[part], old[part], strict=True) if now == before)
        assert same == staying
    assert e.rebalance(loads, physical, groups, nodes, world_size, kept) == kept


@given(layers(), st.data())
def test_moves_come_from_the_nearest_copy(
    layer: tuple[tuple[int, ...], int, int, int, int], data: st.DataObject
) -> None:
    loads, physical, groups, nodes, world_size = layer
    new = e.rebalance(loads, physical, groups, nodes, world_size)
    old = tuple(data.draw(st.permutations(new)))
    per_rank = physical // world_size
    for slot, source in enumerate(e.moves(old, new, world_size)):
        assert source is not None
        assert old[source.rank * per_rank + source.local] == new[slot]
        rank = slot // per_rank
        if old[slot] == new[slot]:
            assert source == e.place(slot, physical, world_size)
        elif new[slot] in old[rank * per_rank : (rank + 1) * per_rank]:
            assert source.rank == rank
    assert e.moves((0, 1, 1, 0), (1, -1, -1, 0), 2) == (e.Slot(0, 1), None, None, e.Slot(1, 1))


def test_two_replicas_on_one_rank_are_legal() -> None:
    p2l = e.rebalance((100, 1, 1, 1), 8, 1, 1, 2)
    assert p2l.count(0) == 5
    assert max(Counter(p2l[:4])[0], Counter(p2l[4:])[0]) >= 2
    maps = e.logical_maps(p2l, 4)
    assert {e.physical_id(token, 0, maps) for token in range(64)} == {s for s, held in enumerate(p2l) if held == 0}


def test_loads_count_every_slot_at_the_source() -> None:
    ranks = [((0, 3), (3, -1), (5, 5)), ((3, 1), (0, 0), (2, 2))]
    loads = [e.physical_load(ids, 6, unpadded) for ids, unpadded in zip(ranks, (2, 3), strict=True)]
    assert loads == [(1, 0, 0, 2, 0, 0), (2, 1, 2, 1, 0, 0)]
    assert e.global_load(loads) == (3, 1, 2, 3, 0, 0)
    assert e.logical_load((0, 1, 2, 0, 1, -1), e.global_load(loads), 3) == (6, 1, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: e.initial_map(4, 1024), "redundant is 1024; vLLM's table of replicas allows at most 1023"),
        (lambda: e.initial_map(0, 1), "logical is 0; it must be an integer of at least 1"),
        (lambda: e.rebalance((1, 2, 3), 5, 1, 1, 2), "5 physical experts do not divide among 2 ranks"),
        (lambda: e.rebalance((1, 2, 3), 2, 1, 1, 2), "2 slots cannot hold 3 experts"),
        (lambda: e.rebalance((1, 2, 3), 4, 2, 2, 2), "3 experts do not divide among 2 groups"),
        (lambda: e.rebalance((1, 2, 3, 4), 6, 2, 2, 3), "3 ranks do not divide among 2 nodes"),
        (lambda: e.rebalance((1, float("nan")), 2, 1, 1, 2), "the load of expert 1 is nan"),
        (lambda: e.rebalance((1, -2), 2, 1, 1, 2), "the load of expert 1 is -2"),
        (lambda: e.rebalance((1, 2), 4, 1, 1, 2, old=(0, 1)), "old has 2 slots"),
        (lambda: e.logical_maps((0, 2), 3), "expert 1 has no physical slot"),
        (lambda: e.logical_maps((0, 3), 3), "slot 1 holds expert 3; there are 3"),
        (lambda: e.logical_maps((0, -2), 1), "slot 1 holds expert -2"),
        (lambda: e.moves((0, 0), (0, 1), 2), "slot 1 is to hold expert 1, of which the old map has no copy"),
        (lambda: e.moves((0,), (0, 0), 1), "the maps have 1 and 2 slots"),
        (lambda: e.place(4, 4, 2), "slot is 4; there are 4"),
        (lambda: e.pack((1, 2, 3), 2), "3 items do not divide among 2 packs"),
        (lambda: e.physical_load(((0,),), 1, 2), "unpadded is 2; there are 1 rows"),
    ],
)
def test_errors_name_the_value_and_the_limit(call: object, message: str) -> None:
    with pytest.raises(e.EplbError, match=message.replace("(", r"\(")):
        call()  # type: ignore[operator]


def test_the_largest_redundancy() -> None:
    p2l = e.initial_map(1, e.MAX_REDUNDANT)
    assert len(e.logical_maps(p2l, 1).physical[0]) == 1024
