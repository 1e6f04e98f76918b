"""Sorting (token, slot) pairs by local expert into padded blocks, as kernels over groups of tokens want them.

Scope: the permutation, exact; every correct sort has the same. Pairs of one local expert follow each other in ascending
order of the tokens, experts in ascending order of their slots; each expert's pairs are filled up to whole blocks with
an entry that names the row behind the last one and slot k, with weight 0; an expert without pairs has no block. Rows
from ``num_rows`` on and ids that are not local are left out. Source of the semantics: AITER e4048607
csrc/include/moe_sorting_opus.h (822-1100 for few tokens, 2560-2640 for many). What a right sort does not prove:
anything about the kernels that use it. Not covered: rows that name an expert twice, of which AITER keeps one slot.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

#: A token takes the low bits of an entry, its slot those above.
TOKEN_BITS = 24


@dataclass
class Sorted:
    """The part of a sort's result that is defined.

    Attributes:
        entries: int64 ``[T]``, token plus slot << 24; T is the padded total.
        weights: float32 ``[T]``.
        experts: int64 ``[T / block]``, local slot of each block's expert.
        rows: rows that count.
    """

    entries: torch.Tensor
    weights: torch.Tensor
    experts: torch.Tensor
    rows: int


def sort(
    ids: torch.Tensor, weights: torch.Tensor, slot_of: torch.Tensor, block: int, *, num_rows: int | None = None
) -> Sorted:
    """Sort the pairs of ``ids [M, k]`` by local expert.

    Args:
        ids: global ids, any integer type.
        weights: ``[M, k]`` float32.
        slot_of: int64 ``[ids]``, local slot of each global id, -1 where another rank holds it.
        block: pairs of one block.
        num_rows: rows that count; all, if None.

    Raises:
        ValueError: ids and weights of different shapes, or a row that names a local expert twice.
    """
    if ids.dim() != 2 or ids.shape != weights.shape:
        raise ValueError(f"ids are {list(ids.shape)}, weights {list(weights.shape)}; give [M, k] for both")
    rows, k = ids.shape
    count = rows if num_rows is None else min(max(num_rows, 0), rows)
    entries, of_pairs, experts = [], [], []
    padding = count | k << TOKEN_BITS
    for slot in range(int(slot_of.max()) + 1 if slot_of.numel() else 0):
        here = _local(ids[:count], slot_of) == slot
        if bool((here.sum(1) > 1).any()):
            row = int((here.sum(1) > 1).nonzero()[0])
            raise ValueError(f"row {row} is {ids[row].tolist()} and names one expert twice; a sort keeps one of them")
        token, column = here.nonzero(as_tuple=True)
        missing = -len(token) % block
        entries.append(torch.nn.functional.pad(token | column << TOKEN_BITS, (0, missing), value=padding))
        of_pairs.append(torch.nn.functional.pad(weights[token, column].float(), (0, missing)))
        experts += [slot] * (len(entries[-1]) // block)
    device = ids.device
    return Sorted(
        torch.cat(entries) if entries else torch.zeros(0, dtype=torch.int64, device=device),
        torch.cat(of_pairs) if of_pairs else torch.zeros(0, device=device),
        torch.tensor(experts, dtype=torch.int64, device=device),
        count,
    )


def _local(ids: torch.Tensor, slot_of: torch.Tensor) -> torch.Tensor:
    """Local slot of each id, -1 for what is not local."""
    wide = ids.long()
    known = (wide >= 0) & (wide < slot_of.shape[0])
    return torch.where(known, slot_of[torch.where(known, wide, 0)], -1)


def unsorted(sorted_pairs: Sorted, k: int) -> torch.Tensor:
    """Pairs as int64 ``[P, 3]`` (token, slot, local expert) in the order of the sort, padding left out."""
    token = sorted_pairs.entries & ((1 << TOKEN_BITS) - 1)
    column = sorted_pairs.entries >> TOKEN_BITS
    blocks = len(sorted_pairs.experts)
    block = len(token) // blocks if blocks else 1
    expert = sorted_pairs.experts.repeat_interleave(block)
    real = column < k
    return torch.stack([token[real], column[real], expert[real]], 1)
