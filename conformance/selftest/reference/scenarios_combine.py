"""Scenarios of combine on gloo ranks: order, rounding levels, weights, refusals.

Scope: bit-exact results against sums written out by hand or folded term by term in numpy's float32, with torch's CPU
cast as the rounding. A pass proves nothing about the bounds; see test_bounds.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import numpy as np
import pytest
import torch

from conformance.selftest.reference.ranks import World
from reference.dispatch_combine import CombineResult, combine, dispatch

_PER_RANK = 2
_BIG = 2.0**24


def _round_trip(
    world: World,
    ids: Sequence[Sequence[int]],
    values: Sequence[float] | torch.Tensor,
    dtype: torch.dtype = torch.float32,
    **options: object,
) -> CombineResult:
    """Send every token of every rank along ``ids``; rank r answers each row with ``values[r]`` (or its row r)."""
    n, k = len(ids), len(ids[0]) if ids else 1
    table = torch.as_tensor(values, dtype=torch.float32)
    table = table.reshape(table.shape[0], -1).to(dtype)
    routed = torch.tensor(ids, dtype=torch.int32).reshape(n, k)
    sent = dispatch(torch.zeros(n, 1), routed, torch.ones(n, k), experts_per_rank=_PER_RANK, group=world.group)
    answers = table[world.rank].expand(sent.rows.shape[0], table.shape[1])
    return combine(answers, sent, group=world.group, **options)  # type: ignore[arg-type]


def _order(row: Sequence[int], size: int, fold: str) -> list[int]:
    """Destination ranks of a row in the order in which they are summed."""
    slots: dict[int, int] = {}
    for slot, e in enumerate(row):
        if 0 <= e < size * _PER_RANK and (fold == "last" or e // _PER_RANK not in slots):
            slots[e // _PER_RANK] = slot
    return sorted(slots, key=slots.__getitem__)


def _folded(row: Sequence[int], values: torch.Tensor, fold: str, nodes: int, dtype: torch.dtype) -> torch.Tensor:
    """The sum of one token, ``values [W, H]``, addition by addition."""
    size, per_node = values.shape[0], values.shape[0] // nodes
    total = np.zeros(values.shape[1], np.float32)
    for node in range(nodes):
        partial = np.zeros_like(total)
        for rank in _order(row, size, fold):
            if rank // per_node == node:
                partial = partial + values[rank].float().numpy()
        stored = torch.from_numpy(partial).to(dtype).float().numpy() if nodes > 1 else partial
        total = total + stored
    return torch.from_numpy(total).to(dtype)


def order_by_hand(world: World) -> None:
    if world.size < 3:
        return
    # Rank 0 is named by the first slot and by the last: it is added first, or last.
    row = [0, 2, 4, 1]
    values = [_BIG, 1.0, 1.0] + [0.0] * (world.size - 3)
    # 2**24 + 1 is a tie and goes to the even 2**24, twice; 1 + 1 + 2**24 is exact.
    assert _round_trip(world, [row], values, fold="first").output.tolist() == [[_BIG]]
    assert _round_trip(world, [row], values, fold="last").output.tolist() == [[_BIG + 2]]


def order_and_levels_at_random(world: World) -> None:
    random, generator = Random(world.size), torch.Generator().manual_seed(world.size)
    ids = [[random.randint(-1, world.size * _PER_RANK) for _ in range(6)] for _ in range(24)]
    spread = torch.exp2(torch.randint(-12, 13, (world.size, 16), generator=generator).float())
    values = torch.randn(world.size, 16, generator=generator) * spread
    for dtype in (torch.float32, torch.bfloat16):
        table = values.to(dtype)
        results = {}
        for nodes in [n for n in (1, 2, 4) if world.size % n == 0]:
            for fold in ("first", "last"):
                got = _round_trip(world, ids, table.float(), dtype, fold=fold, nodes=nodes).output
                want = torch.stack([_folded(row, table, fold, nodes, dtype) for row in ids])
                assert got.dtype == dtype
                assert torch.equal(got, want), (dtype, nodes, fold)
                results[nodes, fold] = got
        if world.size >= 4:  # the cases can tell the settings apart
            assert not torch.equal(results[1, "first"], results[2, "first"])
            assert dtype != torch.float32 or not torch.equal(results[1, "first"], results[1, "last"])


def levels_by_hand(world: World) -> None:
    half_unit = 2.0**-8
    for nodes in [n for n in (2, 4) if world.size % n == 0 and world.size // n >= 2]:
        per_node = world.size // nodes
        values = torch.zeros(world.size)
        values[0], values[1], values[per_node] = 1.0, half_unit, half_unit
        row = [0, 2, _PER_RANK * per_node]
        one = _round_trip(world, [row], values, torch.bfloat16, nodes=1).output
        two = _round_trip(world, [row], values, torch.bfloat16, nodes=nodes).output
        assert one.item() == 1 + 2 * half_unit  # exact
        assert two.item() == 1  # 1 + 2**-8 is a tie, to 1; so is the sum over nodes


def nodes_are_summed_in_ascending_order(world: World) -> None:
    if world.size != 4:
        return
    row = [6, 4, 2, 0]  # the slots name the nodes in descending order
    values = [_BIG, 1.0, 1.0, 0.0]
    assert _round_trip(world, [row], values, nodes=4).output.item() == _BIG
    assert _round_trip(world, [row], values, nodes=1).output.item() == _BIG + 2


def terms_and_destinations(world: World) -> None:
    last = world.size - 1
    result = _round_trip(world, [[0, 1], [2 * last, 2 * last]], [r + 1.0 for r in range(world.size)])
    want = torch.zeros(world.size, 2, 1)
    want[0, 0], want[last, 1] = 1.0, last + 1.0
    assert torch.equal(result.terms, want)
    assert result.destinations.tolist() == [[r == 0 for r in range(world.size)], [r == last for r in range(world.size)]]
    assert result.weights is None


def token_without_destination_is_plus_zero(world: World) -> None:
    output = _round_trip(world, [[-1, 999]], [-0.0] * world.size, torch.bfloat16).output
    assert output.view(torch.int16).tolist() == [[0]]


def nothing_at_all(world: World) -> None:
    ids, weights = torch.empty(0, 3, dtype=torch.int32), torch.empty(0, 3)
    for nodes in [n for n in (1, 2) if world.size % n == 0]:
        sent = dispatch(torch.empty(0, 5), ids, weights, experts_per_rank=_PER_RANK, group=world.group)
        back = combine(sent.rows.bfloat16(), sent, sent.weights, nodes=nodes, group=world.group)
        assert (back.output.shape, back.output.dtype) == ((0, 5), torch.bfloat16)
        assert back.weights is not None
        assert back.weights.shape == (0, 3)


def weights_are_summed_apart(world: World) -> None:
    every = [_PER_RANK * r for r in range(world.size)]
    ids = torch.tensor([every, [0] * world.size, [-1] * world.size])
    weights = torch.arange(3.0 * world.size).reshape(3, world.size) / 16 + world.rank
    sent = dispatch(torch.ones(3, 2), ids, weights, experts_per_rank=_PER_RANK, group=world.group)
    plain = combine(sent.rows, sent, sent.weights, group=world.group)
    scaled = combine(sent.rows, sent, sent.weights * (world.rank + 1), group=world.group)
    times = torch.tensor([[world.size], [1], [0]])
    assert plain.weights is not None
    assert scaled.weights is not None
    assert torch.equal(plain.weights, weights * times)
    triangle = torch.tensor([[world.size * (world.size + 1) // 2], [1], [0]])
    assert torch.equal(scaled.weights, weights * triangle)
    assert torch.equal(plain.output, times.expand(3, 2).float())
    assert torch.equal(plain.output, scaled.output)


def refusals_of_combine(world: World) -> None:
    ids = torch.zeros(2, 1, dtype=torch.int32)
    sent = dispatch(torch.ones(2, 4), ids, torch.ones(2, 1), experts_per_rank=_PER_RANK, group=world.group)
    received = sent.rows.shape[0]
    with pytest.raises(ValueError, match=f"^expert_rows has {received + 1} rows but {received} were received; give"):
        combine(torch.ones(received + 1, 4), sent, group=world.group)
    with pytest.raises(ValueError, match=r"^fold is 'middle'; choose 'first' or 'last'$"):
        combine(sent.rows, sent, fold="middle", group=world.group)
    with pytest.raises(ValueError, match=f"^nodes is 5; it must divide the {world.size} ranks$"):
        combine(sent.rows, sent, nodes=5, group=world.group)
