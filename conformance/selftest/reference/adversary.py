"""Data and orders that drive the combine sum to the ends of its acceptance interval.

Scope: term families (cancellation, ties, 2**24 patterns, subnormals, extreme sizes) and legal ways to add them up, in
numpy's float32 with a rounding of its own. It proves nothing by itself; test_bounds.py uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]
#: Adds two arrays and rounds.
Add = Callable[[Array, Array], Array]

BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
TOKENS, ELEMENTS = 8, 48
RANKS = (1, 2, 3, 4, 8, 16, 32, 64)


def to_bfloat16(value: Array) -> Array:
    """Nearest bfloat16 of float32 or float64 ``value``, ties to even, by splitting off 8 bits; float32."""
    wide = value.astype(np.float64)
    unit = np.ldexp(1.0, np.maximum(np.frexp(wide)[1], -125) - 8)
    rounded: Array = (np.rint(wide / unit) * unit).astype(np.float32)
    return rounded


def add_float32(left: Array, right: Array) -> Array:
    """One float32 addition."""
    return (left + right).astype(np.float32)


def add_bfloat16(left: Array, right: Array) -> Array:
    """One addition of bfloat16 values, computed in float32."""
    return to_bfloat16(add_float32(left, right))


def add_bfloat16_directly(left: Array, right: Array) -> Array:
    """One addition of bfloat16 values, rounded once: sums near a midpoint are exact in float64."""
    return to_bfloat16(left.astype(np.float64) + right)


def families(ranks: int, dtype: torch.dtype, random: np.random.Generator) -> Iterator[tuple[str, Array]]:
    """Named terms ``[W, n, H]`` float32 that ``dtype`` holds exactly."""
    shape = (ranks, TOKENS, ELEMENTS)
    unit = 2.0**-24 if dtype == FLOAT32 else 2.0**-8
    normal = random.standard_normal(shape)
    signs = random.choice([-1.0, 1.0], shape)
    yield "normal", normal
    yield "wide", normal * np.exp2(random.integers(-40, 41, shape))
    yield "positive", np.abs(normal)
    cancelling = normal.copy()
    cancelling[1::2] = -cancelling[: ranks // 2 * 2 : 2] * (1 + unit * random.integers(-2, 3, cancelling[1::2].shape))
    yield "cancelling", cancelling
    yield "2**24", np.where(random.random(shape) < 0.2, signs * 2.0**24, signs * random.integers(0, 4, shape))
    first = np.zeros(shape)
    first[0] = random.integers(128, 256, shape[1:]) * 2.0**-7
    half = np.exp2(random.choice([-24.0, -25.0, -9.0, -8.0, -32.0], shape))
    yield "ties", np.where(first > 0, first, signs * half)
    yield "lost", np.where(first > 0, 1.0, unit * random.choice([0.5, 1.0, 1.0, 1.5], shape))
    yield (
        "midpoint",
        np.where(first > 0, 1.0 + 2.0**-7 * random.integers(0, 2, shape), 2.0**-24)
        + np.where(np.arange(ranks).reshape(-1, 1, 1) == 1, 2.0**-8, 0.0),
    )
    least = 2.0**-149 if dtype == FLOAT32 else 2.0**-133
    yield "subnormal", random.integers(-300, 301, shape) * least
    yield "huge", normal * 2.0**118
    yield "integers", random.integers(-13 * 16 * 255, 13 * 16 * 255, shape) / 16


def representable(terms: Array, dtype: torch.dtype) -> Array:
    """``terms`` rounded to ``dtype``, as float32."""
    return to_bfloat16(terms) if dtype == BFLOAT16 else terms.astype(np.float32)


def orders(terms: Array, add: Add, random: np.random.Generator) -> Iterator[Array]:
    """Sums of ``terms [c, ...]`` over c in legal orders: by size, by sign, at random, and along trees."""
    yield _in_turn(terms, add)
    yield _in_turn(terms[::-1], add)
    for key in (np.abs(terms), -np.abs(terms), terms, random.random(terms.shape)):
        yield _in_turn(np.take_along_axis(terms, np.argsort(key, axis=0, kind="stable"), axis=0), add)
    yield _pairwise(terms, add)
    rest = list(terms)
    while len(rest) > 1:
        picked = [rest.pop(random.integers(len(rest))) for _ in range(2)]
        rest.append(add(*picked))
    yield rest[0]


def _in_turn(terms: Array, add: Add) -> Array:
    total: Array = np.zeros_like(terms[0])
    for term in terms:
        total = add(total, term)
    return total


def _pairwise(terms: Array, add: Add) -> Array:
    rest = list(terms)
    while len(rest) > 1:
        rest = [add(a, b) for a, b in zip(rest[::2], rest[1::2], strict=False)] + rest[len(rest) // 2 * 2 :]
    total: Array = rest[0]
    return total


def greedy(terms: Array, add: Add, sign: float) -> Array:
    """Sum of ``terms [c, ...]`` taking next, each time, the term whose addition errs most towards ``sign``."""
    total: Array = terms[0].copy()
    left = np.ones(terms.shape, bool)
    left[0] = False
    for _ in range(len(terms) - 1):
        error = sign * (add(total[None], terms).astype(np.float64) - (total[None].astype(np.float64) + terms))
        chosen = np.where(left, error, -np.inf).argmax(0)[None]
        total = add(total, np.take_along_axis(terms, chosen, 0)[0])
        np.put_along_axis(left, chosen, False, 0)
    return total


def add_float16(left: Array, right: Array) -> Array:
    """One float16 addition, in float32."""
    return (left + right).astype(np.float16).astype(np.float32)


def flush(value: Array) -> Array:
    """Float32 ``value`` with subnormals taken for zero."""
    flushed: Array = np.where(np.abs(value) < 2.0**-126, value * 0, value)
    return flushed


def fused(left: Array, right: Array, addend: Array) -> Array:
    """One float32 fused multiply-add: the float64 sum is rounded to odd, so that rounding it again is harmless."""
    product = left.astype(np.float64) * right
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    even = total.view(np.int64) & 1 == 0
    odd = np.where((error != 0) & even, np.nextafter(total, np.copysign(np.inf, error)), total)
    single: Array = odd.astype(np.float32)
    return single


def sums_of_products(left: Array, right: Array, random: np.random.Generator) -> Iterator[Array]:
    """Float32 sums of ``left * right`` over dimension 0: rounded products in every order of ours, or fused in four."""
    yield from orders((left * right).astype(np.float32), add_float32, random)
    shuffled = random.permutation(len(left))
    for index in (np.arange(len(left)), np.arange(len(left))[::-1], shuffled):
        total = (left[index[0]] * right[index[0]]).astype(np.float32)
        for k in index[1:]:
            total = fused(left[k], right[k], total)
        yield total
    half = (len(left) + 1) // 2
    parts = [np.zeros_like(left[0]), np.zeros_like(left[0])]
    for k in range(len(left)):
        parts[k // half] = fused(left[k], right[k], parts[k // half])
    yield add_float32(*parts)


def bits_of(random: np.random.Generator, shape: tuple[int, ...], low: int = -30, high: int = 31) -> Array:
    """Float32 of random significands, some of few bits, and exponents from a range."""
    significand = random.integers(1 << 23, 1 << 24, shape) & -(1 << random.integers(0, 24, shape))
    value = np.ldexp(significand.astype(np.float64), random.integers(low - 23, high - 23, shape))
    signed: Array = (value * random.choice([-1.0, 1.0], shape)).astype(np.float32)
    return signed
