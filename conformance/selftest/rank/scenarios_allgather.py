"""Scenarios of the all-gather backend on gloo ranks, driven without the program.

Scope: which rows arrive where and in which order, what comes back, what is refused. A pass proves nothing about NCCL or
RCCL.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from accelerated.allgather import NAIVE, AllGatherBackend, AllGatherOperation
from accelerated.interface import RankContext, Received
from conformance.selftest.reference.ranks import World
from reference.problem import Problem

_HIDDEN, _TOP_K, _CAPACITY = 6, 3, 5


def _build(
    world: World, dtype: str = "float32", capacity: int = _CAPACITY, hidden: int = _HIDDEN
) -> AllGatherOperation:
    context = RankContext(world.rank, world.size, torch.device("cpu"), world.group, "gfx942")
    problem = Problem(world.size, hidden, 2 * world.size, _TOP_K if world.size > 1 else 2, capacity, dtype)
    return AllGatherBackend().open(context).build(problem, NAIVE)


def _sent(rank: int, tokens: int, top_k: int, dtype: torch.dtype, hidden: int) -> tuple[torch.Tensor, ...]:
    rows = torch.arange(tokens * hidden).reshape(tokens, hidden) % 50 + 50 * rank
    ids = (torch.arange(tokens * top_k).reshape(tokens, top_k) + rank) % 5 - 1
    return rows.to(dtype), ids.int(), torch.arange(tokens * top_k).reshape(tokens, top_k) / 8 + rank


def _round(world: World, operation: AllGatherOperation, counts: list[int], dtype: str, hidden: int) -> Received:
    top_k, kind = _TOP_K if world.size > 1 else 2, getattr(torch, dtype)
    everyone = [_sent(rank, count, top_k, kind, hidden) for rank, count in enumerate(counts)]
    got = operation.prepare(*everyone[world.rank])
    total = sum(counts)
    assert got.count.tolist() == [total]
    assert got.count.dtype == torch.int32
    for tensor, column in ((got.rows, 0), (got.ids, 1), (got.weights, 2)):
        want = torch.cat([sent[column] for sent in everyone])
        assert torch.equal(tensor[:total], want)
        assert tensor.dtype == want.dtype
    assert got.source_map is not None
    assert got.source_map().tolist() == [[rank, token] for rank, count in enumerate(counts) for token in range(count)]
    return got


def rows_counts_and_sums(world: World) -> None:
    for dtype, hidden in (("float32", 6), ("bfloat16", 7), ("bfloat16", 1)):
        operation = _build(world, dtype, hidden=hidden)
        for counts in (
            [_CAPACITY] * world.size,
            [(2 * r + 1) % (_CAPACITY + 1) for r in range(world.size)],
            [0] * world.size,
            [0] * (world.size - 1) + [3],
            [1] + [0] * (world.size - 1),
        ):
            got = _round(world, operation, counts, dtype, hidden)
            # Rows beyond the count are poison, and a buffer cut at the count is as good.
            total = sum(counts)
            answers = torch.full_like(got.rows, torch.nan)
            answers[:total] = got.rows[:total] * (world.rank + 1)
            if total % 2:
                answers = answers[:total]
            output = operation.finalize(answers, got)
            start = sum(counts[: world.rank])
            factor = world.size * (world.size + 1) // 2
            want = got.rows[start : start + counts[world.rank]].float() * factor
            assert output.weights is None
            assert output.output.shape == want.shape
            assert bool(((output.output.float() - want).abs() <= (world.size - 1) * 2.0**-7 * want).all())
            assert dtype == "bfloat16" or torch.equal(output.output, want)


def results_are_fresh(world: World) -> None:
    operation = _build(world)
    first = _round(world, operation, [2] * world.size, "float32", _HIDDEN)
    kept = first.rows.clone()
    output = operation.finalize(first.rows, first).output
    before = output.clone()
    second = _round(world, operation, [4] * world.size, "float32", _HIDDEN)
    operation.finalize(second.rows * 3, second)
    assert torch.equal(first.rows, kept)
    assert torch.equal(output, before)


def one_collective_a_call(world: World) -> None:
    operation, calls = _build(world), []

    def counted(name: str, original: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            return original(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in dir(dist):
            if name.startswith(("all_", "reduce", "broadcast", "gather", "scatter", "barrier", "send", "recv")):
                original = getattr(dist, name)
                if callable(original):
                    patch.setattr(dist, name, counted(name, original))
        sent = _sent(world.rank, 2, _TOP_K if world.size > 1 else 2, torch.float32, _HIDDEN)
        got = operation.prepare(*sent)
        assert len(calls) == 1, calls
        operation.finalize(got.rows, got)
        assert len(calls) == 2, calls


def misuse_is_refused(world: World) -> None:
    operation = _build(world)
    sent = _sent(world.rank, 2, _TOP_K if world.size > 1 else 2, torch.float32, _HIDDEN)
    many = _sent(world.rank, 6, _TOP_K if world.size > 1 else 2, torch.float32, _HIDDEN)
    with pytest.raises(ValueError, match=r"^6 tokens; the capacity is 5$"):
        operation.prepare(*many)
    old = operation.prepare(*sent)
    with pytest.raises(RuntimeError, match=r"^prepare called twice: finalize the round before$"):
        operation.prepare(*sent)
    operation.finalize(old.rows, old)
    with pytest.raises(RuntimeError, match=r"^finalize called without prepare$"):
        operation.finalize(old.rows, old)
    new = operation.prepare(*sent)
    with pytest.raises(RuntimeError, match=r"^finalize called with the rows of another round$"):
        operation.finalize(old.rows, old)
    operation.finalize(new.rows, new)
    context = RankContext(world.rank, world.size, torch.device("cpu"), world.group, "gfx942")
    session = AllGatherBackend().open(context)
    with pytest.raises(ValueError, match=r"^unknown kernel type 'other'; choose naive$"):
        session.build(Problem(world.size, 4, world.size, 1, 2), "other")
    with pytest.raises(ValueError, match=rf"^the problem is for 5 ranks, the group has {world.size}$"):
        session.build(Problem(5, 4, 5, 1, 2), NAIVE)
