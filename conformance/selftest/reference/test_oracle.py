"""The oracle against exact rational arithmetic on tiny layers, its independence, and where its data are exact.

Scope: reference/oracle.py in one process; selftest/rank/test_programs.py compares it with the distributed path. What a
pass does not prove: that both derivations read the contract of a library rightly.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from random import Random

import pytest
import torch

from reference import oracle
from reference.placement import expert_map

TYPES = {torch.bfloat16: 8, torch.float32: 24}
Row = Sequence[int]


def _round(value: Fraction, bits: int) -> Fraction:
    """Nearest number with ``bits`` significant bits, ties to even."""
    if not value:
        return value
    exponent = math.frexp(float(value))[1]
    while abs(value) >= Fraction(2) ** exponent:
        exponent += 1
    while abs(value) < Fraction(2) ** (exponent - 1):
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, -125) - bits)
    return round(value / unit) * unit


def _expert(e: int, x: Fraction) -> Fraction:
    return (e + 2) * x - e


def _experts(ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    e = ids.double().unsqueeze(1)
    return (e + 2) * x - e


def _answer(
    x: Fraction, row: Row, weights: Sequence[float], per_rank: int, size: int, bits: int, nodes: int
) -> Fraction:
    """One element, exactly but for the stores."""
    sent: dict[int, Fraction] = {}
    for e, w in zip(row, weights, strict=True):
        if 0 <= e < per_rank * size:
            sent[e // per_rank] = sent.get(e // per_rank, Fraction(0)) + Fraction(w) * _expert(e, x)
    stored = {rank: _round(value, bits) for rank, value in sent.items()}
    per_node = size // nodes
    sums = [sum((v for r, v in stored.items() if r // per_node == node), Fraction(0)) for node in range(nodes)]
    return _round(sum((_round(s, bits) for s in sums), Fraction(0)) if nodes > 1 else sums[0], bits)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("size", "nodes"), [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)])
@pytest.mark.parametrize("grid", [2.0**-4, None])
def test_values_are_exact_sums_stored(dtype: torch.dtype, size: int, nodes: int, grid: float | None) -> None:
    random, per_rank, top_k = Random(size * 10 + nodes), 2, 4
    routing = [[random.randint(-1, per_rank * size) for _ in range(top_k)] for _ in range(40)]
    rows = torch.tensor([[random.randint(-200, 200) for _ in range(6)] for _ in routing]).to(dtype)
    weights = torch.tensor([[random.randint(1, 16) / 16 for _ in range(top_k)] for _ in routing])
    options = {"experts_per_rank": per_rank, "world_size": size, "dtype": dtype, "nodes": nodes, "grid": grid}
    got = oracle.layer_output(rows, routing, weights, _experts, **options)  # type: ignore[arg-type]
    for token, row in enumerate(routing):
        w = weights[token].tolist()
        want = [float(_answer(Fraction(x), row, w, per_rank, size, TYPES[dtype], nodes)) for x in rows[token].tolist()]
        assert got.value[token].tolist() == want
        reached = len({e // per_rank for e in row if 0 <= e < per_rank * size})
        assert got.weights[token].tolist() == [reached * x for x in w]
    assert bool((got.lower <= got.value).all())
    assert bool((got.value <= got.upper).all())
    assert torch.equal(got.lower, got.upper) is (grid is not None)


@pytest.mark.parametrize("row", [[1, 0], [3, 0]])  # both on one rank, one on each
def test_the_grid_is_no_promise_beyond_24_bits(row: Row) -> None:
    """Data said to be on the grid but too large for it keep an interval; smaller ones have none."""
    options = {"experts_per_rank": 2, "world_size": 2, "dtype": torch.float32, "grid": 0.0625}
    for size, width in ((2.0**10, False), (2.0**20, True)):
        got = oracle.layer_output(torch.tensor([[size]]), [row], torch.ones(1, 2), _experts, **options)  # type: ignore[arg-type]
        assert bool((got.upper > got.lower).item()) is width


def test_cancellation_inside_an_expert_keeps_its_slack() -> None:
    """a x + b may cancel to nothing while both round."""
    x = torch.tensor([[1.0 + 2.0**-20]])
    got = oracle.layer_output(
        x,
        [[0]],
        torch.full((1, 1), 1 / 3),
        lambda ids, y: 3 * y - 3,
        experts_per_rank=1,
        world_size=1,
        dtype=torch.float32,
    )
    low, high = got.lower.item(), got.upper.item()
    exact = 2.0**-20
    assert low < exact < high
    # One rounding of w a x = 1.000001 alone is half a unit of 1; three of them fit.
    assert high - low >= 2 * 2.0**-24


def test_every_addition_rounding_widens() -> None:
    rows, routing, weights = torch.full((1, 4), 1.0), [[0, 2, 4, 6]], torch.ones(1, 4)
    options = {"experts_per_rank": 2, "world_size": 4, "dtype": torch.bfloat16}
    once = oracle.layer_output(rows, routing, weights, _experts, **options)  # type: ignore[arg-type]
    each = oracle.layer_output(rows, routing, weights, _experts, every_addition_rounds=True, **options)  # type: ignore[arg-type]
    assert float((each.upper - each.lower).min()) > float((once.upper - once.lower).max())
    # Three roundings of u = 2**-8, relative to the sum of magnitudes; each perhaps of a number rounded to float32,
    # which adds 2**-24 and the product; and no more than the second order above that.
    least, most, magnitude = 3 * 2.0**-8, 3 * (2.0**-8 + 2.0**-24) * (1 + 2.0**-24), float(once.value[0, 0])
    assert least * magnitude <= float(each.upper[0, 0] - each.value[0, 0]) <= most / (1 - most) * magnitude


def test_received_set_and_destinations() -> None:
    routing = [[(0, 1), (-1, 9)], [], [(5, 2), (8, 8)]]
    assert [oracle.received_set(routing, rank, 3, 3) for rank in range(3)] == [
        [(0, 0), (2, 0)],
        [(2, 0)],
        [(2, 1)],
    ]
    for size, experts in ((2, 8), (4, 8)):
        owners = {e: r for r in range(size) for e, s in enumerate(expert_map(experts, size, r) or ()) if s >= 0}
        assert all(oracle.destinations_of([e], experts // size, size) == [owners[e]] for e in range(experts))


def test_no_tokens() -> None:
    got = oracle.layer_output(
        torch.empty(0, 5),
        [],
        torch.empty(0, 3),
        _experts,
        experts_per_rank=1,
        world_size=4,
        dtype=torch.bfloat16,
        nodes=2,
    )
    assert [t.shape for t in (got.value, got.lower, got.upper, got.weights)] == [(0, 5)] * 3 + [(0, 3)]


def test_the_oracle_imports_nothing_of_ours() -> None:
    tree = ast.parse(Path(oracle.__file__).read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} == {"__future__", "collections", "dataclasses", "torch"}
    assert not any("distributed" in name for name in names)
    calls = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not calls & {"__import__", "exec", "eval"}
