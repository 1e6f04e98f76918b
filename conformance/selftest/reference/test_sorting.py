"""The sort of pairs by expert: an example by hand, and what every sort has whatever it is given.

A pass does not prove that any library sorts so.
"""

from __future__ import annotations

import pytest
import torch

from reference.sorting import TOKEN_BITS, Sorted, sort, unsorted


def entry(token: int, slot: int) -> int:
    return token | slot << TOKEN_BITS


def ids_of(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def weights_of(ids: torch.Tensor) -> torch.Tensor:
    return torch.arange(1, ids.numel() + 1).view(ids.shape).float()


def test_an_example_by_hand() -> None:
    """Experts 1, 2 and 4 of 6 are local, in blocks of two; AITER's own example of its local ids."""
    ids = ids_of([0, 1, 5], [2, 4, 3], [5, 0, 2], [1, 2, 0])
    found = sort(ids, weights_of(ids), torch.tensor([-1, 0, 1, -1, 2, -1]), 2)
    pad = entry(4, 3)
    assert found.entries.tolist() == [
        *(entry(0, 1), entry(3, 0)),
        *(entry(1, 0), entry(2, 2), entry(3, 1), pad),
        *(entry(1, 1), pad),
    ]
    assert found.weights.tolist() == [2, 10, 4, 9, 11, 0, 5, 0]
    assert found.experts.tolist() == [0, 1, 1, 2]
    assert found.rows == 4


def test_an_expert_without_pairs_has_no_block() -> None:
    ids = ids_of([0], [2], [2])
    found = sort(ids, weights_of(ids), torch.tensor([0, 1, 2]), 4)
    assert found.experts.tolist() == [0, 2]
    assert found.entries.tolist() == [0, *[entry(3, 1)] * 3, 1, 2, *[entry(3, 1)] * 2]


def test_rows_beyond_the_count_are_left_out_and_padding_names_the_count() -> None:
    ids = ids_of([0], [0], [0])
    found = sort(ids, weights_of(ids), torch.tensor([0]), 4, num_rows=2)
    assert found.entries.tolist() == [0, 1, entry(2, 1), entry(2, 1)]
    assert found.rows == 2
    empty = sort(ids, weights_of(ids), torch.tensor([0]), 4, num_rows=0)
    assert (empty.entries.tolist(), empty.experts.tolist(), empty.rows) == ([], [], 0)


@pytest.mark.parametrize("bad", [-1, 3, 1 << 30, -(1 << 31)])
def test_ids_that_are_nobodys(bad: int) -> None:
    ids = ids_of([bad, 1], [0, bad])
    found = sort(ids, weights_of(ids), torch.tensor([0, 1, -1]), 2)
    assert unsorted(found, 2).tolist() == [[1, 0, 0], [0, 1, 1]]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("block", [1, 3, 32])
def test_every_local_pair_once_in_order(block: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, k, experts = 37, 3, 9
    ids = torch.rand(rows, experts, generator=generator).argsort(1)[:, :k].int()
    weights = torch.rand(rows, k, generator=generator)
    slot_of = torch.tensor([-1, 0, 1, -1, 2, 3, -1, 4, -1])
    found = sort(ids, weights, slot_of, block, num_rows=30)
    pairs = unsorted(found, k)
    expected = [
        (token, slot, int(slot_of[ids[token, slot]]))
        for token in range(30)
        for slot in range(k)
        if slot_of[ids[token, slot]] >= 0
    ]
    assert sorted(map(tuple, pairs.tolist())) == sorted(expected)
    assert pairs[:, 2].tolist() == sorted(pairs[:, 2].tolist())
    for expert in range(5):
        tokens = pairs[pairs[:, 2] == expert, 0].tolist()
        assert tokens == sorted(set(tokens))
    assert len(found.entries) == block * len(found.experts)
    real = found.entries >> TOKEN_BITS < k
    assert torch.equal(found.weights[real], weights[pairs[:, 0], pairs[:, 1]])
    assert not found.weights[~real].any()


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="names one expert twice"):
        sort(ids_of([1, 1]), torch.ones(1, 2), torch.tensor([0, 1]), 2)
    with pytest.raises(ValueError, match=r"give \[M, k\] for both"):
        sort(ids_of([1, 0]), torch.ones(1, 3), torch.tensor([0, 1]), 2)
    # Nobody's expert may be named as often as there are slots.
    assert isinstance(sort(ids_of([1, 1]), torch.ones(1, 2), torch.tensor([0, -1]), 2), Sorted)
