"""Scenarios of dispatch on gloo ranks, against expectations from plain loops over every rank's routing.

Scope: which rows arrive where, in which order, bit for bit, for element types, shapes and ids at their edges. A pass
proves nothing about other process groups than gloo.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import pytest
import torch
import torch.distributed as dist

from conformance.selftest.reference.ranks import World
from reference.dispatch_combine import Dispatched, combine, dispatch

_PER_RANK = 2
_TYPES = [
    getattr(torch, name)
    for name in (
        *("uint8", "int8", "bfloat16", "float32", "int64"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2"),
    )
    if hasattr(torch, name)
]


def _noise(seed: int, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Random bytes, so NaNs of every payload, infinities and subnormals as well."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (rows, columns * dtype.itemsize), dtype=torch.uint8, generator=generator).view(dtype)


def _raw(tensor: torch.Tensor) -> list[int]:
    values: list[int] = tensor.contiguous().reshape(-1).view(torch.uint8).tolist()
    return values


def _arrivals(routing: Sequence[Sequence[Sequence[int]]], rank: int) -> list[tuple[int, int]]:
    local = range(rank * _PER_RANK, (rank + 1) * _PER_RANK)
    return [(s, t) for s, rows in enumerate(routing) for t, row in enumerate(rows) if any(e in local for e in row)]


def _check(
    world: World,
    counts: Sequence[int],
    dtype: torch.dtype = torch.float32,
    hidden: int = 4,
    top_k: int = 3,
    scale: tuple[torch.dtype, int] | None = None,
    id_type: torch.dtype = torch.int32,
) -> Dispatched:
    """Dispatch random rows with ids from -2 to beyond the last expert and compare everything that arrives."""
    random = Random(hidden * 100 + top_k)
    ids = [[[random.randint(-2, world.size * _PER_RANK + 1) for _ in range(top_k)] for _ in range(n)] for n in counts]
    rows = [_noise(s, n, hidden, dtype) for s, n in enumerate(counts)]
    weights = [_noise(50 + s, n, top_k, torch.float32) for s, n in enumerate(counts)]
    scales = None if scale is None else [_noise(90 + s, n, scale[1], scale[0]) for s, n in enumerate(counts)]
    me = world.rank
    got = dispatch(
        rows[me],
        torch.tensor(ids[me], dtype=id_type).reshape(counts[me], top_k),
        weights[me],
        None if scales is None else scales[me],
        experts_per_rank=_PER_RANK,
        group=world.group,
    )
    want = _arrivals(ids, me)
    assert list(zip(got.source_rank.tolist(), got.source_token.tolist(), strict=True)) == want
    assert got.ids.dtype == torch.int32
    assert got.ids.tolist() == [ids[s][t] for s, t in want]
    columns = [(got.rows, rows, hidden), (got.weights, weights, top_k)]
    if scales is not None:
        assert got.scales is not None
        columns.append((got.scales, scales, scale[1] if scale else 0))
    for tensor, sources, width in columns:
        assert tensor.shape == (len(want), width)
        assert tensor.dtype == sources[0].dtype
        assert _raw(tensor) == [b for s, t in want for b in _raw(sources[s][t : t + 1])]
    assert got.receive_counts == [sum(s == r for s, _ in want) for r in range(world.size)]
    assert got.send_counts == [sum(s == me for s, _ in _arrivals(ids, r)) for r in range(world.size)]
    return got


def every_element_type_moves_as_bytes(world: World) -> None:
    counts = [(3 * r + 2) % 5 for r in range(world.size)]
    for dtype in _TYPES:
        for hidden in (1, 3, 8):
            _check(world, counts, dtype, hidden)


def one_row_of_an_odd_number_of_bytes(world: World) -> None:
    # The columns behind the payload then start where no int32 may.
    for hidden in (1, 2, 3, 5):
        _check(world, [1] + [0] * (world.size - 1), torch.uint8, hidden)
        _check(world, [1] * world.size, torch.bfloat16, hidden)


def scales_of_every_type(world: World) -> None:
    counts = [(r + 1) % 3 for r in range(world.size)]
    for dtype in _TYPES:
        for width in (1, 5):
            _check(world, counts, torch.uint8, 7, scale=(dtype, width))


def one_slot_and_many(world: World) -> None:
    for top_k in (1, 2, 9, 17):
        _check(world, [4] * world.size, top_k=top_k)


def ids_of_64_bits(world: World) -> None:
    _check(world, [5] * world.size, id_type=torch.int64)


def counts_from_nothing_to_many(world: World) -> None:
    size = world.size
    for counts in ([0] * size, [300] + [0] * (size - 1), [0] * (size - 1) + [7], [17 * r for r in range(size)]):
        _check(world, counts)


def a_known_route_needs_no_counts(world: World) -> None:
    counts = [(2 * r + 3) % 5 for r in range(world.size)]
    for hidden, scale in ((4, None), (7, (torch.uint8, 3))):
        first = _check(world, counts, hidden=hidden, scale=scale)
        rows, weights = _noise(7, counts[world.rank], hidden, torch.float32), torch.ones(len(first.owners), 3)
        ids = torch.arange(3 * len(weights), dtype=torch.int32).reshape(-1, 3)  # of another routing: they only travel
        calls: list[int] = []
        exchange = dist.all_to_all_single

        def counted(*arguments: Any, calls: list[int] = calls, exchange: Any = exchange, **named: Any) -> Any:
            calls.append(1)
            return exchange(*arguments, **named)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "all_to_all_single", counted)
            again = dispatch(rows, ids, weights, experts_per_rank=_PER_RANK, group=world.group, route=first)
            assert len(calls) == 1, "the counts are known"
        assert torch.equal(again.source_rank, first.source_rank)
        assert torch.equal(again.source_token, first.source_token)
        back = combine(again.rows, again, group=world.group)
        reached = first.destinations.t()
        came = rows.expand_as(back.terms)[reached]
        assert torch.equal(back.terms[reached].nan_to_num(), came.nan_to_num()), "every rank got the new rows"
        if len(rows):
            with pytest.raises(ValueError, match="give its tokens"):
                dispatch(rows[1:], ids[1:], weights[1:], experts_per_rank=_PER_RANK, group=world.group, route=first)


def special_ids_by_hand(world: World) -> None:
    beyond = world.size * _PER_RANK
    last = beyond - 1
    ids = [[-1, -1, -1], [beyond, beyond + 99, -7], [0, 0, 0], [1, 0, -1], [last, 0, last], [beyond, -1, last]]
    rows = torch.arange(6.0).unsqueeze(1) + 10 * world.rank
    got = dispatch(rows, torch.tensor(ids), torch.ones(6, 3), experts_per_rank=_PER_RANK, group=world.group)
    here = {0: [2, 3, 4], world.size - 1: [4, 5]} if world.size > 1 else {0: [2, 3, 4, 5]}
    mine = here.get(world.rank, [])
    assert got.rows.flatten().tolist() == [10 * source + token for source in range(world.size) for token in mine]
    assert [row.nonzero().flatten().tolist() for row in got.destinations] == [
        sorted(rank for rank, tokens in here.items() if token in tokens) for token in range(6)
    ]
    assert got.owners.tolist()[3:] == [[0, 0, -1], [world.size - 1, 0, world.size - 1], [-1, -1, world.size - 1]]


def nan_payloads_stay(world: World) -> None:
    bits = torch.tensor([[0x7F81, -0x7F, 0x7FC1, -0x3D, -0x8000, 0x0001, 0x7F80, -0x80]], dtype=torch.int16)
    rows = bits.view(torch.bfloat16)
    next_ = (world.rank + 1) % world.size * _PER_RANK
    weights = torch.tensor([[0x7F800001]], dtype=torch.int32).view(torch.float32)
    got = dispatch(rows, torch.tensor([[next_]]), weights, experts_per_rank=_PER_RANK, group=world.group)
    assert got.rows.view(torch.int16).tolist() == bits.tolist()
    assert got.weights.view(torch.int32).item() == 0x7F800001


def strided_inputs(world: World) -> None:
    n, end = 4, world.size * _PER_RANK
    rows = torch.arange(12.0).reshape(3, n).t()
    ids = torch.arange(n * 4).remainder(end).reshape(n, 4)[:, ::2]
    weights = torch.tensor([[0.5, 0.25]]).expand(n, 2)
    scales = torch.arange(n * 2.0).reshape(n, 2)[:, 1:]
    copies = [x.clone().contiguous() for x in (rows, ids, weights, scales)]
    loose = dispatch(rows, ids, weights, scales, experts_per_rank=_PER_RANK, group=world.group)
    dense = dispatch(*copies, experts_per_rank=_PER_RANK, group=world.group)
    assert loose.rows.shape[0] > 0 or world.rank > 0
    for name in ("rows", "ids", "weights", "scales", "source_token"):
        assert torch.equal(getattr(loose, name), getattr(dense, name)), name


def columns_of_one_element_with_stride_0(world: World) -> None:
    # They count as contiguous, so contiguous() leaves the stride that view() refuses.
    column = torch.arange(3.0).as_strided((3, 1), (1, 0))
    assert column.is_contiguous()
    ids = torch.zeros(3, dtype=torch.int32).as_strided((3, 1), (1, 0))
    got = dispatch(column, ids, column, column, experts_per_rank=_PER_RANK, group=world.group)
    want = [[0.0], [1.0], [2.0]] * (world.size if world.rank == 0 else 0)
    assert got.scales is not None
    assert got.rows.tolist() == got.weights.tolist() == got.scales.tolist() == want


def _counted(patch: pytest.MonkeyPatch) -> list[str]:
    """Names of the communication calls made from now on."""
    calls: list[str] = []

    def wrap(name: str, original: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            calls.append(name)
            return original(*arguments, **options)

        return call

    starts = ("all_", "reduce", "broadcast", "gather", "scatter", "barrier", "send", "recv", "isend", "irecv", "batch_")
    for name in dir(dist):
        if name.startswith(starts) and callable(getattr(dist, name)):
            patch.setattr(dist, name, wrap(name, getattr(dist, name)))
    return calls


def number_of_collectives(world: World) -> None:
    with pytest.MonkeyPatch.context() as patch:
        calls = _counted(patch)
        ids = torch.zeros(2, 1, dtype=torch.int32)
        sent = dispatch(torch.ones(2, 4), ids, torch.ones(2, 1), experts_per_rank=_PER_RANK, group=world.group)
        assert calls == ["all_to_all_single"] * 2
        calls.clear()
        combine(sent.rows, sent, sent.weights, group=world.group)
        assert calls == ["all_to_all_single"]


def refusals_of_dispatch(world: World) -> None:
    good = (torch.ones(2, 4), torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1), torch.ones(2, 1))
    for position, name in ((1, "ids"), (2, "weights"), (3, "scales")):
        bad = [x[:1] if i == position else x for i, x in enumerate(good)]
        with pytest.raises(ValueError, match=f"^{name} has 1 rows and rows has 2; give one row per token$"):
            dispatch(*bad, experts_per_rank=_PER_RANK, group=world.group)
