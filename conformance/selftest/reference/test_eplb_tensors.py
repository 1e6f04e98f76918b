"""Load balancing on tensors against the plain definitions, and weights through many rebalances.

Scope: reference/eplb_tensors.py. What a pass does not prove: that any exchange between ranks moves these weights.
"""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reference import eplb
from reference import eplb_tensors as tensors

LOGICAL, PHYSICAL, RANKS = 8, 12, 4


def a_map(seed: int) -> tuple[int, ...]:
    """Any legal map, balanced or not."""
    draw = random.Random(seed)
    p2l = [*range(LOGICAL), *(draw.randrange(LOGICAL) for _ in range(PHYSICAL - LOGICAL))]
    draw.shuffle(p2l)
    return tuple(p2l)


@given(st.integers(0, 1 << 30), st.integers(0, 70), st.integers(1, 4), st.sampled_from((torch.int32, torch.int64)))
def test_replica_choice_and_loads(seed: int, rows: int, top_k: int, dtype: torch.dtype) -> None:
    maps = eplb.logical_maps(a_map(seed), LOGICAL)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-2, LOGICAL + 2, (rows, top_k), generator=generator).to(dtype)
    found = tensors.physical_ids(ids, maps)
    assert found.dtype == dtype
    wanted = [[eplb.physical_id(token, expert, maps) for expert in row] for token, row in enumerate(ids.tolist())]
    assert found.tolist() == wanted
    unpadded = seed % (rows + 1)
    assert tuple(tensors.physical_load(found, PHYSICAL, unpadded).tolist()) == eplb.physical_load(
        wanted, PHYSICAL, unpadded
    )


def test_late_tokens_hash_in_32_bits() -> None:
    maps = eplb.logical_maps((0, 0, 0, 1, 1, 1), 2)
    ids = torch.zeros(70_000, 1, dtype=torch.int64)
    found = tensors.physical_ids(ids, maps)[-5:, 0].tolist()
    assert found == [eplb.physical_id(token, 0, maps) for token in range(69_995, 70_000)]


def coded(experts: list[int]) -> torch.Tensor:
    """Weights that say whose they are: ``logical * 1000`` and the place in the expert."""
    return torch.tensor(experts)[:, None] * 1000 + torch.arange(5)


def test_weights_stay_with_their_experts_through_ten_rebalances() -> None:
    draw = random.Random(6)
    p2l = a_map(0)
    per_rank = PHYSICAL // RANKS
    ranks = [coded(list(p2l[start : start + per_rank])) for start in range(0, PHYSICAL, per_rank)]
    copied = 0
    for _ in range(10):
        loads = [draw.randrange(1000) for _ in range(LOGICAL)]
        new = eplb.rebalance(loads, PHYSICAL, *draw.choice(((1, 1), (4, 2), (4, 4), (3, 2))), RANKS, p2l)
        before = [weights.clone() for weights in ranks]
        moved = tensors.move_weights(ranks, eplb.moves(p2l, new, RANKS))
        assert all(torch.equal(old, kept) for old, kept in zip(ranks, before, strict=True))
        assert torch.equal(torch.cat(moved), coded(list(new)))
        copied += sum(old != expert for old, expert in zip(p2l, new, strict=True))
        p2l, ranks = new, moved
    assert copied > 20, "something moved"


def test_empty_slots_keep_what_they_held() -> None:
    moved = tensors.move_weights([coded([0, 1]), coded([1, 0])], eplb.moves((0, 1, 1, 0), (1, -1, 0, 1), 2))
    assert torch.equal(torch.cat(moved), coded([1, 1, 0, 1]))


@pytest.mark.parametrize(("slots", "ranks"), [(3, 2), (2, 3), (1, 2)])
def test_ranks_must_have_the_slots(slots: int, ranks: int) -> None:
    sources = eplb.moves((0, 1, 1, 0), (1, 0, 0, 1), 2)
    with pytest.raises(eplb.EplbError, match=f"{ranks} ranks have \\[{slots}\\] slots each and the moves 4 in all"):
        tensors.move_weights([coded([0] * slots)] * ranks, sources)


def test_no_row_beyond_the_batch_is_counted() -> None:
    with pytest.raises(eplb.EplbError, match="unpadded is 3; there are 2 rows"):
        tensors.physical_load(torch.zeros(2, 1, dtype=torch.int32), 4, 3)
