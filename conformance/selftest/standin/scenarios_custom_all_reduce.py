"""AITER's all-reduce operators through the adapter and the double, on 2, 4 and 8 gloo ranks that meet through a file.

Scope: every operator at both sides of its thresholds against the declared contract, identical bits on all ranks, and
the traps of the double. Each public function is a scenario. A pass proves nothing about AMD hardware or AITER.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from accelerated.aiter_ops import allreduce, allreduce_contract
from accelerated.aiter_ops.library import AiterLibrary, load_standin
from accelerated.interface import RankContext
from accelerated.operators import Family, NormOperation, NormResult, RowProblem
from accelerated.standin.aiter_ops.jit.utils.chip_info import ARCH_VARIABLE
from conformance.rank.judge_rows import Answered, judge_call
from conformance.selftest.reference.ranks import World

EPSILON = 1e-6
#: Float32 in which 1.0 + TINY is 1.0, so that the mean square of rows of ones is 1.
TINY = 2.0**-100


@contextmanager
def _library(world: World, arch: str) -> Iterator[tuple[AiterLibrary, RankContext]]:
    os.environ[ARCH_VARIABLE] = arch
    library = load_standin()
    yield library, RankContext(world.rank, world.size, torch.device("cpu"), world.group, arch)
    allreduce.release(library)


def _problem(world: World, hidden: int, capacity: int, dtype: str = "bfloat16") -> RowProblem:
    return RowProblem(Family.ALLREDUCE_NORM, world.size, hidden, capacity, dtype)


def _values(shape: tuple[int, int], seed: int, dtype: str) -> torch.Tensor:
    """Rows of very different magnitude, the first one zero."""
    made = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=made) * torch.exp2(torch.arange(shape[0]) % 9 - 4.0)[:, None]
    values[0] = 0
    return values.to(getattr(torch, dtype))


def _rows(shape: tuple[int, int], rank: int, dtype: str) -> torch.Tensor:
    """Rows of one rank. In odd columns ranks 0 and 1 cancel, so that the order of additions shows in the rest."""
    rows = _values(shape, rank, dtype)
    if rank < 2 and dtype != "float16":
        rows[:, 1::2] = _values(shape, 100, dtype)[:, 1::2] * (2.0**18 if rank == 0 else -(2.0**18))
    return rows


class _Checked:
    """Calls, judged in turn by one rank each; what came back is summed up for a comparison over ranks."""

    def __init__(self, world: World) -> None:
        self.world, self.index, self.sums = world, 0, [torch.zeros((), dtype=torch.int64)]
        self.wrong: list[str] = []

    def call(self, library: AiterLibrary, context: RankContext, problem: RowProblem, operator: str, rows: int) -> None:
        declared = allreduce_contract.contract(problem, operator, context.arch)
        operation = allreduce.build(library, context, problem, operator)
        shape, weight = (rows, problem.hidden), _values((2, problem.hidden), 50, problem.dtype)[1]
        residual = _values(shape, 90, problem.dtype) if declared.residual else None
        mine = _rows(shape, self.world.rank, problem.dtype)
        result = operation.normalise(mine, residual, weight, EPSILON)
        operation.close()
        if declared.ranks_identical:
            self.sums.append(_sum_of(result))
        self.index += 1
        if self.index % self.world.size == self.world.rank or not declared.ranks_identical:
            terms = torch.stack([_rows(shape, rank, problem.dtype) for rank in range(self.world.size)])
            share = slice(None, None, max(1, rows // 2))
            mismatch, _ = judge_call(
                self.index, Answered(terms, residual, weight, EPSILON, 1.0, -1, result, share), declared
            )
            if mismatch is not None:
                # Raised later: the other ranks are already in the next call.
                self.wrong.append(f"{operator} with {rows} rows on {context.arch}, {problem}: {mismatch}")

    def conclude(self) -> None:
        mine = torch.stack(self.sums)
        others = [torch.empty_like(mine) for _ in range(self.world.size)]
        dist.all_gather(others, mine, group=self.world.group)
        assert all(torch.equal(mine, other) for other in others)
        assert not self.wrong, "\n".join(self.wrong)


def _sum_of(result: NormResult) -> torch.Tensor:
    """A sum of bytes, each weighted by its place."""
    tensors = [result.output, result.residual]
    if result.quantised is not None:
        tensors += [result.quantised.codes, result.quantised.scales]
    total = torch.zeros((), dtype=torch.int64)
    for tensor in tensors:
        if tensor is not None:
            flat = tensor.contiguous().view(torch.uint8).view(-1).long()
            total = total * 31 + (flat * (torch.arange(flat.numel()) % 8191 + 1)).sum()
    return total


def _at_thresholds(world: World, arch: str, sides: tuple[int, ...]) -> None:
    checked = _Checked(world)
    problem = _problem(world, 4096, 130)
    with _library(world, arch) as (library, context):
        for operator in allreduce_contract.OPERATORS:
            declared = allreduce_contract.contract(problem, operator, arch)
            for rows in sorted({1, *(m + d for m in declared.boundaries for d in sides)}):
                checked.call(library, context, problem, operator, rows)
    checked.conclude()
    assert len(checked.sums) > 25


def both_sides_of_every_threshold_on_gfx942(world: World) -> None:
    _at_thresholds(world, "gfx942", (0, 1))


def above_every_threshold_on_gfx950(world: World) -> None:
    _at_thresholds(world, "gfx950", (1,))


def other_widths_and_types(world: World) -> None:
    cells = [
        *((640, operator, "bfloat16") for operator in ("fused", "fused_per_token_emit", "fused_per_group")),
        *((8320, operator, "float16") for operator in ("fused_per_group_emit", "fused_per_group_transposed", "split")),
        *((128, operator, "float16") for operator in ("fused_per_token", "fused_mxfp4_emit", "fused_gemma")),
        *((hidden, "fused", "bfloat16") for hidden in (16384, 16392, 8)),
        *((hidden, operator, "float32") for hidden in (24, 2048) for operator in ("fused", "split")),
        (1024, "fused_per_token", "float32"),
    ]
    checked = _Checked(world)
    with _library(world, "gfx942") as (library, context):
        for hidden, operator, dtype in cells:
            checked.call(library, context, _problem(world, hidden, 5, dtype), operator, 5)
    checked.conclude()


def sums_on_gfx1250(world: World) -> None:
    if world.size > 4:
        assert "four at most" in allreduce_contract.support(_problem(world, 512, 5), "split", "gfx1250").reason
        return
    checked = _Checked(world)
    with _library(world, "gfx1250") as (library, context):
        for rows in (2, 5):
            checked.call(library, context, _problem(world, 512, 5), "split", rows)
    checked.conclude()


def _ones(
    world: World, library: AiterLibrary, context: RankContext, operator: str, rows: int, weight: torch.Tensor
) -> NormResult:
    """Rows that sum to ones without a residual, so that the output is the weight."""
    problem = _problem(world, weight.numel(), 400)
    operation: NormOperation = allreduce.build(library, context, problem, operator)
    mine = torch.full((rows, weight.numel()), float(world.rank == 0), dtype=torch.bfloat16)
    return operation.normalise(mine, torch.zeros_like(mine), weight, TINY)


def midpoints_of_fp4_round_away_in_the_kernel_and_to_even_after_it(world: World) -> None:
    weight = torch.tensor(
        [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5, -0.0]
    )
    away = [1, 2, 3, 4, 5, 6, 7, 7, 9, 10, 11, 12, 13, 14, 15, 0]
    even = [0, 2, 2, 4, 4, 6, 6, 7, 8, 10, 10, 12, 12, 14, 14, 8]
    with _library(world, "gfx950") as (library, context):
        for rows, wanted, stride in ((1, away, 128), (64, away, 128), (65, even, 1)):
            result = _ones(world, library, context, "fused_mxfp4", rows, weight.repeat(256).bfloat16()).quantised
            assert result is not None
            codes = torch.stack((result.codes[-1] & 15, result.codes[-1] >> 4), 1).view(-1)
            assert codes[:16].tolist() == codes[-16:].tolist() == wanted
            assert (result.scales.shape, result.scales.stride(0)) == ((rows, 128), stride)
            assert result.scales.unique().tolist() == [127]


def a_zero_row_has_scale_one_in_the_kernel_and_zero_after_it(world: World) -> None:
    zeros = torch.zeros(4096, dtype=torch.bfloat16)
    with _library(world, "gfx942") as (library, context):
        for operator, groups, most in (("fused_per_token", 1, 65), ("fused_per_group", 32, 65)):
            for rows in (1, 17, most):
                result = _ones(world, library, context, operator, rows, zeros).quantised
                assert result is not None
                assert result.scales.shape == (rows, groups)
                assert bool((result.scales == 1).all())
                assert not result.codes.any()
        result = _ones(world, library, context, "fused_per_token", 3, zeros[:640].contiguous()).quantised
        assert result is not None
        assert result.scales.tolist() == [[0.0]] * 3


def transposed_scales_lie_in_columns(world: World) -> None:
    with _library(world, "gfx942") as (library, context):
        for hidden, rows in ((4096, 3), (4096, 20), (8320, 3)):
            weight = torch.arange(1, hidden // 128 + 1).repeat_interleave(128).bfloat16()
            plain = _ones(world, library, context, "fused_per_group", rows, weight).quantised
            turned = _ones(world, library, context, "fused_per_group_transposed", rows, weight).quantised
            assert plain is not None
            assert turned is not None
            assert plain.scales.stride() == (hidden // 128, 1)
            assert turned.scales.stride() == (1, rows)
            assert torch.equal(plain.scales, turned.scales)
            assert len(plain.scales[0].unique()) == hidden // 128


def gfx942_cuts_off_but_for_the_residual_of_two_stages(world: World) -> None:
    # 1 + 2**-8 + 2**-9 lies three quarters of a step above 1: cut off it is 1, to nearest 1 + 2**-7.
    low, high = 1.0, 1.0 + 2.0**-7
    for arch, wanted in (("gfx942", (low, low, high, high)), ("gfx950", (high,) * 4)):
        with _library(world, arch) as (library, context):
            cells = (("fused", 1), ("fused_per_token", 16), ("fused_per_token", 17), ("fused_per_token", 65))
            for (operator, rows), residual_out in zip(cells, wanted, strict=True):
                mine = torch.full((rows, 4096), float(world.rank == 0), dtype=torch.bfloat16)
                residual = torch.full_like(mine, 2.0**-8 + 2.0**-9)
                operation = allreduce.build(library, context, _problem(world, 4096, 400), operator)
                result = operation.normalise(mine, residual, torch.ones(4096, dtype=torch.bfloat16), TINY)
                assert result.residual is not None
                assert result.residual.unique().tolist() == [residual_out], (arch, operator, rows)


def a_warm_up_gives_zeros_and_moves_nothing(world: World) -> None:
    with _library(world, "gfx942") as (library, context):
        operations = {
            name: allreduce.build(library, context, _problem(world, 4096, 8), name)
            for name in allreduce_contract.OPERATORS
        }
        rows = torch.ones(3, 4096, dtype=torch.bfloat16)
        state = library.distributed("parallel_state")
        # Only one rank calls: a collective would wait for the others.
        with state.graph_capture():
            for name, operation in operations.items() if world.rank == 0 else ():
                residual = None if name == "fused_no_residual" else rows
                result = operation.normalise(rows, residual, rows[0], EPSILON)
                for tensor in (result.output, result.residual) if name != "split" else ():
                    assert tensor is None or (tensor.shape == rows.shape and not tensor.any())
                if result.quantised is not None:
                    assert not result.quantised.codes.any()
                    assert not result.quantised.scales.any()
                if name.endswith("transposed"):
                    assert result.quantised is not None
                    assert result.quantised.scales.stride() == (1, 3)
        dist.barrier(world.group)
        output = operations["fused"].normalise(rows, rows, rows[0], EPSILON).output
        assert output is not None
        assert bool(output.all())


def the_default_group_gets_its_store_back(world: World) -> None:
    found = dist.distributed_c10d._get_default_store()
    with _library(world, "gfx942") as (library, context):
        allreduce.build(library, context, _problem(world, 512, 8), "fused")
        assert dist.distributed_c10d._get_default_store() is found
        ranks = torch.ones(1)
        dist.all_reduce(ranks, group=world.group)
        assert int(ranks) == world.size


def it_asks_for_a_tcp_store(world: World) -> None:
    with _library(world, "gfx942") as (library, _):
        state = library.distributed("parallel_state")
        state.init_distributed_environment(world.size, world.rank, backend="gloo")
        message = ""
        try:
            state.ensure_model_parallel_initialized(world.size, 1)
        except AssertionError as error:
            message = str(error)
        # A rank that leaves takes down the connections that another one is still making.
        dist.barrier(group=world.group)
        assert "has a FileStore; the handles travel through a TCPStore" in message
