"""Paths at both sides of every threshold, against row counts worked out by hand from the sources.

Scope: the rules, and that no threshold is missing. A pass does not prove that AITER or vLLM takes the path.
"""

from __future__ import annotations

import random

import pytest

from accelerated.operators import Family, RowProblem
from reference import eligibility
from reference.eligibility import VllmPass, boundaries, path
from reference.eligibility_rules import TABLES, Path
from reference.problem import ProblemError

ONE, TWO, SPLIT, THROWS = Path.ONE_STAGE, Path.TWO_STAGE, Path.SPLIT, Path.THROWS
PLAIN_ONE, PLAIN_TWO, WRITE, RCCL = Path.PLAIN_ONE_STAGE, Path.PLAIN_TWO_STAGE, Path.PLAIN_WRITE, Path.RCCL


def sizes(ranks: int, hidden: int, capacity: int = 1 << 20, dtype: str = "bfloat16") -> RowProblem:
    return RowProblem(Family.ALLREDUCE_NORM, ranks, hidden, capacity, dtype)


@pytest.mark.parametrize(
    ("kind", "ranks", "hidden", "rows", "below", "above"),
    [
        # 128 * 7168 * 2 bytes over all ranks, whatever the row: 917,504 bytes at 2 ranks, 229,376 at 8.
        ("norm", 2, 7168, 64, ONE, SPLIT),
        ("norm", 4, 7168, 32, ONE, SPLIT),
        ("norm", 8, 7168, 16, ONE, SPLIT),
        ("norm", 8, 512, 224, ONE, SPLIT),
        ("norm", 8, 504, 227, ONE, THROWS),  # too narrow for the kernel after the reduce-scatter
        ("norm", 8, 16384, 2047, SPLIT, WRITE),  # below 64 MiB
        ("norm", 2, 16384, 2048, PLAIN_ONE, RCCL),  # up to 64 MiB
        ("all_reduce", 4, 7168, 11, PLAIN_ONE, PLAIN_TWO),  # below 160 KiB
        ("all_reduce", 8, 7168, 5, PLAIN_ONE, PLAIN_TWO),  # below 80 KiB
        ("all_reduce", 8, 8192, 4, PLAIN_ONE, PLAIN_TWO),  # 5 rows are 80 KiB exactly
        ("all_reduce", 6, 7168, 5, PLAIN_ONE, PLAIN_TWO),
        ("all_reduce", 8, 8192, 256, PLAIN_TWO, WRITE),  # above 4 MiB
        ("per_token", 8, 4096, 16, ONE, TWO),  # 128 KiB
        ("per_token", 8, 4096, 64, TWO, SPLIT),  # 512 KiB
        ("per_group", 2, 7168, 9, ONE, TWO),
        ("per_group", 2, 7168, 36, TWO, SPLIT),
        ("mxfp4", 2, 4096, 32, ONE, TWO),
        ("mxfp4", 2, 6144, 16, ONE, TWO),
        ("mxfp4", 2, 7168, 4, ONE, TWO),
        ("mxfp4", 2, 8192, 8, ONE, TWO),
        ("mxfp4", 8, 4096, 15, ONE, TWO),  # 8 ranks prefer two stages from 16 rows on
        ("mxfp4_emit", 2, 128, 32, ONE, ONE),  # 16 packs are no multiple of 32: Triton quantises
    ],
)
def test_both_sides(kind: str, ranks: int, hidden: int, rows: int, below: Path, above: Path) -> None:
    problem = sizes(ranks, hidden)
    assert path(problem, rows, kind, "gfx942").path is below
    assert path(problem, rows + 1, kind, "gfx942").path is above
    assert rows in boundaries(problem, kind, "gfx942")


@pytest.mark.parametrize(
    ("kind", "hidden", "rows"),
    [("per_token", 4096, 512), ("per_group", 8192, 4095), ("mxfp4", 8192, 32), ("mxfp4", 7168, 36)],
)
def test_quantiser_becomes_a_kernel_of_its_own(kind: str, hidden: int, rows: int) -> None:
    assert not path(sizes(8, hidden), rows, kind, "gfx950").separate_quantiser
    assert path(sizes(8, hidden), rows + 1, kind, "gfx950").separate_quantiser


