"""The sort of tokens by expert of AITER's double, against a loop over experts and tokens.

Scope: permutation, padding, what stays uninitialised, local ids and the zeroed buffer. A pass proves nothing about
AITER's kernels.
"""

from __future__ import annotations

import pytest
import torch

from accelerated.standin.aiter_ops import fused_moe

INT = torch.int32
#: What a poisoned int32 holds.
FRESH = -1


def routed(seed: int, rows: int, experts: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(rows, experts, generator=generator).argsort(1)[:, :k]
    return ids.to(INT), torch.rand(rows, k, generator=generator)


def by_hand(
    ids: torch.Tensor, weights: torch.Tensor, mask: list[int], block: int, count: int
) -> tuple[list[int], list[float], list[int]]:
    """Entries, weights and local expert of each block, padding included."""
    entries: list[int] = []
    of: list[float] = []
    experts: list[int] = []
    k = ids.shape[1]
    for expert, local in enumerate(mask):
        found = [(row, slot) for row in range(count) for slot in range(k) if local and int(ids[row, slot]) == expert]
        padding = -len(found) % block
        entries += [row | slot << 24 for row, slot in found] + [count | k << 24] * padding
        of += [float(weights[row, slot]) for row, slot in found] + [0.0] * padding
        experts += [sum(mask[:expert])] * ((len(found) + padding) // block)
    return entries, of, experts


@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("count", [0, 1, 37, 50])
@pytest.mark.parametrize("masked", [False, True])
def test_every_written_place(block: int, count: int, masked: bool) -> None:
    ids, weights = routed(count, 50, 9, 3)
    mask = [0, 1, 1, 0, 0, 1, 0, 1, 0] if masked else [1] * 9
    number = torch.tensor([count], dtype=INT)
    given = torch.tensor(mask, dtype=INT) if masked else None
    outputs = fused_moe.moe_sorting(ids, weights, 9, 64, torch.bfloat16, block, given, number)
    sorted_ids, sorted_weights, experts, totals, buffer = outputs
    entries, of, blocks = by_hand(ids, weights, mask, block, count)
    assert totals.tolist() == [len(entries), count]
    assert sorted_ids.shape == sorted_weights.shape == (50 * 3 + 9 * block - 3,)
    assert experts.shape == (-(-sorted_ids.numel() // block),)
    assert sorted_ids[: len(entries)].tolist() == entries
    assert sorted_weights[: len(of)].tolist() == of
    assert experts[: len(blocks)].tolist() == blocks
    assert sorted_ids[len(entries) :].eq(FRESH).all()
    assert sorted_weights[len(of) :].isnan().all()
    assert experts[len(blocks) :].eq(FRESH).all()
    assert buffer[:count].eq(0).all()
    assert buffer[count:].isnan().all()


def test_local_ids_of_the_documented_example() -> None:
    ids = torch.tensor([[0, 1, 5], [2, 4, 3], [5, 0, 2]], dtype=INT)
    mask = torch.tensor([0, 1, 1, 0, 1, 0], dtype=INT)
    outputs = fused_moe.moe_sorting(ids, torch.ones(3, 3), 6, 64, torch.bfloat16, 32, mask, return_local_topk_ids=True)
    assert outputs[5].tolist() == [[-1, 0, -1], [1, 2, -1], [-1, -1, 1]]
    outputs = fused_moe.moe_sorting(ids, torch.ones(3, 3), 6, 64, torch.bfloat16, return_local_topk_ids=True)
    assert torch.equal(outputs[5], ids), "without a mask every expert is local"


def test_a_mask_of_other_numbers_gives_other_slots() -> None:
    ids = torch.tensor([[0, 1, 2, 3]], dtype=INT)
    mask = torch.tensor([-1, 0, 1, 2], dtype=INT)
    outputs = fused_moe.moe_sorting(ids, torch.ones(1, 4), 4, 64, torch.bfloat16, 32, mask, return_local_topk_ids=True)
    # The number 0 is taken for remote and -1 for local; the sums before are 0, -1, -1, 0.
    assert outputs[2][:3].tolist() == [0, -1, 0]
    assert outputs[5].tolist() == [[0, -1, -1, 0]]


def test_the_buffer() -> None:
    ids, weights = routed(0, 5, 4, 2)
    mask = torch.ones(4, dtype=INT)
    assert fused_moe.moe_sorting(ids, weights, 4, 64, torch.float16, accumulate=False)[4].shape == (0, 0)
    kept = fused_moe.moe_sorting(ids, weights, 4, 64, torch.float16, expert_mask=mask, accumulate=False)[4]
    assert (kept.shape, kept.dtype) == ((5, 64), torch.float16)
    # 5 rows of 6 bytes: the kernel clears 16 bytes at a time, and 14 are left.
    odd = fused_moe.moe_sorting(ids, weights, 4, 3, torch.bfloat16)[4].view(-1)
    assert odd[:8].eq(0).all()
    assert odd[8:].isnan().all()


def test_repeated_and_foreign_ids() -> None:
    ids = torch.tensor([[2, 2, 0], [-1, 1, 4]], dtype=INT)
    weights = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    outputs = fused_moe.moe_sorting(ids, weights, 4, 64, torch.bfloat16, 2)
    padding = 2 | 3 << 24
    assert outputs[0][:6].tolist() == [0 | 2 << 24, padding, 1 | 1 << 24, padding, 0 | 1 << 24, padding]
    assert outputs[2][:3].tolist() == [0, 1, 2]


def test_other_types_and_the_flat_kernels() -> None:
    ids, weights = routed(1, 5, 4, 2)
    outputs = fused_moe.moe_sorting(ids.long(), weights, 4, 64, torch.bfloat16)
    assert all(each.eq(FRESH).all() for each in (outputs[0], outputs[2], outputs[3]))
    assert outputs[4].isnan().all()
    with pytest.raises(RuntimeError, match="float32 routing weights"):
        fused_moe.moe_sorting(ids, weights.half(), 4, 64, torch.bfloat16)
    flat = fused_moe.moe_sorting(ids, weights, 4, 64, torch.bfloat16, flat=True)
    assert torch.equal(flat[0], ids)
    assert torch.equal(flat[1], weights)
    assert flat[4].isnan().all()
    with pytest.raises(NotImplementedError, match="tuned FP4"):
        fused_moe.moe_sorting(ids, weights, 4, 64, torch.bfloat16, output_aux=True)
