"""Scenarios of quantised rows on gloo ranks: every wire format through every dispatch that carries it.

Scope: codes and scales are random bytes and must arrive bit for bit with the token they belong to, whatever they mean;
what combine does with element-type rows must not depend on the wire. A pass proves nothing about hardware.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from accelerated.contract import ReceiveLayout, Standing
from accelerated.interface import RankContext
from accelerated.registry import backend
from accelerated.wires import as_bytes, row_shape, scale_shape
from conformance.selftest.reference.ranks import World
from reference.dispatch_combine import destination_ranks, slot_owners
from reference.problem import WIRES, Problem

#: Raw scales: words and single bytes, of sizes that leave what lies behind them unaligned.
_RAW = ("fp8_raw3x4", "fp8_raw1x1", "fp8_raw5x1")
_HIDDEN, _TOP_K, _CAPACITY, _ARCH = 256, 2, 5, "gfx950"


@cache
def _opened(name: str, rank: int, size: int) -> tuple[Any, Any]:
    """Backend and its session, one per process: MoRI cannot be initialised twice."""
    import torch.distributed as dist

    made, group = backend(name, _ARCH), dist.group.WORLD
    assert group is not None
    return made, made.open(RankContext(rank, size, torch.device("cpu"), group, _ARCH))


def _problem(world: World, wire: str, nodes: int = 1) -> Problem:
    return Problem(world.size, _HIDDEN, 2 * world.size, _TOP_K, _CAPACITY, nodes=nodes, wire=wire)


def _sent(rank: int, tokens: int, problem: Problem, seed: int) -> tuple[torch.Tensor, ...]:
    """What a rank dispatches; of random bytes where there is a wire."""
    generator = torch.Generator().manual_seed(100 * seed + rank)

    def noise(columns: int) -> torch.Tensor:
        return torch.randint(0, 256, (tokens, columns), generator=generator, dtype=torch.uint8)

    columns, size = row_shape(problem)
    kind = {"": torch.bfloat16, "mxfp4": torch.uint8}.get(problem.wire, torch.float8_e4m3fn)
    rows = noise(columns * size).view(kind)
    ids = torch.randint(0, problem.experts, (tokens, _TOP_K), generator=generator, dtype=torch.int32)
    weights = torch.rand(tokens, _TOP_K, generator=generator)
    if not problem.wire:
        return rows, ids, weights
    groups, scale_bytes = scale_shape(problem)
    if not groups:
        return rows, ids, weights
    return rows, ids, weights, noise(groups * scale_bytes).view(torch.float32 if scale_bytes == 4 else torch.uint8)


def _round(world: World, operation: Any, problem: Problem, counts: list[int], every_row: bool, seed: int) -> None:
    everyone = [_sent(rank, count, problem, seed) for rank, count in enumerate(counts)]
    held = [destination_ranks(slot_owners(one[1], 2, world.size), world.size) for one in everyone]
    want = {(r, t) for r, to in enumerate(held) for t in range(counts[r]) if every_row or to[t, world.rank]}
    mine = everyone[world.rank]
    got = operation.prepare(*mine)
    sources = [(r, t) for r, t in got.source_map().tolist()]
    assert got.count.tolist() == [len(sources)]
    assert (len(sources), set(sources)) == (len(want), want)
    assert (got.rows.dtype, got.rows.shape[1]) == (mine[0].dtype, mine[0].shape[1])
    assert (got.scales is None) == (scale_shape(problem)[0] == 0)
    for i, (rank, token) in enumerate(sources):
        for column, found in enumerate((got.rows, got.ids, got.weights, got.scales)):
            if found is None:  # scales of a wire without any
                continue
            sent = everyone[rank][column]
            assert found.dtype == sent.dtype
            assert torch.equal(as_bytes(found[i : i + 1]), as_bytes(sent[token : token + 1])), (column, rank, token)
    answers = torch.zeros(got.rows.shape[0], _HIDDEN, dtype=torch.bfloat16)
    for i, (rank, token) in enumerate(sources):
        answers[i] = (8 * rank + token + 1) if held[rank][token, world.rank] else 0
    combined = operation.finalize(answers, got).output[: counts[world.rank]]
    values = 8 * world.rank + torch.arange(counts[world.rank]) + 1
    assert torch.equal(combined, (held[world.rank].sum(1) * values).bfloat16().unsqueeze(1).expand(-1, _HIDDEN))


def _runs(world: World, name: str) -> list[str]:
    """Every wire, and none, through every kernel type of a backend; returns what it refuses."""
    made, session = _opened(name, world.rank, world.size)
    refused = []
    for kernel_type in made.kernel_types:
        for wire in ("", *WIRES, *_RAW):
            nodes = 2 if world.size == 4 and kernel_type in ("InterNodeV1", "InterNodeV1LL", "node-levels") else 1
            problem = _problem(world, wire, nodes)
            if made.support(problem, kernel_type).standing is Standing.REFUSED:
                refused.append(f"{kernel_type} {wire}")
                continue
            layout = made.contract(problem, kernel_type).receive_layout
            operation = session.build(problem, kernel_type)
            for seed, counts in enumerate(([_CAPACITY] * world.size, [(3 * r + 2) % 5 for r in range(world.size)])):
                _round(world, operation, problem, counts, layout is ReceiveLayout.EVERY_ROW, seed)
            _round(world, operation, problem, [0] * world.size, False, 9)
            operation.close()
    return refused


def through_the_specification(world: World) -> None:
    assert _runs(world, "reference") == []


def through_the_all_gather(world: World) -> None:
    assert _runs(world, "allgather") == []


def through_replicas(world: World) -> None:
    assert _runs(world, "replicated") == []


def through_moris_double(world: World) -> None:
    assert _runs(world, "mori-standin") == []


def _wider(rows: torch.Tensor) -> torch.Tensor:
    """Rows of twice as many elements; some backends take rows of fewer."""
    return rows.view(torch.uint8).repeat(1, 2).view(rows.dtype)


def what_is_not_of_the_wire_is_refused(world: World) -> None:
    for name in ("reference", "allgather", "replicated", "mori-standin"):
        made, session = _opened(name, world.rank, world.size)
        kernel_type = made.kernel_types[0]
        plain, problem = _problem(world, ""), _problem(world, "fp8_group")
        bare, (rows, ids, weights, scales) = _sent(0, 3, plain, 0), _sent(0, 3, problem, 0)
        operation = session.build(plain, kernel_type)
        with pytest.raises(
            ValueError, match=r"^scales given to a dispatch without wire; build it for one of fp8_token"
        ):
            operation.prepare(*bare, scales)
        operation.close()
        operation = session.build(problem, kernel_type)
        for wrong, message in (
            ((rows, ids, weights, None), r"^no scales given; the wire fp8_group carries them"),
            ((_wider(rows), ids, weights, scales), r"^rows .*512\D.*(the wire fp8_group carries \[3, 256\] of 1|fit)"),
            (
                (rows, ids, weights, scales[:, :1]),
                r"^scales \[3, 1\] .*; the wire fp8_group carries \[3, 2\] of 4 byte",
            ),
            ((rows, ids, weights, scales[:2]), r"^scales \[2, 2\] torch.float32; the wire fp8_group carries \[3, 2\]"),
            ((rows, ids, weights, scales.double()), r"^scales \[3, 2\] torch.float64; the wire fp8_group carries"),
            ((*bare, scales), r"^rows \[3, 256\] torch.bfloat16; the wire|^rows .* do not fit"),
        ):
            with pytest.raises(ValueError, match=message):
                operation.prepare(*wrong)
        if name == "mori-standin":
            with pytest.raises(
                ValueError, match=r"^rows are torch.float8_e4m3fnuz; MoRI has kernels for torch.float8_e4"
            ):
                operation.prepare(rows.view(torch.float8_e4m3fnuz), ids, weights, scales)
        operation.close()