def test_only_gfx942_writes_to_remote_ranks() -> None:
    problem = sizes(8, 8192)
    assert path(problem, 257, "all_reduce", "gfx950").path is PLAIN_TWO
    # 4 MiB and 16 bytes: shares of the ranks are not whole packs, so the other kernel is taken.
    assert path(sizes(8, 8, 1 << 20), 262145, "all_reduce", "gfx942").path is PLAIN_TWO


def test_no_fused_kernel() -> None:
    assert path(sizes(6, 7168), 1, "norm", "gfx942").path is PLAIN_ONE
    assert path(sizes(6, 7168), 1, "per_token", "gfx942").path is THROWS
    assert path(sizes(8, 16392), 1, "norm", "gfx942").path is PLAIN_ONE
    assert path(sizes(3, 7168), 1, "norm", "gfx942").path is RCCL
    assert path(sizes(2, 20), 1, "norm", "gfx942").path is RCCL
    assert path(sizes(2, 16384), 4, "mxfp4", "gfx942").path is THROWS
    assert path(sizes(2, 4096), 1, "norm", "gfx1250").path is THROWS
    assert path(sizes(4, 4096), 1, "all_reduce", "gfx1250").path is Path.PLAIN_FROM_SELF


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_no_threshold_is_missing(arch: str) -> None:
    draw = random.Random(7)
    for kind in TABLES["aiter"]:
        for _ in range(3):
            problem = sizes(draw.choice((2, 4, 6, 8)), draw.choice((64, 512, 2048, 4096, 7168, 8192, 16384)), 600)
            routes = [path(problem, rows, kind, arch) for rows in range(1, 601)]
            changes = tuple(rows for rows in range(1, 600) if routes[rows - 1] != routes[rows])
            assert boundaries(problem, kind, arch) == changes, (kind, problem)


def test_every_rule_names_its_source() -> None:
    rules = [rule for kinds in TABLES.values() for table in kinds.values() for each in table for rule in each.rules]
    assert len(rules) > 100
    assert all(rule.source for rule in rules)
    assert str(rules[0]) == "gfx architecture in gfx1250 (CA:717, custom_all_reduce_gfx1250.cuh:373)"


@pytest.mark.parametrize(
    ("ranks", "hidden", "rows"),
    [(2, 7168, 80), (2, 512, 80), (4, 7168, 18), (8, 6144, 10), (8, 7168, 9), (4, 8192, 15)],
)
def test_vllm_changes_stage(ranks: int, hidden: int, rows: int) -> None:
    problem = sizes(ranks, hidden, 200)
    assert boundaries(problem, "norm", "gfx950", "vllm") == (rows,)
    assert path(problem, rows, "norm", "gfx950", "vllm").path is ONE
    assert path(problem, rows + 1, "norm", "gfx950", "vllm").path is SPLIT
    assert path(sizes(ranks, 8200), 1, "norm", "gfx950", "vllm").path is SPLIT


def test_vllm_pass() -> None:
    a_pass = VllmPass(max_num_batched_tokens=8192)
    problem = sizes(8, 7168)
    assert a_pass.max_token_num(problem) == 64 * 2**20 // (7168 * 2) == 4681
    assert VllmPass(1000).max_token_num(problem) == 1000
    assert a_pass.fuses(problem, 4681, 1e-6)
    assert not a_pass.fuses(problem, 4682, 1e-6)
    assert a_pass.fuses(problem, 1, 1e-5)
    assert not a_pass.fuses(problem, 1, 2e-6)
    assert not a_pass.fuses(sizes(1, 7168), 1, 1e-6)
    assert [name for name in a_pass.fusions if not a_pass.fuses(problem, 1, 1e-6, name)] == [
        "fp8_per_token",
        "fp8_per_tensor",
    ]
    older = VllmPass(8192, fusions=eligibility.VLLM_FUSIONS["37891"])
    assert not older.fuses(problem, 1, 1e-6, "fp8_per_group")
    assert older.fuses(problem, 1, 1e-6, "mxfp4")


def test_what_has_no_rules_is_refused() -> None:
    with pytest.raises(ProblemError, match="rows is 0"):
        path(sizes(2, 512), 0, "norm", "gfx942")
    with pytest.raises(ProblemError, match="no rules for vllm mxfp4"):
        path(sizes(2, 512), 1, "mxfp4", "gfx942", "vllm")
