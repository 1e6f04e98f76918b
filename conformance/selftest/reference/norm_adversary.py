"""Legal kernels of residual add + RMSNorm, as different as the numerics allow, and rows that bring out the difference.

Scope: numpy's float32 with roundings of its own; sums over ranks and of squares in any order, fused multiply-add,
division and reciprocal root some units in the last place off. It proves nothing by itself; test_rms_norm.py uses it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from conformance.selftest.reference.adversary import Array, to_bfloat16
from reference.norm_numerics import NormInput, NormNumerics, SumOrder, WeightProduct

F32 = np.float32


@dataclass
class Outcome:
    """What a legal kernel returns: float32 arrays ``[M, N]``."""

    residual: Array
    output: Array
    unrounded: Array


def to(dtype: torch.dtype, value: Array) -> Array:
    """Float32 ``value`` rounded to nearest ``dtype``; float32."""
    if dtype == torch.bfloat16:
        return to_bfloat16(value)
    rounded: Array = value.astype(np.float16 if dtype == torch.float16 else F32).astype(F32)
    return rounded


def families(
    shape: tuple[int, int, int], dtype: torch.dtype, random: np.random.Generator
) -> Iterator[tuple[str, Array]]:
    """Named addends ``[W + 1, M, N]``: the rows of W ranks and the residual."""
    ranks, rows, width = shape
    size = (ranks + 1, rows, width)
    normal = random.standard_normal(size)
    largest = {torch.float16: 4.0}.get(dtype, 20.0)
    yield "normal", normal
    yield "rows of different size", normal * np.exp2(random.uniform(-largest, largest, (1, rows, 1)))
    yield "elements of different size", normal * np.exp2(random.integers(-8, 9, size))
    yield "one outlier", np.where(np.arange(width) == random.integers(width), 100.0, 1.0) * normal
    yield "positive", np.abs(normal) + 1
    cancelling = normal.copy()
    cancelling[-1] = -cancelling[:-1].sum(0) * (1 + 2.0**-8 * random.integers(-2, 3, (rows, width)))
    yield "residual cancels", cancelling
    yield "constant magnitude", random.choice([-1.0, 1.0], size) * (1 + 2.0**-7 * random.integers(0, 4, (1, rows, 1)))
    yield "tiny", normal * 1e-6
    yield "midpoints", random.integers(-257, 258, size) / 128.0


def sum_over_ranks(terms: Array, order: SumOrder, random: np.random.Generator) -> Array:
    """Float32 sum of ``terms [W, M, N]`` in a legal order, drawn for each call."""
    ranks = list(range(len(terms)))
    if order is SumOrder.ROTATED:
        first = int(random.integers(len(ranks)))
        ranks = ranks[first:] + ranks[:first]
    elif order is SumOrder.ANY:
        ranks = list(random.permutation(len(ranks)))
    total: Array = terms[ranks[0]].astype(F32)
    for rank in ranks[1:]:
        total = (total + terms[rank]).astype(F32)
    return total


def sum_of_squares(x: Array, how: str, random: np.random.Generator) -> Array:
    """Float32 sum of squares of rows ``[M, N]``, ``[M, 1]``."""
    if how in ("ascending", "descending"):
        index = np.argsort(np.abs(x), axis=1)
        x = np.take_along_axis(x, index if how == "ascending" else index[:, ::-1], axis=1)
    elif how == "shuffled":
        x = x[:, random.permutation(x.shape[1])]
    if how == "tree":
        parts = (x * x).astype(F32)
        while parts.shape[1] > 1:
            parts = np.pad(parts, ((0, 0), (0, parts.shape[1] % 2)))
            parts = (parts[:, ::2] + parts[:, 1::2]).astype(F32)
        return parts
    fused = bool(random.integers(2))
    total = np.zeros((x.shape[0], 1), F32)
    wide = x.astype(np.float64)
    for column in range(x.shape[1]):
        square = wide[:, column : column + 1] ** 2  # exact
        total = (total + (square if fused else square.astype(F32))).astype(F32)
    return total


def furthest(exact: Array, direction: Array, ulps: int = 2) -> Array:
    """Float32 numbers that are as far from ``exact`` (float64, not negative) as ``ulps`` units in the last place allow.

    ``direction`` is -1, 0 (the nearest number) or 1. Zero stays.
    """
    near: Array = exact.astype(F32)
    unit = np.ldexp(1.0, np.frexp(exact)[1] - 24)
    far = near
    for steps in range(1, ulps + 1):
        moved = (near.view(np.int32) + (steps * direction).astype(np.int32)).view(F32)
        far = np.where((near > 0) & (np.abs(moved - exact) <= ulps * unit), moved, far)
    return far


def kernel(
    addends: Array,
    weight: Array,
    epsilon: float,
    numerics: NormNumerics,
    dtype: torch.dtype,
    random: np.random.Generator,
) -> Outcome:
    """One legal kernel on ``addends [W + 1, M, N]``, its free choices drawn; with EITHER they vary by element."""
    total = sum_over_ranks(addends[:-1], numerics.sum_order, random)
    if numerics.round_reduced:
        total = to(dtype, total)
    total = (total + addends[-1]).astype(F32)
    residual = to(dtype, total)
    rows = len(total)
    x, squared = {
        NormInput.UNROUNDED: (total, total),
        NormInput.ROUNDED: (residual, residual),
        NormInput.EITHER: (
            np.where(random.integers(0, 2, total.shape) == 1, total, residual),
            (total, residual)[random.integers(2)],
        ),
    }[numerics.norm_input]
    orders = ["tree"] if numerics.square_additions else ["ascending", "descending", "shuffled", "tree", "as it is"]
    how = str(random.choice(orders))
    squares = sum_of_squares(squared, how, random)
    mean = furthest(squares.astype(np.float64) / x.shape[1], random.integers(-1, 2, (rows, 1)))
    shifted = (mean + F32(epsilon)).astype(F32)
    root = furthest(1 / np.sqrt(shifted.astype(np.float64)), random.integers(-1, 2, (rows, 1)))
    scale = (weight + F32(1)).astype(F32) if numerics.gemma else weight.astype(F32)
    norm_first = ((x * root).astype(F32) * scale).astype(F32)
    weight_first = ((x * scale).astype(F32) * root).astype(F32)
    y = {
        WeightProduct.NORM_FIRST: norm_first,
        WeightProduct.WEIGHT_FIRST: weight_first,
        WeightProduct.EITHER: np.where(random.integers(0, 2, x.shape) == 1, norm_first, weight_first),
        WeightProduct.ROUNDED_NORM: (to(dtype, (x * root).astype(F32)) * scale).astype(F32),
    }[numerics.product]
    return Outcome(residual, to(dtype, y), y)
